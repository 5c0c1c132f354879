"""The same rows out of every kind of file, with the right line numbers."""

import codecs
import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from nemo_kto.data.reading import containers
from nemo_kto.data.reading.containers import Row, count_rows, data_suffix, is_data_file, read_rows
from nemo_kto.data.reading.data_sets import dataset_rows
from nemo_kto.data.reading.records import BadRecord
from nemo_kto.errors import DataError

ROWS = [
    {"prompt": "Grüße 😀", "completion": 'a "quoted", one\nwith two lines', "label": "true"},
    {"prompt": "tab\there", "completion": "line\u2028and\u2029paragraph\x0b\x0c\x1c\x85", "label": "false"},
    {"prompt": "", "completion": " spaces ", "label": "1"},
]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, ensure_ascii=False).encode()
PRETTY = json.dumps(ROWS, ensure_ascii=False, indent=2).encode()
# by hand: csv.writer would share what our reader believes of the format
TABLE = (
    "prompt,completion,label\n"
    'Grüße 😀,"a ""quoted"", one\nwith two lines",true\n'
    "tab\there,line\u2028and\u2029paragraph\x0b\x0c\x1c\x85,false\n"
    ", spaces ,1\n"
).encode()
TABBED = (
    "prompt\tcompletion\tlabel\n"
    'Grüße 😀\t"a ""quoted"", one\nwith two lines"\ttrue\n'
    '"tab\there"\tline\u2028and\u2029paragraph\x0b\x0c\x1c\x85\tfalse\n'
    "\t spaces \t1\n"
).encode()


def compressed(data: bytes, kind: str) -> bytes:
    if kind == ".gz":
        return gzip.compress(data)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(compressed(data, path.suffix) if path.suffix in (".gz", ".zst") else data)
    return path


def lines_and_values(path: Path) -> list[tuple[int, dict]]:
    rows = [*read_rows(path)]
    assert all(isinstance(row, Row) and row.source == str(path) for row in rows)
    return [(row.line, row.values) for row in rows]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "data", "lines"),
    [
        ("a.jsonl", JSON_LINES, [1, 2, 3]),
        ("a.ndjson", JSON_LINES, [1, 2, 3]),
        ("a.json", JSON_LINES, [1, 2, 3]),
        ("a.json", ARRAY, [1, 1, 1]),
        ("a.json", PRETTY, [2, 7, 12]),
        ("a.csv", TABLE, [2, 4, 5]),
        ("a.tsv", TABBED, [2, 4, 5]),
        ("A.JSONL", JSON_LINES, [1, 2, 3]),
        ("a.b.csv", TABLE, [2, 4, 5]),
    ],
)
def test_same_rows_from_every_text_file(tmp_path, name, data, lines, compression):
    expected = [*zip(lines, ROWS, strict=True)]
    assert lines_and_values(written(tmp_path, name + compression, data)) == expected
    assert lines_and_values(written(tmp_path, name + compression, codecs.BOM_UTF8 + data)) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_lines_that_end_with_crlf(tmp_path, name):
    rows = {
        "a.jsonl": b'{"a": "1", "b": "2"}\r\n\r\n{"a": "3", "b": "4"}\r\n',
        "a.json": b'[\r\n{"a": "1", "b": "2"},\r\n\r\n{"a": "3", "b": "4"}\r\n]\r\n',
        "a.csv": b"a,b\r\n1,2\r\n\r\n3,4\r\n",
        "a.tsv": b"a\tb\r\n1\t2\r\n\r\n3\t4\r\n",
    }
    first = 1 if name == "a.jsonl" else 2
    expected = [(first, {"a": "1", "b": "2"}), (first + 2, {"a": "3", "b": "4"})]
    assert lines_and_values(written(tmp_path, name, rows[name])) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_last_line_without_an_end(tmp_path, name):
    data = {"a.jsonl": b'{"a": "1"}\n{"a": "2"}', "a.csv": b"a\n1\n2"}[name]
    assert [values for _, values in lines_and_values(written(tmp_path, name, data))] == [{"a": "1"}, {"a": "2"}]


def test_blank_lines_keep_line_numbers_right(tmp_path):
    jsonl = written(tmp_path, "a.jsonl", b'\n{"a": "1"}\n \t\n\n{"a": "2"}\n\n')
    assert lines_and_values(jsonl) == [(2, {"a": "1"}), (5, {"a": "2"})]
    table = written(tmp_path, "a.csv", b"\na\n\n\n1\n\n2\n\n")
    assert lines_and_values(table) == [(5, {"a": "1"}), (7, {"a": "2"})]


