"""Whatever JSON is in a file, reading it gives records or an error that names the place, and nothing else."""

import base64
import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_kto.data.reading.chunks import Chunk, parse_chunk, read_feedback
from nemo_kto.data.reading.containers import Row
from nemo_kto.data.reading.formats import FORMATS
from nemo_kto.data.reading.json_strings import JSON_STRINGS
from nemo_kto.data.reading.labels import parse_label
from nemo_kto.data.reading.records import BadRecord, FeedbackRecord, RecordError
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.errors import DataError
from tests.data.drawings import png

TEXT = st.text(st.characters(), max_size=8) | st.sampled_from(
    [
        "",
        " ",
        "user",
        "assistant",
        "[",
        "[]",
        "{}",
        "1",
        "\ud800",
        "image",
        "<image>",
        "data:",
        "file:",
        "data:;base64,AA==",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
# names that the readers look for, so that random objects are looked into
KEYS = st.sampled_from(["role", "content", "from", "value", "tool_calls", "type", "text", "name"]) | TEXT
KEYS |= st.sampled_from(["image", "image_url", "url", "path", "base64", "data", "bytes", "source", "index"])
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
COLUMNS = sorted({column for found in FORMATS.values() for names in found.names.values() for column in names})
COLUMNS += sorted({name for found in FORMATS.values() for name in found.required})
COLUMNS += ["system", "tools", "chat_template_kwargs", "input", "history", "score", "images", "image"]

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TURNS = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
    {"from": "observation", "value": "3"},
    {"from": "gpt", "value": "a"},
]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
URI = f"data:image/png;base64,{base64.b64encode(png(0)).decode()}"
SEEN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}, {"type": "image", "image": URI}]}
REST = {"system": "s", "tools": [{"name": "add"}], "chat_template_kwargs": {"a": 1}}
VALID: dict[str, dict[str, Any]] = {
    "nemo_aligner": {"prompt": "p", "response": "r", "preference": "chosen", **REST},
    "trl": {
        "prompt": [SEEN, CALL, {"role": "tool", "content": "3"}],
        "completion": [ASSISTANT],
        "label": True,
        "images": [URI],
        **REST,
    },
    "halos": {
        "prompt": [USER],
        "output": [ASSISTANT],
        "label": 1,
        "image": {"bytes": URI[22:], "path": "a.png"},
        **REST,
    },
    "halos_pairs": {"prompt": [USER], "output_A": [ASSISTANT], "output_B": [CALL], "label": 0, **REST},
    "alpaca": {
        "instruction": "i",
        "input": "x<image>",
        "output": "o",
        "history": [["q", "a"]],
        "kto_tag": True,
        **REST,
    }
    | {"images": [URI]},
    "alpaca_pairs": {"instruction": "i", "input": "x", "chosen": "c", "rejected": "r", "history": [], **REST},
    "messages": {"messages": [USER, {**ASSISTANT, "content": [{"type": "text", "text": "a"}]}], "label": "up", **REST},
    "sharegpt": {"conversations": TURNS, "kto_tag": 0, **REST},
    "message_pairs": {"conversations": TURNS[:1], "chosen": TURNS[3], "rejected": [ASSISTANT], **REST},
    "nemo_aligner_pairs": {"prompt": "p", "chosen_response": "c", "rejected_response": "r", **REST},
    "helpsteer3": {
        "context": [USER],
        "response1": "a",
        "response2": "b",
        "overall_preference": -2,
        "individual_preference": [{"score": -2}],
        **REST,
    },
    "openai_dpo": {
        "input": {"messages": [USER], "tools": [{"name": "add"}], "parallel_tool_calls": True},
        "preferred_output": [ASSISTANT],
        "non_preferred_output": [CALL],
        "system": "s",
    },
    "langfuse": {
        "input": json.dumps([USER]),
        "output": {"role": "assistant", "content": "a"},
        "scores": [{"name": "thumb", "value": 1, "dataType": "BOOLEAN"}, {"name": "note", "dataType": "TEXT"}],
        **REST,
    },
    "langsmith": {
        "inputs": {"messages": [[{"lc": 1, "type": "constructor", "kwargs": {"type": "human", "content": "q"}}]]},
        "outputs": {"generations": [[{"message": {"type": "ai", "content": "a", "tool_calls": [{"name": "f"}]}}]]},
        "feedback_stats": {"thumb": {"n": 1, "avg": 1.0, "values": {}}},
        "extra": {"invocation_params": {"tools": [{"name": "add"}]}},
    },
    "chatui": {
        "messages": [
            {"from": "user", "content": "q", "id": "1", "ancestors": []},
            {"from": "assistant", "content": "a", "id": "2", "ancestors": ["1"], "score": -1, "reasoning": "r"},
        ],
    },
    "pairs": {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "b"}], **REST},
}


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place inside a value."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield from places(below, (*path, key))


def replaced(value: Any, path: tuple, new: Any) -> Any:
    result = copy.deepcopy(value)
    target = result
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = new
    return result


