"""Feedback files: both layouts, and an error with file, line and field for each way a file can be wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_kto.data.records import FeedbackRecord, read_feedback
from nemo_kto.errors import ConfigError, DataError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
ALIGNER_ROW = {"prompt": "p", "response": "r", "preference": "chosen"}
TRL_ROW = {"prompt": "p", "completion": "c", "label": False}


def test_nemo_aligner_rows(write_jsonl):
    path = write_jsonl(ALIGNER_ROW, {"prompt": "q", "response": "s", "preference": "rejected", "extra": 1})
    assert read_feedback([path], format="nemo_aligner") == [
        FeedbackRecord("p", "r", True, str(path), 1),
        FeedbackRecord("q", "s", False, str(path), 2),
    ]


def test_trl_rows_of_strings_and_of_messages(write_jsonl):
    chat = {"prompt": [USER], "completion": [ASSISTANT], "label": True}
    path = write_jsonl(TRL_ROW, chat)
    assert read_feedback([path], format="trl") == [
        FeedbackRecord("p", "c", False, str(path), 1),
        FeedbackRecord([USER], [ASSISTANT], True, str(path), 2),
    ]


def test_auto_decides_for_each_file(write_jsonl):
    aligner = write_jsonl(ALIGNER_ROW, name="a.jsonl")
    trl = write_jsonl(TRL_ROW, name="b.jsonl")
    records = read_feedback([aligner, str(trl)])
    assert [(r.response, r.desirable, r.place) for r in records] == [
        ("r", True, f"{aligner}:1"),
        ("c", False, f"{trl}:1"),
    ]


def test_named_format_decides_over_the_fields(write_jsonl):
    path = write_jsonl({**ALIGNER_ROW, **TRL_ROW})
    (aligner,), (trl,) = (read_feedback([path], format=name) for name in ("nemo_aligner", "trl"))
    assert (aligner.response, aligner.desirable) == ("r", True)
    assert (trl.response, trl.desirable) == ("c", False)


def test_first_record_decides_for_its_file(write_jsonl):
    path = write_jsonl(ALIGNER_ROW, TRL_ROW)
    assert error_of(path) == f"{path}:2: field 'response' is missing."


def test_blank_lines_keep_line_numbers_right(write_jsonl):
    path = write_jsonl("", ALIGNER_ROW, "   ", ALIGNER_ROW)
    assert [record.line for record in read_feedback([path])] == [2, 4]


def test_byte_order_mark_and_unicode_line_separator(tmp_path):
    path = tmp_path / "bom.jsonl"
    row = {**ALIGNER_ROW, "prompt": "one\u2028two"}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    assert read_feedback([path])[0].prompt == "one\u2028two"


def error_of(path: Path, format: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        read_feedback([path], format=format)
    return str(caught.value)


def test_missing_file(tmp_path):
    path = tmp_path / "none.jsonl"
    assert error_of(path) == f"{path}: no such file."


def test_folder_instead_of_file(tmp_path):
    assert str(tmp_path) in error_of(tmp_path) and "cannot be read" in error_of(tmp_path)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(tmp_path, text):
    path = tmp_path / "empty.jsonl"
    path.write_text(text)
    assert f"{path}: the file holds no record" in error_of(path)


def test_no_file_at_all():
    with pytest.raises(DataError, match="name at least one JSONL file"):
        read_feedback([])


def test_unknown_format(write_jsonl):
    with pytest.raises(ConfigError, match="'csv'.*auto, nemo_aligner, trl"):
        read_feedback([write_jsonl(ALIGNER_ROW)], format="csv")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "p",', "not valid JSON"),
        ("[" * 100_000, "not valid JSON|nested too deeply"),
        ('{"prompt": ' + "1" * 5000 + "}", "cannot be read"),
        ('["p", "r"]', "a JSON list"),
        ("null", "a JSON null"),
    ],
)
def test_broken_line(write_jsonl, line, expected):
    path = write_jsonl(ALIGNER_ROW, ALIGNER_ROW, line)
    assert re.match(f"{re.escape(str(path))}:3: .*({expected})", error_of(path))


def test_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(json.dumps(ALIGNER_ROW).encode() + b'\n{"prompt": "caf\xe9"}\n')
    assert error_of(path) == f"{path}:2: the line is not UTF-8 text (byte 16)."


def test_fields_of_no_format(write_jsonl):
    path = write_jsonl({"prompt": "p", "chosen_response": "r"})
    message = error_of(path)
    assert message.startswith(f"{path}:1: ")
    assert "'prompt', 'chosen_response'" in message and "'preference' (nemo_aligner)" in message


@pytest.mark.parametrize("row", [ALIGNER_ROW, TRL_ROW])
def test_each_missing_field(write_jsonl, row):
    for field in row:
        broken = {key: value for key, value in row.items() if key != field}
        path = write_jsonl(row, broken)
        assert error_of(path) == f"{path}:2: field '{field}' is missing."


def test_missing_field_in_first_record_is_named(write_jsonl):
    path = write_jsonl({"prompt": "p", "response": "r"})
    assert error_of(path) == f"{path}:1: field 'preference' is missing."


@pytest.mark.parametrize("value", ["good", "Chosen", True, 1, None])
def test_unknown_preference(write_jsonl, value):
    path = write_jsonl({**ALIGNER_ROW, "preference": value})
    assert error_of(path) == (
        f'{path}:1: field \'preference\' must be "chosen" or "rejected", got {json.dumps(value)}.'
    )


@pytest.mark.parametrize("value", ["true", 1, 0, None, 1.0])
def test_label_that_is_no_boolean(write_jsonl, value):
    path = write_jsonl({**TRL_ROW, "label": value})
    assert error_of(path) == f"{path}:1: field 'label' must be true or false, got {json.dumps(value)}."


CHAT = {"prompt": [USER], "completion": [ASSISTANT], "label": True}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompt": 3}, "field 'prompt' must be a string or a list of messages, not a number"),
        ({"prompt": []}, "field 'prompt' is an empty list of messages"),
        ({"prompt": ["hi"]}, "field 'prompt', message 1: must be an object, not a string"),
        ({"prompt": [USER, {"role": "user"}]}, "field 'prompt', message 2: 'content' is missing"),
        ({"prompt": [{"role": 1, "content": ""}]}, "field 'prompt', message 1: 'role' must be a string, not a number"),
        ({"completion": [{"role": "assistant", "content": None}]}, "'content' must be a string, not a null"),
        ({"prompt": "p"}, "field 'prompt' is a string and field 'completion' a list; both must be"),
        ({"prompt": [USER, ASSISTANT]}, "field 'prompt' ends with an assistant message"),
        ({"completion": [USER]}, "exactly one message, of role 'assistant'; got: user"),
        ({"completion": [ASSISTANT, USER]}, "exactly one message, of role 'assistant'; got: assistant, user"),
        ({"completion": [{"role": "assistant", "content": ""}]}, "field 'completion' is empty"),
        ({"prompt": "p", "completion": ""}, "field 'completion' is empty"),
        ({"prompt": "a\ud800", "completion": "c"}, "field 'prompt' holds half of a surrogate pair at character 2"),
    ],
)
def test_wrong_values(write_jsonl, change: dict[str, Any], expected: str):
    path = write_jsonl(CHAT, {**CHAT, **change})
    message = error_of(path)
    assert message.startswith(f"{path}:2: ") and expected in message