def test_quoted_newlines_of_a_table_count_as_lines(tmp_path):
    path = written(tmp_path, "a.csv", b'a,b\n"1\n\n1",x\n2,"\n"\n3,x\n4\n')
    rows = [*read_rows(path)]
    assert [(row.line, row.values) for row in rows[:3]] == [
        (2, {"a": "1\n\n1", "b": "x"}),
        (5, {"a": "2", "b": "\n"}),
        (7, {"a": "3", "b": "x"}),
    ]
    assert isinstance(rows[3], BadRecord) and rows[3].line == 8


def test_cells_longer_than_the_csv_modules_own_limit(tmp_path):
    cell = "x" * 200_000
    assert lines_and_values(written(tmp_path, "a.csv", f"a\n{cell}\n".encode())) == [(2, {"a": cell})]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}], "label": i % 2 == 0, "score": None} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    assert lines_and_values(path) == [*enumerate(rows, start=1)]


def test_parquet_of_many_batches_and_a_dictionary_column(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "_ROWS_PER_BATCH", 3)
    path = tmp_path / "a.parquet"
    column = pyarrow.array([f"{i % 2}" for i in range(10)]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"label": column}), path)
    assert lines_and_values(path) == [(i + 1, {"label": f"{i % 2}"}) for i in range(10)]


def test_several_zstd_frames_in_a_row(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compressed(b'{"a": 1}\n', ".zst") + compressed(b'{"a": 2}\n', ".zst"))
    assert lines_and_values(path) == [(1, {"a": 1}), (2, {"a": 2})]


def test_several_gzip_members_in_a_row(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a"') + gzip.compress(b": 2}\n"))
    assert lines_and_values(path) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("shift", range(4))
def test_array_larger_than_what_is_read_at_once(tmp_path, indent, shift):
    # 4 bytes a character, so that over the four shifts every way to cut one in two happens
    rows = [{"a": "x" * shift + "😀" * 700, "i": i} for i in range(900)]
    data = json.dumps(rows, ensure_ascii=False, indent=indent).encode()
    assert len(data) > 2 * containers._CHUNK
    lines = [1] * len(rows) if indent is None else [2 + 4 * i for i in range(len(rows))]
    assert lines_and_values(written(tmp_path, "a.json", data)) == [*zip(lines, rows, strict=True)]


@pytest.mark.parametrize("window", range(1, 40))
def test_windows_that_end_anywhere(tmp_path, monkeypatch, window):
    monkeypatch.setattr(containers, "_CHUNK", window)
    expected = [(2, ROWS[0]), (7, ROWS[1]), (12, ROWS[2])]
    assert lines_and_values(written(tmp_path, "a.json", PRETTY)) == expected
    assert lines_and_values(written(tmp_path, "b.jsonl", JSON_LINES)) == [*enumerate(ROWS, start=1)]
    assert lines_and_values(written(tmp_path, "c.csv", TABLE)) == [*zip([2, 4, 5], ROWS, strict=True)]


@pytest.mark.parametrize("window", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        (b'[\n{"a": 1},\n{"a": x}\n\n\n]', 3, "no valid JSON"),
        (b'[\n{"a": 1},\n{"a": 1,\n"b": 2,\n}\n]\n\n', "4|5", "no valid JSON"),
        (b'[\n{"a": 1}\n\n{"a": 2}\n\n]', 4, "goes on without a comma"),
        (b'[\n{"a": 1},\n]\n\n', 3, "a comma before the array's end"),
        (b'[\n{"a": 1}\n', 3, "the array does not end"),
        (b'[\n{"a": 1}\n]\n\n{"a": 2}\n\n', 5, "something follows the array"),
        (b'[\n{"a": 1},\n{"b": "\xff"}\n\n]', 3, "not UTF-8"),
        (b'[\n{"a": 1},\n{"b":\n"' + "é".encode()[:1], 4, "not UTF-8"),
    ],
)
def test_line_of_what_is_wrong_with_an_array(tmp_path, monkeypatch, data, line, reason, window):
    path = written(tmp_path, "a.json", data)
    monkeypatch.setattr(containers, "_CHUNK", window)
    with pytest.raises(DataError, match=f"a.json:({line}): .*{reason}"):
        [*read_rows(path)]


def test_elements_that_are_no_objects_do_not_end_an_array(tmp_path):
    path = written(tmp_path, "a.json", b'[\n{"a": 1},\n3,\n[],\nnull, "x",\n{"a": 2}]')
    rows = [*read_rows(path)]
    assert [(row.line, type(row)) for row in rows] == [
        (2, Row),
        *[(line, BadRecord) for line in (3, 4, 5, 5)],
        (6, Row),
    ]
    assert [str(row).split("JSON ")[1].split()[0] for row in rows[1:5]] == ["number", "list", "null", "string"]