PLACES = {name: [*places(row)] for name, row in VALID.items()}
IN_A_FOLDER = [*settings.default.suppress_health_check, HealthCheck.function_scoped_fixture]
"""For tests whose examples write the same file into one folder, each over the last one's."""


def check_text(value: Any) -> None:
    """What tokenizers and chat templates take: text that can be encoded, and JSON."""
    json.dumps(value, ensure_ascii=False).encode()


def check_read(row: dict[str, Any], reader: RowReader) -> None:
    """A row ends in whole records, or in an error that can be printed."""
    place = Row("f.jsonl", 5, row)
    before = repr(row)
    try:
        found = [*parse_chunk(Chunk(reader.settle([place]), [place]))]
    except DataError as error:
        assert str(error).startswith("f.jsonl:5: ")
        str(error).encode()
        return
    assert repr(row) == before  # two sources may share a row
    for record in found:
        if isinstance(record, BadRecord):
            assert record.line == 5 and record.reason
            str(record).encode()
        else:
            check_record(record)


def check_record(record: FeedbackRecord) -> None:
    assert type(record.desirable) is bool and record.place == "f.jsonl:5"
    check_text([record.prompt, record.response, record.tools, record.template_kwargs])
    if isinstance(record.prompt, str):
        assert isinstance(record.response, str) and record.response
        return
    for message in (*record.prompt, *record.response):
        assert isinstance(message["role"], str) and isinstance(message.get("content", ""), str | list)
    lists = [m["content"] for m in record.prompt if isinstance(m.get("content"), list)]
    shown = [len([part for part in parts if part == {"type": "image"}]) for parts in lists]
    assert all(shown) and sum(shown) == len(record.images)
    for part in (part for parts in lists for part in parts if part != {"type": "image"}):
        assert {*part} == {"type", "text"} and part["type"] == "text" and isinstance(part["text"], str)
    assert isinstance(record.response[0].get("content", ""), str)
    check_text(record.row())
    assert record.prompt[-1]["role"] != "assistant"
    assert [message["role"] for message in record.response] == ["assistant"]


def test_there_is_a_valid_row_of_every_format():
    assert {*VALID} == {*FORMATS}
    for name, row in VALID.items():
        assert RowReader(name).read(Row("f.jsonl", 5, row))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60)
@given(data=st.data())
def test_any_value_at_any_place(name, data):
    path = data.draw(st.sampled_from(PLACES[name]))
    row = replaced(VALID[name], path, data.draw(JSON))
    check_read(row, RowReader(name))
    check_read(row, RowReader())


@pytest.mark.parametrize("name", FORMATS)
def test_some_values_at_every_place(name):
    for path in PLACES[name]:
        for value in (None, True, 0, -1.5, math.nan, 10**400, "", "x", "\udfff", [], [[]], [None], {}, {"a": []}):
            check_read(replaced(VALID[name], path, value), RowReader(name))


@pytest.mark.parametrize("name", FORMATS)
def test_any_place_missing(name):
    for path in PLACES[name]:
        row = copy.deepcopy(VALID[name])
        target = row
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]
        check_read(row, RowReader(name))
        check_read(row, RowReader())


@settings(max_examples=150)
@given(
    row=st.dictionaries(st.sampled_from(COLUMNS) | TEXT, JSON, max_size=6),
    threshold=st.none() | st.just(">= 4"),
    fields=st.dictionaries(st.sampled_from(["prompt", "response", "label", "messages"]), st.sampled_from(COLUMNS)),
    how=st.fixed_dictionaries({"json_strings": st.sampled_from(JSON_STRINGS), "chat": st.booleans()}),
)
def test_any_row_in_any_format(row, threshold, fields, how):
    check_read(row, RowReader(desirable_if=threshold, fields=fields, **how))
    for name in FORMATS:
        check_read(row, RowReader(name, fields, threshold, **how))


@settings(max_examples=100, suppress_health_check=IN_A_FOLDER)
@given(
    rows=st.lists(JSON | st.sampled_from([*VALID.values()]), max_size=3), suffix=st.sampled_from([".jsonl", ".json"])
)
def test_any_json_in_a_file(tmp_path, rows, suffix):
    path = tmp_path / f"data{suffix}"
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
    try:
        records = read_feedback([path])
    except DataError as error:
        assert str(path) in str(error)
        str(error).encode()
    else:
        assert records


@settings(max_examples=100, suppress_health_check=IN_A_FOLDER)
@given(
    data=st.binary(max_size=60) | st.text('{}[]",:\n\r 1ae\t\ufeff', max_size=40).map(str.encode),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".jsonl.zst"]),
)
def test_any_bytes_in_a_file(tmp_path, data, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:  # so short a file holds no record
        read_feedback([path])
    assert str(path) in str(caught.value)
    str(caught.value).encode()


@given(value=JSON.filter(lambda value: not isinstance(value, str)))
def test_only_one_and_zero_are_labels_among_values_that_are_no_strings(value):
    try:
        label = parse_label(value, "label")
    except RecordError as error:
        str(error).encode()
        assert not isinstance(value, int | float) or value not in (0, 1)
    else:
        assert type(label) is bool and label == value
