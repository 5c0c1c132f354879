"""Paths into a row: what each step means, what wins, and what is said where nothing is there."""

import json
from typing import Any

import pytest

from nemo_kto.config.compose import load_config
from nemo_kto.data.reading.chunks import parse_chunk, read_chunks, read_feedback
from nemo_kto.data.reading.containers import Row
from nemo_kto.data.reading.formats import FIELDS
from nemo_kto.data.reading.paths import Missing, look_up, parse_path, setting_of
from nemo_kto.data.reading.records import BadRecord, FeedbackRecord, RecordError
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import Source
from nemo_kto.errors import ConfigError, DataError

ROW = {
    "input": {"messages": [{"content": "q"}, {"content": "r"}], "": 1, "a b": 2, "a.b": {"c": 3}, "none": None},
    "scores": [
        {"name": "user-feedback", "value": 1},
        {"name": "length", "value": 12},
        {"name": "length", "value": 12},
        {"name": "twice", "value": 0},
        {"name": "twice", "value": 1},
        {"name": 7, "value": True},
        "x",
    ],
    "text": '{"messages": [{"content": "inside"}], "deep": "[1, {\\"x\\": 2}]"}',
    "plain": "{no JSON",
    "flat.name": "wins",
    "flat": {"name": "loses", "other": "there"},
    "odd [column": "as it stands",
    "odd.": "too",
}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("plain", "{no JSON"),
        ("input.messages", ROW["input"]["messages"]),
        ("input.messages[0].content", "q"),
        ("input.messages[-1].content", "r"),
        ("input.messages[content=r].content", "r"),
        ("input.a b", 2),
        ("input.a.b.c", 3),
        ("input.none", None),
        ("scores[name=user-feedback].value", 1),
        ("scores[name=length].value", 12),
        ("scores[name=7].value", True),
        ("scores[value=0].name", "twice"),
        ("scores[value=12.0].name", "length"),
        ("scores[-1]", "x"),
        ("text.messages[0].content", "inside"),
        ("text.deep[1].x", 2),
        ("flat.name", "wins"),
        ("flat.other", "there"),
        ("odd [column", "as it stands"),
        ("odd.", "too"),
    ],
)
def test_what_a_path_leads_to(path, expected):
    assert look_up(ROW, path) == expected


@pytest.mark.parametrize(
    ("path", "reason", "wrong"),
    [
        ("other", "", False),
        ("other.messages", "", False),
        ("input.massages", "'input' has no 'massages', but 'messages', '', 'a b', 'a.b', 'none'", False),
        ("input.none.x", "'input.none' is null", False),
        ("input.messages[2]", "'input.messages' has 2 elements, and no [2]", False),
        ("input.messages[-3].content", "'input.messages' has 2 elements, and no [-3]", False),
        (
            "scores[name=x].value",
            "'scores' has no [name=x]; the values of 'name' there: user-feedback, length, twice, 7",
            False,
        ),
        ("scores[key=x]", "'scores' has no [key=x]; the values of 'key' there: none", False),
        ("scores[name=twice].value", "'scores' has 2 elements [name=twice], which do not agree", True),
        ("input[0]", "'input' is an object, where a list was expected for [0]", True),
        ("input[name=x]", "'input' is an object, where a list was expected for [name=x]", True),
        ("scores.name", "'scores' is a list, where an object with 'name' was expected", True),
        ("input.a b.c", "'input.a b' is a number, where an object with 'c' was expected", True),
        ("plain.x", "'plain' is a string that is no JSON of one, where an object with 'x' was expected", True),
    ],
)
def test_what_is_said_where_nothing_is_there(path, reason, wrong):
    assert look_up(ROW, path) == Missing(reason, wrong)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a", ("a",)),
        ("a.b-c.d e", ("a", "b-c", "d e")),
        ("a[0][-12].b", ("a", 0, -12, "b")),
        ("a[k=v w][x=]", ("a", ("k", "v w"), ("x", ""))),
        ("a[k=v=w]", ("a", ("k", "v=w"))),
        *(
            (text, None)
            for text in ("", ".a", "a.", "a..b", "a[", "a]", "a[]", "a[x]", "a[0", "a[0]b", "[0]", "a[=v]", "a.[0]")
        ),
    ],
)
def test_grammar(text, steps):
    assert parse_path(text) == steps


VALUES = {
    "prompt": "q",
    "response": "a",
    "label": True,
    "chosen": "a",
    "rejected": "b",
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "instruction": "q",
    "input": "x",
    "history": [["h", "i"]],
    "output_A": "a",
    "output_B": "b",
    "system": "s",
    "tools": [{"name": "f"}],
    "chat_template_kwargs": {"k": 1},
    "weight": 0.5,
}
NEEDED = [
    ("prompt", "response", "label"),
    ("prompt", "output_A", "output_B", "label"),
    ("messages", "label"),
    ("instruction", "chosen", "rejected"),
]


def nested(name: str, value: Any, kind: str) -> tuple[str, Any]:
    """A path to a value, and the column that it leads through."""
    if kind == "object":
        return f"{name}_of.inner", {"inner": value, "other": 1}
    if kind == "list":
        return f"{name}_of[1].inner", [None, {"inner": value}]
    if kind == "named":
        return f"{name}_of[name=x y].inner", [{"name": "z", "inner": 3}, {"name": "x y", "inner": value}]
    return f"{name}_of.outer.inner", json.dumps({"outer": json.dumps({"inner": value})})