def test_bad_lines_do_not_end_a_file(tmp_path):
    path = written(tmp_path, "a.jsonl", b'{"a": 1}\n{"a":\n[1]\n\xff\n{"a": 2}\n')
    rows = [*read_rows(path)]
    assert [(row.line, type(row)) for row in rows] == [
        (1, Row),
        *[(line, BadRecord) for line in (2, 3, 4)],
        (5, Row),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(("depth", "kind"), [(99, Row), (101, BadRecord), (900, BadRecord)])
def test_rows_nested_too_deeply_for_another_process(tmp_path, name, depth, kind):
    # Python's pickle gives up at some 500, json only at some 1000: one such row would end the run
    row = b'{"a": ' + b"[" * depth + b"]" * depth + b"}"
    data = row if name == "a.jsonl" else b"[" + row + b"]"
    (found,) = read_rows(written(tmp_path, name, data))
    assert type(found) is kind and found.line == 1


def test_dataset_rows(monkeypatch):
    monkeypatch.setattr(containers, "_ROWS_PER_BATCH", 2)
    rows = [{"a": f"{i}", "m": [{"role": "user"}]} for i in range(5)]
    dataset = datasets.Dataset.from_list(rows)
    assert [*dataset_rows(dataset, "org/name")] == [Row("org/name", i + 1, row) for i, row in enumerate(rows)]
    # a data set may be set to give arrays, which are no JSON values
    (first, *_) = dataset_rows(dataset.with_format("numpy"), "org/name")
    assert type(first.values["a"]) is str and type(first.values["m"]) is list


@pytest.mark.parametrize(
    ("name", "suffix", "data"),
    [
        ("a.jsonl", ".jsonl", True),
        ("a.JSON.GZ", ".json", True),
        ("a.tar.csv.zst", ".csv", True),
        ("a.jsonl.bz2", ".bz2", False),
        ("a.gz", "", False),
        ("a", "", False),
        ("a.txt", ".txt", False),
        ("a.jsonl.bak", ".bak", False),
        (".a.jsonl", ".jsonl", False),
    ],
)
def test_names_of_data_files(name, suffix, data):
    assert data_suffix(Path("x.jsonl") / name) == suffix
    assert is_data_file(Path("x.jsonl") / name) is data


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.json.zst"])
def test_missing_file(tmp_path, name):
    with pytest.raises(DataError) as caught:
        [*read_rows(tmp_path / name)]
    assert str(caught.value) == f"{tmp_path / name}: no such file."


@pytest.mark.parametrize("name", ["a.txt", "a", "a.arrow", "a.jsonl.bz2", "a.xlsx"])
def test_files_of_other_kinds(tmp_path, name):
    with pytest.raises(DataError, match="of this kind are not read; expected one of .jsonl, .*.parquet"):
        [*read_rows(written(tmp_path, name, JSON_LINES))]


def test_two_columns_of_one_name(tmp_path):
    text = tmp_path / "a.csv"
    text.write_text("prompt,response,prompt\na,b,c\n")
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"]), table)
    for path in (text, table):
        with pytest.raises(DataError, match=r"two columns are called 'prompt'"):
            list(read_rows(path))


def test_cells_are_text_whatever_they_spell(tmp_path):
    """Whether strings are messages is told from all of a file's rows, not here."""
    path = tmp_path / "a.csv"
    cells = [json.dumps([{"role": "user", "content": "q"}]), json.dumps({"from": "gpt", "value": "a"}), "1"]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion", "label"], cells])
    assert [row.values for row in read_rows(path)] == [
        dict(zip(["prompt", "completion", "label"], cells, strict=True))
    ]


def test_nulls_that_tables_put_into_structs(tmp_path):
    """Arrow gives every struct the fields of all: what other calls have, this one has not."""
    rows = [{"calls": [{"arguments": {"a": 1}}], "x": None}, {"calls": [{"arguments": {"b": [2]}}], "x": 1}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.values for row in read_rows(tmp_path / "a.parquet")] == rows
    dataset = datasets.Dataset.from_list(rows)
    assert [row.values for row in dataset_rows(dataset, "d")] == rows


def test_a_json_file_of_one_object(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [{"prompt": "p"}]}, indent=2))
    with pytest.raises(DataError, match=r"one JSON object over several lines"):
        list(read_rows(path))


def test_rows_that_are_counted_without_reading_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n{}\n")
    assert count_rows(path) == 2
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert [count_rows(tmp_path / name) for name in ("a.parquet", "none.jsonl", "a.csv")] == [None] * 3
