"""Files that are damaged or wrong: each ends in a `DataError` that names the file, and the line where there is one."""

import gzip
import json
from io import BytesIO
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nemo_kto.data.reading.chunks import read_feedback
from nemo_kto.errors import DataError

ROW = {"prompt": "p", "completion": "c", "label": True}
LINE = json.dumps(ROW).encode() + b"\n"
USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
HEADER = b"prompt,completion,label\n"


def second(**change: Any) -> bytes:
    """A file with a good line and one with a change."""
    return LINE + json.dumps({**ROW, **change}).encode() + b"\n"


def one(**row: Any) -> bytes:
    return json.dumps(row).encode()


def without(name: str) -> bytes:
    return LINE + one(**{key: value for key, value in ROW.items() if key != name})


def parquet(columns: dict[str, Any]) -> bytes:
    sink = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def overwritten(data: bytes, start: int, length: int) -> bytes:
    return data[:start] + bytes(byte ^ 0xFF for byte in data[start : start + length]) + data[start + length :]


# long enough to be cut and overwritten in many places
MANY = b"".join(one(**{**ROW, "prompt": f"{i * 7919 % 10007:x}"}) + b"\n" for i in range(400))
GZIP, ZSTD = gzip.compress(MANY), zstd(MANY)
PARQUET = parquet({"prompt": ["p", "q"], "completion": ["c", "d"], "label": [True, False]})
NOT_UTF8 = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers())
INVALID = "not valid JSON"