def records(row: dict[str, Any], fields: dict[str, str]) -> list[FeedbackRecord]:
    place = Row("f", 1, row)
    return RowReader(fields=fields).settle([place]).read(place)


def test_every_name_is_in_one_of_the_formats_below():
    assert {name for names in NEEDED for name in names} | {"system", "tools", "chat_template_kwargs", "weight"} | {
        "input",
        "history",
        "images",
    } == {*FIELDS}


@pytest.mark.parametrize("kind", ["object", "list", "named", "string"])
@pytest.mark.parametrize("names", NEEDED)
def test_every_name_may_be_a_path(names, kind):
    names = [*names, *("system", "tools", "chat_template_kwargs", "weight")]
    names += ["input", "history"] if "instruction" in names else []
    plain = {f"{name}_here": VALUES[name] for name in names}
    expected = records(plain, {name: f"{name}_here" for name in names})
    assert expected[0].weight == 0.5 and expected[0].tools and expected[0].prompt[0]["content"] == "s"
    paths = {name: nested(name, VALUES[name], kind) for name in names}
    row = {path.partition("_of")[0] + "_of": value for path, value in paths.values()}
    assert records(row, {name: path for name, (path, _) in paths.items()}) == expected


def test_a_path_that_ends_in_nothing_names_its_step():
    fields = {"prompt": "a.b", "response": "c", "label": "d[name=x].value"}
    row = {"a": {"b": "q"}, "c": "r", "d": [{"name": "x", "value": 1}]}
    assert len(records(row, fields)) == 1
    for change, expected in (
        ({"a": {}}, "field 'a.b' is missing: 'a' has no 'b', it is empty."),
        ({"a": None}, "field 'a.b' is missing: 'a' is null."),
        ({"a": 3}, "field 'a.b' is missing: 'a' is a number, where an object with 'b' was expected."),
        ({"d": []}, "field 'd[name=x].value' is missing: 'd' has no [name=x]; the values of 'name' there: none."),
    ):
        reader = RowReader(fields=fields).settle([Row("f", 1, row)])
        with pytest.raises(RecordError) as caught:
            reader.read(Row("f", 2, row | change))
        assert str(caught.value) == expected


def test_what_may_be_missing_may_be_missing_along_a_path_but_not_of_another_kind():
    row = {"prompt": "q", "completion": "a", "label": 1, "meta": {"weight": 0.5}}
    reader = RowReader(fields={"weight": "meta.weight"}).settle([Row("f", 1, row)])
    assert [reader.read(Row("f", 1, row | {"meta": meta}))[0].weight for meta in ({"weight": 2}, {}, None)] == [
        2,
        1,
        1,
    ]
    with pytest.raises(RecordError, match=r"field 'meta.weight' cannot be looked up: 'meta' is a list, where an"):
        reader.read(Row("f", 1, row | {"meta": []}))


def test_a_text_that_is_neither_a_column_nor_a_path(write_jsonl):
    path = write_jsonl({"q [en]": "q", "a": "r", "l": 1})
    fields = {"prompt": "q [en]", "response": "a", "label": "l"}
    assert [record.prompt for record in read_feedback([path], fields=fields)] == ["q"]
    with pytest.raises(ConfigError, match=r"fields: prompt='q \[de\]' is neither a column of .*data.jsonl nor a path"):
        read_feedback([path], fields=fields | {"prompt": "q [de]"})


def test_settings_that_messages_name_are_read_back():
    for path in [
        "a",
        "a.b",
        "scores[name=user-feedback].value",
        'say "hi"\\',
        "a b",
        "ünï",
        "null",
        "it's",
        'x\\"y',
        "1",
    ]:
        assert load_config([setting_of("label", path)]).model.data.fields == {"label": path}


def test_a_file_of_nested_rows_in_several_kinds_of_files(write_jsonl, tmp_path):
    fields = {"prompt": "in.messages", "response": "out[0].text", "label": "votes[name=up].value"}
    row = {
        "in": {"messages": [{"role": "user", "content": "q"}]},
        "out": [{"text": "a"}],
        "votes": [{"name": "up", "value": "1"}],
    }
    lines = write_jsonl(row, row)
    table = tmp_path / "t.csv"
    cells = ['"' + json.dumps(value).replace('"', '""') + '"' for value in row.values()]
    table.write_text("in,out,votes\n" + (",".join(cells) + "\n") * 2)
    found = [
        [(r.prompt, r.response, r.desirable) for r in read_feedback([path], fields=fields)] for path in (lines, table)
    ]
    assert (
        found[0]
        == found[1]
        == [([{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}], True)] * 2
    )


def test_rows_without_the_column_are_bad_records(write_jsonl):
    path = write_jsonl({"a": {"b": "q"}, "c": "r", "d": 1}, {"c": "r", "d": 1})
    source = Source(str(path), reader=RowReader(fields={"prompt": "a.b", "response": "c", "label": "d"}))
    found = [record for chunk in read_chunks(source, 10) for record in parse_chunk(chunk)]
    assert found[1] == BadRecord(str(path), 2, "a.b", "is missing.")
    with pytest.raises(DataError, match="fit no known format"):
        read_feedback([write_jsonl({"x": 1})], fields={"prompt": "a.b"})
