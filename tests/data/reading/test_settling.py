"""One file, one reading: what is told from a file's first rows holds for all of them, in every kind of file."""

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from nemo_kto.data.reading.chunks import parse_chunk, read_chunks
from nemo_kto.data.reading.containers import Row
from nemo_kto.data.reading.records import BadRecord, FeedbackRecord
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.settling import SAMPLE
from nemo_kto.data.reading.sources import Source
from nemo_kto.errors import DataError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def as_csv(rows: list[dict[str, Any]], path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {
    "t.csv": as_csv,
    "t.tsv": lambda rows, path: as_csv(rows, path, "\t"),
    "t.jsonl": lambda rows, path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "t.json": lambda rows, path: path.write_text(json.dumps(rows)),
    "t.parquet": lambda rows, path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "saved": lambda rows, path: datasets.Dataset.from_list(rows).save_to_disk(path),
    "function": None,
}


@pytest.fixture(params=WRITERS)
def source(request, tmp_path):
    """Writes rows into a file of each kind, or returns them from a function, and says how they are read."""

    def write(*rows: dict[str, Any], **how: Any) -> Source:
        path = tmp_path / request.param
        if request.param == "function":
            return Source("f", reader=RowReader(**how), function=lambda _: rows)
        WRITERS[request.param](list(rows), path)
        return Source(str(path), reader=RowReader(**how))

    return write


def read(source: Source) -> list[Any]:
    """(prompt, response, desirable) of the records, bad ones as text without their place."""
    found = []
    for chunk in read_chunks(source, 3):
        for record in parse_chunk(chunk):
            is_good = isinstance(record, FeedbackRecord)
            found.append(
                (record.prompt, record.response, record.desirable) if is_good else str(record).split(": ", 1)[1]
            )
    return found


def error_of(source: Source) -> str:
    with pytest.raises(DataError) as caught:
        read(source)
    return str(caught.value)


ASKED, ANSWERED = json.dumps([user("q")]), json.dumps([assistant("a")])
BOTH_KEYS = (
    "set model.data.json_strings=messages to read what spells messages, or model.data.json_strings=text to take"
)

# Strings that spell messages


def test_strings_that_are_messages_in_all_rows(source):
    rows = [{"prompt": ASKED, "completion": ANSWERED, "label": good} for good in ("1", "0")]
    assert read(source(*rows)) == [([user("q")], [assistant("a")], good) for good in (True, False)]


def test_messages_and_text_are_messages_and_text_of_the_assistant(source):
    """LLaMA-Factory's and others' tables: the prompt is a conversation, the answer a text."""
    rows = [{"prompt": ASKED, "completion": text, "label": "1"} for text in ("Hi!", '{"a": 1}')]
    assert read(source(*rows)) == [([user("q")], [assistant(text)], True) for text in ("Hi!", '{"a": 1}')]


def test_a_question_and_a_message_are_what_a_user_says_and_its_answer(source):
    rows = [{"prompt": "q", "chosen": ANSWERED, "rejected": json.dumps(assistant("b"))}]
    assert read(source(*rows)) == [([user("q")], [assistant("a")], True), ([user("q")], [assistant("b")], False)]


def test_one_side_of_a_pair_that_is_a_message_makes_messages_of_both(source):
    rows = [{"prompt": "q", "chosen": "a", "rejected": json.dumps([assistant("b")])}]
    assert read(source(*rows)) == [([user("q")], [assistant("a")], True), ([user("q")], [assistant("b")], False)]


@pytest.mark.parametrize("text", ['{"role": "admin"}', '[{"a": 1}]', "[]", "{}", '[{"role": "user"}]', "[1", '"x"'])
def test_json_that_is_no_message_is_text(source, text):
    rows = [{"prompt": "q", "completion": text, "label": "1"}, {"prompt": "r", "completion": "s", "label": "0"}]
    assert read(source(*rows)) == [("q", text, True), ("r", "s", False)]


def test_a_column_of_messages_and_text_is_an_error_that_names_both_readings(source):
    rows = [{"prompt": text, "completion": "a", "label": "1"} for text in ("q", "r", ASKED)]
    message = error_of(source(*rows))
    assert (
        ": field 'prompt' is the JSON of messages, and in line " in message and f"it is text: {BOTH_KEYS}" in message
    )
    expected = [("q", "a", True), ("r", "a", True), (ASKED, "a", True)]
    assert read(source(*rows, json_strings="text")) == expected
    chat = [([user("q")], [assistant("a")], True)]
    assert read(source(*rows, json_strings="messages", chat=True))[2:] == chat


def test_the_choice_is_one_for_all_columns(source):
    row = {"prompt": ASKED, "completion": "Hi!", "label": "1"}
    assert read(source(row, json_strings="text")) == [(ASKED, "Hi!", True)]
    assert read(source(row, json_strings="messages")) == [([user("q")], [assistant("Hi!")], True)]


@pytest.mark.parametrize(
    "text", ["[{'role': 'user', 'content': 'q'}]", "{'from': 'human', 'value': 'q'}", " [ {'content': 1"]
)
def test_messages_as_python_writes_them_are_refused(source, text):
    rows = [{"prompt": text, "completion": "a", "label": "1"}, {"prompt": "q", "completion": "a", "label": "1"}]
    bad, good = read(source(*rows))
    assert bad.startswith("field 'prompt' holds messages as Python writes them; write them as JSON (json.dumps).")
    assert good == ("q", "a", True)
    assert read(source(*rows, json_strings="text"))[0] == (text, "a", True)


def test_conversations_as_python_writes_them_are_refused(source):
    (bad,) = read(source({"messages": "[{'role': 'user', 'content': 'q'}]", "label": "1"}))
    assert bad.startswith("field 'messages' is a string that is no JSON") and "json.dumps" in bad


def many(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows behind so many of the first that they are not among those by which a file is judged."""
    return [rows[0]] * SAMPLE + [*rows[1:]]


def test_rows_behind_the_first_thousand_that_disagree_are_bad_records(source):
    text, spelled = (
        {"prompt": "q", "completion": "a", "label": "1"},
        {"prompt": ASKED, "completion": "a", "label": "1"},
    )
    found = read(source(*many(text, spelled, text)))
    assert found[:SAMPLE] == [("q", "a", True)] * SAMPLE and found[-1] == ("q", "a", True)
    assert found[SAMPLE].startswith("field 'prompt' is the JSON of messages, where the file's other rows hold text: ")
    assert BOTH_KEYS in found[SAMPLE]
    found = read(source(*many(spelled, text, {**text, "prompt": ""}, spelled)))
    assert found[SAMPLE].startswith("field 'prompt' is text, where the file's other rows hold the JSON of messages: ")
    assert found[SAMPLE + 1] == "field 'prompt' is empty, where the file's other rows hold the JSON of messages."
    assert found[-1] == ([user("q")], [assistant("a")], True)


def test_an_empty_cell_or_a_null_among_messages_is_a_bad_record_and_changes_nothing(source):
    rows = [{"prompt": text, "completion": "a", "label": "1"} for text in ("", ASKED)]
    assert read(source(*rows)) == [
        "field 'prompt' is empty, where the file's other rows hold the JSON of messages.",
        ([user("q")], [assistant("a")], True),
    ]


def test_nulls_among_messages(tmp_path):
    rows = [{"prompt": text, "completion": "a", "label": "1"} for text in (None, ASKED)]
    for name in ("t.jsonl", "t.parquet"):
        WRITERS[name](rows, tmp_path / name)
        bad, good = read(Source(str(tmp_path / name)))
        assert "not a null" in bad and good == ([user("q")], [assistant("a")], True)


def test_what_else_tables_hold_as_text(source):
    tools, kwargs = [{"name": "f"}], {"thinking": True}
    row = {"instruction": "i", "output": "o", "kto_tag": "0.0", "weight": "0.5"}
    row |= {
        "tools": json.dumps(tools),
        "chat_template_kwargs": json.dumps(kwargs),
        "history": json.dumps([["h", "j"]]),
    }
    empty = {**row, "weight": "", "tools": "", "chat_template_kwargs": " ", "history": "", "kto_tag": "True"}
    found = [record for chunk in read_chunks(source(row, empty), 9) for record in parse_chunk(chunk)]
    history = [user("h"), assistant("j")]
    assert [(r.prompt, r.desirable, r.weight, r.tools, r.template_kwargs) for r in found] == [
        ([*history, user("i")], False, 0.5, tools, kwargs),
        ([user("i")], True, 1.0, None, None),
    ]


# System prompts


SYSTEM_ROWS = [
    {"system": "Be brief.", "prompt": "q", "completion": "a", "label": True},
    {"system": "", "prompt": "q", "completion": "b", "label": False},
    {"system": None, "prompt": "q", "completion": "c", "label": True},
]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.parquet", "saved", "t.csv"])
def test_a_system_prompt_in_one_row_makes_messages_of_all(tmp_path, name, order):
    rows = [SYSTEM_ROWS[index] for index in order]
    WRITERS[name](rows, tmp_path / name)
    expected = []
    for row in rows:
        prompt = [system("Be brief."), user("q")] if row["system"] else [user("q")]
        expected.append((prompt, [assistant(row["completion"])], row["label"]))
    assert read(Source(str(tmp_path / name))) == expected


def test_a_row_without_the_column_is_messages_too(write_jsonl):
    path = write_jsonl(SYSTEM_ROWS[0], {"prompt": "q", "completion": "d", "label": True})
    assert read(Source(str(path)))[1] == ([user("q")], [assistant("d")], True)


def test_a_system_column_that_is_null_throughout_says_nothing(write_jsonl):
    path = write_jsonl(SYSTEM_ROWS[2], SYSTEM_ROWS[2])
    assert read(Source(str(path))) == [("q", "c", True)] * 2
    named = RowReader(fields={"system": "system"})  # somebody says that there are system prompts
    assert read(Source(str(path), reader=named)) == [([user("q")], [assistant("c")], True)] * 2
    elsewhere = RowReader(fields={"system": "none"})
    assert read(Source(str(write_jsonl(SYSTEM_ROWS[0])), reader=elsewhere)) == [("q", "a", True)]


def test_a_system_prompt_that_comes_late_is_a_bad_record(write_jsonl):
    row = {"prompt": "q", "completion": "a", "label": True}
    path = write_jsonl(*many(row, row | {"system": "Be brief."}, row | {"system": ""}))
    found = read(Source(str(path)))
    for bad in found[SAMPLE:]:
        assert bad.startswith("field 'system' is a system prompt, and the rows before had none and are strings.")
        assert "model.data.prompt_template=chat" in bad
    found = read(Source(str(path), reader=RowReader(chat=True)))
    assert found[-2:] == [
        ([system("Be brief."), user("q")], [assistant("a")], True),
        ([user("q")], [assistant("a")], True),
    ]
    assert found[0] == ([user("q")], [assistant("a")], True)


# Strings and messages


TEXT = {"prompt": "q", "completion": "a", "label": True}
SPOKEN = {"prompt": [user("q")], "completion": [assistant("a")], "label": True}


@pytest.mark.parametrize(("rows", "lines"), [([TEXT, SPOKEN], (1, 2)), ([SPOKEN, SPOKEN, TEXT], (3, 1))])
def test_strings_and_messages_in_one_file_are_an_error_that_names_the_key(write_jsonl, rows, lines):
    path = write_jsonl(*rows)
    message = error_of(Source(str(path)))
    assert message.startswith(
        f"{path}:{lines[0]}: the prompt is a string, and in line {lines[1]} it is made of messages."
    )
    assert "model.data.prompt_template=chat" in message
    found = read(Source(str(path), reader=RowReader(chat=True)))
    assert found == [([user("q")], [assistant("a")], True)] * len(rows)


def test_the_other_kind_behind_the_first_thousand_is_a_bad_record(write_jsonl):
    found = read(Source(str(write_jsonl(*many(TEXT, SPOKEN, TEXT)))))
    assert found[SAMPLE].startswith("field 'prompt' is made of messages, where the rows before are strings.")
    assert found[-1] == ("q", "a", True)
    found = read(Source(str(write_jsonl(*many(SPOKEN, TEXT, SPOKEN)))))
    assert found[SAMPLE].startswith("field 'prompt' is a string, where the rows before are made of messages.")
    assert found[-1] == ([user("q")], [assistant("a")], True) and "prompt_template=chat" in found[SAMPLE]


def test_rows_that_cannot_be_read_decide_nothing(write_jsonl):
    bad = [{**SPOKEN, "completion": None}, {**SPOKEN, "label": "?"}]
    found = read(Source(str(write_jsonl(*bad, TEXT))))
    assert found[2] == ("q", "a", True) and all(isinstance(one, str) for one in found[:2])


def test_records_of_a_function_are_what_they_say():
    """A FeedbackRecord is no row: its strings are text, and there may be both kinds."""
    given = [
        FeedbackRecord(ASKED, ANSWERED, True, "f", 1),
        FeedbackRecord([user("q")], [assistant("a")], False, "f", 2),
    ]
    found = read(Source("f", function=lambda _: given))
    assert found == [(ASKED, ANSWERED, True), ([user("q")], [assistant("a")], False)]
    found = read(Source("f", reader=RowReader(chat=True), function=lambda _: given))
    assert found[0] == ([user(ASKED)], [assistant(ANSWERED)], True)


def test_rows_of_a_function_behind_many_of_its_records(tmp_path):
    """They are judged by the first of them."""
    record = FeedbackRecord("q", "a", True, "f", 1)
    given = [record] * (SAMPLE + 1) + [{"prompt": "q", "completion": "a", "label": 1}, {"prompt": "q", "label": 1}]
    found = read(Source("f", function=lambda _: given))
    assert found[SAMPLE + 1] == ("q", "a", True) and found[-1].startswith("field 'completion' is missing.")


# Formats and labels


def test_an_empty_cell_is_as_empty_as_a_null(tmp_path):
    """A table of several formats, of which each row has one: CSV has no null, the others have no empty text."""
    row = {"prompt": None, "messages": json.dumps([user("q")]), "chosen": "a", "rejected": "b", "images": None}
    row |= {"system": None, "weight": None, "tools": None, "preference": None}
    expected = [([user("q")], [assistant("a")], True), ([user("q")], [assistant("b")], False)]
    label = {"prompt": "q", "response": "r", "preference": None, "label": "0", "images": None}
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        WRITERS[name]([row, row], tmp_path / name)
        assert read(Source(str(tmp_path / name))) == expected * 2, name
        WRITERS[name]([label], tmp_path / name)
        assert read(Source(str(tmp_path / name))) == [("q", "r", False)], name
    WRITERS["t.csv"]([label | {"images": "[]"}, label | {"images": '["a.png"]'}], tmp_path / "t.csv")
    assert (
        read(Source(str(tmp_path / "t.csv")))[1]
        == f"field 'images', image 1: {tmp_path}/a.png is not there. Names are relative to the folder of the data."
    )


ALIGNER = {"prompt": "p", "response": "r", "preference": "chosen"}


def test_a_first_odd_row_does_not_choose_the_format(write_jsonl):
    odd = {"messages": [user("q"), assistant("a")], "label": True}
    found = read(Source(str(write_jsonl(odd, ALIGNER, ALIGNER))))
    assert found[1:] == [("p", "r", True)] * 2
    assert found[0].startswith("field 'prompt' is missing.") or found[0].startswith("field 'response' is missing.")
    assert (
        "The row is of the format messages, the file of nemo_aligner: keep the two in files of their own." in found[0]
    )


def test_rows_with_all_fields_count_before_many_with_some(write_jsonl):
    """Every row of TRL's has two of the three fields of NeMo-Aligner's."""
    trl = {"prompt": "p", "completion": "c", "label": False}
    found = read(Source(str(write_jsonl(ALIGNER, *[trl] * 2))))
    assert (
        found[1:] == [("p", "c", False)] * 2 and "The row is of the format nemo_aligner, the file of trl" in found[0]
    )


def test_the_label_is_where_most_rows_have_it(write_jsonl):
    nulls, both = ALIGNER | {"preference": None, "label": 1}, ALIGNER | {"label": 0}
    assert read(Source(str(write_jsonl(nulls, both, nulls)))) == [("p", "r", good) for good in (True, False, True)]
    found = read(Source(str(write_jsonl(nulls, both, both))))
    assert found[0].startswith("field 'preference' must be true or false") and found[1:] == [("p", "r", True)] * 2


def test_how_a_file_is_read_travels_with_its_rows(write_jsonl):
    path = write_jsonl({"prompt": ASKED, "completion": "a", "label": 1})
    (chunk,) = read_chunks(Source(str(path)), 10)
    assert chunk.reader.settled.readings["prompt"] == "json" and chunk.reader.settled.kind == "messages"
    (record,) = parse_chunk(pickle.loads(pickle.dumps(chunk)))
    assert record.prompt == [user("q")] and isinstance(chunk.rows[0], Row)


def test_each_file_of_a_folder_is_settled_by_itself(tmp_path):
    for name, row in (("a.jsonl", TEXT), ("b.jsonl", SPOKEN), ("c.jsonl", ALIGNER)):
        WRITERS["t.jsonl"]([row], tmp_path / name)
    assert read(Source(str(tmp_path))) == [("q", "a", True), ([user("q")], [assistant("a")], True), ("p", "r", True)]


def test_bad_lines_before_the_first_row_do_no_harm(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * (SAMPLE + 5) + json.dumps(TEXT) + "\n")
    found = [record for chunk in read_chunks(Source(str(path)), 100) for record in parse_chunk(chunk)]
    assert isinstance(found[0], BadRecord) and found[-1].prompt == "q"