# (name, bytes, what the error says behind the name)
TABLE: list[tuple[str, bytes, str]] = [
    # nothing in it
    ("empty.jsonl", b"", ": the file holds no record"),
    ("blank.jsonl", b" \n\n\t\r\n", ": the file holds no record"),
    ("empty.json", b"", ": the file holds no record"),
    ("empty_array.json", b"[ ]\n", ": the file holds no record"),
    ("empty.csv", b"", ": the file holds no record"),
    ("header.csv", HEADER, ": the file holds no record"),
    ("empty.tsv", b"\n\n", ": the file holds no record"),
    ("empty.jsonl.gz", gzip.compress(b""), ": the file holds no record"),
    ("empty.jsonl.zst", zstd(b""), ": the file holds no record"),
    ("no_rows.parquet", parquet({"prompt": pyarrow.array([], pyarrow.string())}), ": the file holds no record"),
    ("empty.parquet", b"", ": the file cannot be read"),
    ("bom.jsonl", b"\xef\xbb\xbf", f":1: the line is {INVALID}"),
    # damaged containers
    ("short.jsonl.gz", GZIP[:-4], ": the file cannot be read"),
    ("half.jsonl.gz", GZIP[: len(GZIP) // 2], ": the file cannot be read"),
    ("head.jsonl.gz", GZIP[:5], ": the file cannot be read"),
    ("sum.jsonl.gz", overwritten(GZIP, len(GZIP) - 8, 4), ": the file cannot be read (CRC check failed"),
    ("bits.jsonl.gz", overwritten(GZIP, len(GZIP) // 2, 60), ": the file cannot be read"),
    ("plain.jsonl.gz", MANY, ": the file cannot be read (Not a gzipped file"),
    ("tail.jsonl.gz", GZIP + b"tail", ": the file cannot be read (Not a gzipped file"),
    ("half.json.gz", gzip.compress(b"[" + LINE + b"]")[:-9], ": the file cannot be read"),
    ("half.csv.gz", gzip.compress(HEADER + b"p,c,1\n")[:-9], ": the file cannot be read"),
    ("short.jsonl.zst", ZSTD[:-1], ": the file cannot be read (Truncated"),
    ("half.jsonl.zst", ZSTD[: len(ZSTD) // 2], ": the file cannot be read (Truncated"),
    ("plain.jsonl.zst", MANY, ": the file cannot be read (ZSTD"),
    ("bits.jsonl.zst", overwritten(ZSTD, 20, 60), ": the file cannot be read (ZSTD"),
    ("tail.jsonl.zst", ZSTD + b"tail", ": the file cannot be read (ZSTD"),
    ("half.json.zst", zstd(b"[" + LINE + b"]")[:-3], ": the file cannot be read (Truncated"),
    ("short.parquet", PARQUET[:-1], ": the file cannot be read"),
    ("half.parquet", PARQUET[: len(PARQUET) // 2], ": the file cannot be read"),
    ("magic.parquet", b"PAR1", ": the file cannot be read"),
    ("footer.parquet", overwritten(PARQUET, len(PARQUET) - 60, 40), ": the file cannot be read"),
    ("pages.parquet", overwritten(PARQUET, 4, 40), ": the file cannot be read"),
    ("lines.parquet", LINE, ": the file cannot be read"),
    ("zipped.parquet.gz", gzip.compress(PARQUET), ": the file cannot be read"),
    (
        "not_utf8.parquet",
        parquet({"prompt": NOT_UTF8, "completion": ["c"], "label": [1]}),
        ": the file cannot be read",
    ),
    # no JSON Lines
    ("cut.jsonl", LINE + LINE[:-4], f":2: the line is {INVALID}"),
    ("comma.jsonl", LINE + b'{"prompt": "p",}\n', f":2: the line is {INVALID}"),
    ("quotes.jsonl", LINE + b"{'prompt': 'p'}\n", f":2: the line is {INVALID}"),
    ("words.jsonl", LINE + b"hello\n", f":2: the line is {INVALID}"),
    ("two_on_a_line.jsonl", LINE + LINE.strip() + LINE, f":2: the line is {INVALID}"),
    ("pretty.jsonl", json.dumps(ROW, indent=1).encode(), f":1: the line is {INVALID}"),
    ("control.jsonl", LINE + b'{"prompt": "a\x01b"}\n', f":2: the line is {INVALID}"),
    ("escape.jsonl", LINE + rb'{"prompt": "\x41"}', f":2: the line is {INVALID}"),
    ("null_bytes.jsonl", LINE + b"\0" * 20, f":2: the line is {INVALID}"),
    ("latin1.jsonl", LINE + b'{"prompt": "caf\xe9"}\n', ":2: the line is not UTF-8 text (byte 16)"),
    ("utf16.jsonl", LINE.decode().encode("utf-16"), ":1: the line is not UTF-8 text (byte 1)"),
    ("cut_character.jsonl", LINE + b'{"prompt": "\xf0\x9f\x98', ":2: the line is not UTF-8 text"),
    ("coded_surrogate.jsonl", LINE + b'{"prompt": "\xed\xa0\x80"}', ":2: the line is not UTF-8 text"),
    ("number.jsonl", LINE + b"3\n", ":2: the line holds a JSON number"),
    ("list.jsonl", LINE + b'["p", "c", true]\n', ":2: the line holds a JSON list"),
    ("null.jsonl", LINE + b"null\n", ":2: the line holds a JSON null"),
    ("string.jsonl", LINE + b'"p"\n', ":2: the line holds a JSON string"),
    ("nan.jsonl", LINE + b"NaN\n", ":2: the line holds a JSON number"),
    ("deep.jsonl", LINE + b"[" * 100_000, ":2: the line"),
    ("deep_prompt.jsonl", second(prompt=["X"]).replace(b'["X"]', b"[" * 600 + b"]" * 600), ":2: the JSON is nested"),
    ("deep_other.jsonl", second(x=["X"]).replace(b'["X"]', b'{"a":' * 600 + b"1" + b"}" * 600), ":2: the JSON is"),
    ("digits.jsonl", LINE + b'{"prompt": ' + b"1" * 5000 + b"}", ":2: the line's JSON cannot be read"),
    # no JSON array
    ("open.json", b"[", ":1: no valid JSON"),
    ("unclosed.json", b"[\n" + LINE, ":3: the array does not end"),
    ("cut.json", b"[\n" + LINE.strip() + b",\n" + LINE[:20], ":3: no valid JSON"),
    ("no_comma.json", b"[\n" + LINE + LINE + b"]", ":3: the array goes on without a comma"),
    ("last_comma.json", b"[\n" + LINE + b",\n]", ":4: a comma before the array's end"),
    ("two_commas.json", b"[\n" + LINE + b",,\n" + LINE + b"]", ":3: no valid JSON"),
    ("first_comma.json", b"[," + LINE + b"]", ":1: no valid JSON"),
    ("two_arrays.json", b"[" + LINE + b"]\n[" + LINE + b"]", ":3: something follows the array"),
    ("bracket.json", b"[" + LINE + b"}", ":2: the array goes on without a comma"),
    ("word.json", b"[\n" + LINE + b",\nx]", ":4: no valid JSON"),
    ("latin1.json", b"[\n" + LINE + b',{"prompt": "caf\xe9"}]', ":3: the text is not UTF-8"),
    ("cut_character.json", b"[\n" + LINE + b',\n{"prompt": "\xf0\x9f', ":4: the text is not UTF-8"),
    ("deep.json", b"[\n" + LINE + b"," + b"[" * 100_000, ":3: "),
    ("deep_other.json", b'[\n{"x": ' + b"[" * 600 + b"]" * 600 + b"}]", ":2: the JSON is nested"),
    ("digits.json", b'[\n{"x": ' + b"1" * 5000 + b"}]", ":2: the JSON cannot be read"),
    ("numbers.json", b"[\n1]", ":2: a JSON number where an object was expected"),
    ("one_number.json", b"[" + LINE.strip() + b",\n1]", ":2: a JSON number where an object was expected"),
    ("nested_array.json", b"[[" + LINE.strip() + b"]]", ":1: a JSON list where an object was expected"),
    ("scalar.json", b"17", ":1: the line holds a JSON number"),
    ("wrapped.json", b'{"data": [' + LINE.strip() + b"]}", ":1: the fields ('data') fit no known format"),
    (
        "field.json",
        b"[\n" + LINE.strip() + b',\n{"prompt": "p", "completion": 3, "label": 1}]',
        ":3: field 'completion'",
    ),
    # no table
    ("few.csv", HEADER + b"p,c,1\np,c\n", ":3: the number of cells"),
    ("many.csv", HEADER + b"p,c,1\np,c,1,x\n", ":3: the number of cells"),
    ("open_quote.csv", HEADER + b'p,c,1\n"p,c,1\np,c,1\n', ":3: no valid CSV"),
    ("after_quote.csv", HEADER + b'p,c,1\n\n"p"x,c,1\n', ":4: no valid CSV"),
    ("carriage_returns.csv", b"prompt,completion,label\rp,c,1\r", ":1: no valid CSV"),
    ("latin1.csv", HEADER + b"p,c,1\ncaf\xe9,c,1\n", ":3: the line is not UTF-8 text (byte 4)"),
    ("utf16.csv", HEADER.decode().encode("utf-16"), ":1: the line is not UTF-8 text"),
    ("no_label.csv", HEADER + b"p,c,\n", ":2: field 'label' must be true or false"),
    ("label.csv", HEADER + b"p,c,1\np,c,good\n", ":3: field 'label' must be true or false"),
    ("empty_cell.csv", HEADER + b"p,c,1\np,,1\n", ":3: field 'completion' is empty"),
    (
        "semicolons.csv",
        HEADER.replace(b",", b";") + b"p;c;1\n",
        ":2: the fields ('prompt;completion;label'; columns are",
    ),
    ("no_header.csv", b"why?,because,1\nhow?,so,1\n", ":2: the fields ('why?', 'because', '1') fit no"),
    ("commas.tsv", HEADER + b"p,c,1\n", ":2: the fields ('prompt,completion,label') fit no"),
    ("tools.csv", b"prompt,completion,label,tools\np,c,1,add\n", ":2: field 'tools' is a string that is no JSON"),
    ("turns.csv", b'conversations,kto_tag\n"[{""from"": ",1\n', ":2: field 'conversations' is a string that is no"),
    ("halves.csv", HEADER + b"p,c,1\n\xed\xa0\x80,c,1\n", ":3: the line is not UTF-8 text"),
    # fields
    ("no_field.jsonl", b"{}", ":1: the fields (none) fit no known format"),
    ("other_fields.jsonl", b'{"text": "t"}', ":1: the fields ('text') fit no known format"),
    ("no_prompt.jsonl", without("prompt"), ":2: field 'prompt' is missing"),
    ("no_completion.jsonl", without("completion"), ":2: field 'completion' is missing"),
    ("no_label.jsonl", without("label"), ":2: field 'label' is missing"),
    (
        "prompt_null.jsonl",
        second(prompt=None),
        ":2: field 'prompt' must be a string or a list of messages, not a null",
    ),
    ("prompt_number.jsonl", second(prompt=3), ":2: field 'prompt' must be a string or"),
    ("prompt_object.jsonl", second(prompt={"a": 1}), ":2: field 'prompt' must be a string or"),
    ("prompt_boolean.jsonl", second(prompt=True), ":2: field 'prompt' must be a string or"),
    ("prompt_empty.jsonl", second(prompt=[], completion=[ASSISTANT]), ":2: field 'prompt' is an empty list"),
    ("prompt_mixed.jsonl", second(prompt=[USER]), ":1: the prompt is a string, and in line 2 it is made of messages"),
    ("prompt_message.jsonl", second(prompt=USER), ":1: the prompt is a string, and in line 2 it is made of messages"),
    (
        "prompt_half.jsonl",
        second(prompt="a\ud800"),
        ":2: field 'prompt' holds half of a surrogate pair at character 2",
    ),
    ("completion_half.jsonl", second(completion="\udc00"), ":2: field 'completion' holds half of a surrogate pair"),
    ("completion_empty.jsonl", second(completion=""), ":2: field 'completion' is empty"),
    ("completion_number.jsonl", second(completion=1.5), ":2: field 'completion' must be a string or"),
    ("role.jsonl", second(prompt=[{"content": "q"}], completion=[ASSISTANT]), ":2: field 'prompt', message 1: 'role'"),
    ("user.jsonl", second(prompt=[USER], completion=[USER]), ":2: field 'completion' must hold exactly one message"),
    ("system.jsonl", second(system=3), ":2: field 'system' must be a string"),
    ("tools.jsonl", second(tools={"name": "add"}), ":2: field 'tools' must be a list of objects"),
    ("tools_numbers.jsonl", second(tools=[1, 2]), ":2: field 'tools' must be a list of objects"),
    ("kwargs.jsonl", second(chat_template_kwargs=[1]), ":2: field 'chat_template_kwargs' must be an object"),
    (
        "kwargs_taken.jsonl",
        second(chat_template_kwargs={"tokenize": 1}),
        ":2: field 'chat_template_kwargs' must not set",
    ),
    # labels
    ("label_null.jsonl", second(label=None), ":2: field 'label' must be true or false"),
    ("label_nan.jsonl", second(label=float("nan")), ":2: field 'label' must be true or false"),
    ("label_infinity.jsonl", second(label=float("-inf")), ":2: field 'label' must be true or false"),
    ("label_huge.jsonl", LINE + b'{"prompt": "p", "completion": "c", "label": 1e999}', ":2: field 'label' must be"),
    ("label_two.jsonl", second(label=2), ":2: field 'label' must be true or false"),
    ("label_rating.jsonl", second(label=4.5), ":2: field 'label' must be true or false"),
    ("label_word.jsonl", second(label="yes"), ":2: field 'label' must be true or false"),
    ("label_empty.jsonl", second(label=""), ":2: field 'label' must be true or false"),
    ("label_list.jsonl", second(label=[True]), ":2: field 'label' must be true or false"),
    ("label_half.jsonl", second(label="\ud83d"), ":2: field 'label' must be true or false"),
    (
        "label_nan.parquet",
        parquet({"prompt": ["p"] * 2, "completion": ["c"] * 2, "label": [1, float("nan")]}),
        ":2: field",
    ),
    (
        "bytes.parquet",
        parquet({"prompt": [b"p"], "completion": ["c"], "label": [1]}),
        ":1: field 'prompt' must be a string",
    ),
    (
        "nulls.parquet",
        parquet({"prompt": ["p", None], "completion": ["c"] * 2, "label": [1, 1]}),
        ":2: field 'prompt'",
    ),
    # formats of their own
    ("aligner.jsonl", one(prompt="p", response="r", preference="good"), ":1: field 'preference' must be true or"),
    ("turns.jsonl", one(conversations=TURNS[:1], kto_tag=True), ":1: field 'conversations' must hold at least two"),
    (
        "bot.jsonl",
        one(conversations=[{"from": "bot", "value": ""}, TURNS[1]], kto_tag=True),
        ":1: field 'conversations', message 1: 'from'",
    ),
    ("alpaca.jsonl", one(instruction=1, output="o", kto_tag=True), ":1: field 'instruction' must be a string"),
    ("history.jsonl", one(instruction="i", output="o", kto_tag=True, history=[["q"]]), ":1: field 'history' must be"),
    ("halos.json", b"[" + one(prompt=[USER], output=[], label=1) + b"]", ":1: field 'output' is an empty list"),
    ("pair.jsonl", one(chosen="a", rejected="b"), ":1: field 'chosen' and the rejected answer have no common"),
    ("half_pair.jsonl", one(prompt="p", chosen="a"), ":1: field 'rejected' is missing"),
    (
        "uneven_pair.jsonl",
        one(chosen="a", rejected=[USER]),
        ":1: field 'chosen' is a string and field 'rejected' a list",
    ),
    ("swift.jsonl", one(messages=[USER, USER], label=True), ":1: field 'messages' must end with the rated answer"),
    ("swift_string.jsonl", one(messages="q a", label=True), ":1: field 'messages' must be a list of messages"),
]


@pytest.mark.parametrize(("name", "data", "expected"), TABLE, ids=[name for name, _, _ in TABLE])
def test_malformed_file(tmp_path, name, data, expected):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_feedback([path])
    message = str(caught.value)
    assert f"{path}{expected}" in message
    message.encode()  # it can be printed


def test_table_repeats_no_name():
    assert len({name for name, _, _ in TABLE}) == len(TABLE)


@pytest.mark.parametrize(("name", "data"), [("a.jsonl.gz", GZIP), ("a.jsonl.zst", ZSTD), ("a.parquet", PARQUET)])
def test_cut_off_anywhere(tmp_path, name, data):
    path = tmp_path / name
    for length in range(0, len(data), max(1, len(data) // 97)):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=name):
            read_feedback([path])


@pytest.mark.parametrize(("name", "data"), [("a.jsonl.gz", GZIP), ("a.jsonl.zst", ZSTD), ("a.parquet", PARQUET)])
def test_any_wrong_byte_is_read_or_refused(tmp_path, name, data):
    # some bytes mean nothing, such as the time in gzip's header
    path, refused = tmp_path / name, 0
    for place in range(0, len(data), max(1, len(data) // 97)):
        path.write_bytes(overwritten(data, place, 1))
        try:
            read_feedback([path])
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 30
