"""What a user names as data: which files that means, how they are read, and the errors for all of it."""

import json
import math
import os
import shutil
from pathlib import Path

import datasets
import pytest

from nemo_kto.data.reading import parts
from nemo_kto.data.reading.chunks import bad_records_error, parse_chunk, read_chunks, read_feedback
from nemo_kto.data.reading.parts import content_digest
from nemo_kto.data.reading.records import BadRecord, FeedbackRecord
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import Source, parse_source
from nemo_kto.errors import ConfigError, DataError

ALIGNER_ROW = {"prompt": "p", "response": "r", "preference": "chosen"}
TRL_ROW = {"prompt": "p", "completion": "c", "label": False}


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()


def row(response: str) -> dict[str, str]:
    return {**ALIGNER_ROW, "response": response}


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def responses(*paths: str | Path) -> list[str]:
    return [record.response for record in read_feedback(paths)]


def error_of(*paths: str | Path, **how) -> str:
    with pytest.raises(DataError) as caught:
        read_feedback(paths, **how)
    return str(caught.value)


# Files, folders, patterns


def test_files_in_the_order_given(tmp_path):
    b, a = write(tmp_path / "b.jsonl", row("1"), row("2")), write(tmp_path / "a.jsonl", row("3"))
    assert responses(b, str(a)) == ["1", "2", "3"]
    assert [record.place for record in read_feedback([b, a])] == [f"{b}:1", f"{b}:2", f"{a}:1"]


def test_format_is_found_for_each_file(tmp_path):
    aligner, trl = write(tmp_path / "d" / "a.jsonl", ALIGNER_ROW), write(tmp_path / "d" / "b.jsonl", TRL_ROW)
    assert read_feedback([tmp_path / "d"]) == [
        FeedbackRecord("p", "r", True, str(aligner), 1),
        FeedbackRecord("p", "c", False, str(trl), 1),
    ]


def test_first_row_that_can_be_read_decides_for_its_file(tmp_path):
    path = write(tmp_path / "a.jsonl", ALIGNER_ROW, TRL_ROW)
    assert error_of(path).startswith(f"{path}:2: field 'response' is missing.")
    path.write_text("{\n" + json.dumps(TRL_ROW) + "\n")
    ((reader, *_),) = read_chunks(Source(str(path)), 10)
    assert reader.settled.format == "trl"


def test_rows_are_read_as_told(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "p", "completion": "c", "stars": 5})
    (record,) = read_feedback([path], format="trl", fields={"prompt": "q", "label": "stars"}, desirable_if="> 4")
    assert record == FeedbackRecord("p", "c", True, str(path), 1)


def test_folder_is_read_with_its_subfolders_in_sorted_order(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", "a/y.ndjson", "c.JSONL", "a/b/x.jsonl"):
        write(tmp_path / name, row(name))
    assert responses(tmp_path) == ["a/b/x.jsonl", "a/y.ndjson", "a/z.jsonl", "b.jsonl", "c.JSONL"]


@pytest.mark.parametrize(
    "other", ["README.md", "a.txt", "a.jsonl.bak", ".hidden.jsonl", ".cache/a.jsonl", "x/.git/b/a.jsonl", "a.jsonl~"]
)
def test_folder_may_hold_other_files(tmp_path, other):
    folder = tmp_path / ".data"  # what is above the folder does not count
    write(folder / "a.jsonl", row("mine"))
    write(folder / other, row("other"))
    assert responses(folder) == ["mine"]


def test_folder_of_folders_named_like_files(tmp_path):
    write(tmp_path / "d" / "a.jsonl" / "b.jsonl", row("1"))
    assert responses(tmp_path / "d") == ["1"]


def test_patterns(tmp_path):
    for name in ("b1.jsonl", "a1.jsonl", "a2.jsonl", "d/a3.jsonl", "d/e/a4.jsonl", "a5.txt"):
        write(tmp_path / name, row(name))
    (tmp_path / "a6.jsonl").mkdir()
    assert responses(f"{tmp_path}/a*.jsonl") == ["a1.jsonl", "a2.jsonl"]
    assert responses(f"{tmp_path}/[ab]1.jsonl") == ["a1.jsonl", "b1.jsonl"]
    assert responses(f"{tmp_path}/?2.jsonl") == ["a2.jsonl"]
    assert responses(f"{tmp_path}/**/a*.jsonl") == ["a1.jsonl", "a2.jsonl", "d/a3.jsonl", "d/e/a4.jsonl"]


def test_file_whose_name_looks_like_a_pattern(tmp_path):
    write(tmp_path / "a1.jsonl", row("other"))
    assert responses(write(tmp_path / "a[1].jsonl", row("mine"))) == ["mine"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none.jsonl", "none.jsonl: no such file."),
        ("none/of/them", "none/of/them: no such file or folder."),
        ("a.txt", "a.txt: files of this kind are not read"),
        ("*.csv", "*.csv: no file has a name like this."),
        ("only*", "only*: no file has a name like this."),
        ("only_folders", "only_folders: the folder holds no data file"),
        ("empty.jsonl", "empty.jsonl: the file holds no record."),
        ("blank.jsonl", "blank.jsonl: the file holds no record."),
    ],
)
def test_nothing_to_read(tmp_path, name, expected):
    (tmp_path / "only_folders" / "sub").mkdir(parents=True)
    for file, text in (("a.txt", "a"), ("empty.jsonl", ""), ("blank.jsonl", "\n \n")):
        (tmp_path / file).write_text(text)
    assert error_of(f"{tmp_path}/{name}").startswith(f"{tmp_path}/{expected}")


def test_no_data_at_all():
    assert "name at least one" in error_of()


def test_empty_file_among_others_is_named(tmp_path):
    write(tmp_path / "a.jsonl", ALIGNER_ROW)
    assert (
        error_of(tmp_path / "a.jsonl", write(tmp_path / "b.jsonl")) == f"{tmp_path}/b.jsonl: the file holds no record."
    )


def test_impossible_reader_is_found_before_any_file(tmp_path):
    with pytest.raises(ConfigError, match="'csv'"):
        read_feedback([tmp_path / "none.jsonl"], format="csv")


# Chunks and bad records


def test_chunks(tmp_path):
    path = write(tmp_path / "a.jsonl", *[row(f"{i}") for i in range(5)])
    chunks = [*read_chunks(Source(str(path)), 2)]
    assert [len(chunk.rows) for chunk in chunks] == [2, 2, 1]
    assert [record.response for chunk in chunks for record in parse_chunk(chunk)] == ["0", "1", "2", "3", "4"]


def test_chunk_with_bad_records_keeps_their_order(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["{", json.dumps(row("1")), json.dumps({"prompt": "p"}), json.dumps(row("2"))]))
    (chunk,) = read_chunks(Source(str(path)), 10)
    found = [*parse_chunk(chunk)]
    assert [(record.line, type(record)) for record in found] == [
        (1, BadRecord),
        (2, FeedbackRecord),
        (3, BadRecord),
        (4, FeedbackRecord),
    ]
    assert found[2].field == "response" and found[2].reason.startswith("is missing.")


def test_one_bad_record(tmp_path):
    path = write(tmp_path / "a.jsonl", ALIGNER_ROW, {**ALIGNER_ROW, "response": 3})
    message = error_of(path)
    assert message.startswith(f"{path}:2: field 'response' must be a string") and "on_bad_record=skip" in message


@pytest.mark.parametrize(
    ("count", "start"), [(2, "2 records"), (10, "10 records"), (11, "More than 10"), (12, "More than 10")]
)
def test_first_ten_bad_records_are_listed(tmp_path, count, start):
    good = [ALIGNER_ROW] * 3
    path = write(tmp_path / "a.jsonl", *good, *[row("")] * (count - 1), *good, {"prompt": "last"}, *good)
    message = error_of(path)
    listed = message.splitlines()[1:-1]
    lines = [*range(4, 3 + count), 6 + count][:10]
    assert message.startswith(start) and "on_bad_record=skip" in message.splitlines()[-1]
    assert [line.split(": field")[0].strip() for line in listed] == [f"{path}:{line}" for line in lines]


def test_bad_records_of_several_files_are_listed_together(tmp_path):
    files = [write(tmp_path / name, ALIGNER_ROW, row("")) for name in ("a.jsonl", "b.jsonl")]
    message = error_of(tmp_path)
    assert message.startswith("2 records") and all(
        f"\n  {file}:2: field 'response' is empty" in message for file in files
    )


def test_error_for_more_bad_records_than_are_shown():
    bad = [BadRecord("f", line, None, "it is bad.") for line in range(1, 12)]
    message = str(bad_records_error(bad))
    assert "f:10: it is bad." in message and "f:11:" not in message and message.startswith("More than 10 records")


# Saved data sets and those of the hub


def save(folder: Path, **splits: list[dict]) -> Path:
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


def of_split(path: Path | str, split: str | None = None) -> list[str]:
    chunks = read_chunks(Source(str(path), split=split), 10)
    return [record.response for chunk in chunks for record in parse_chunk(chunk)]


def test_saved_dataset(tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([row("1"), row("2")]).save_to_disk(str(folder))
    assert [(record.response, record.place) for record in read_feedback([folder])] == [
        ("1", f"{folder}:1"),
        ("2", f"{folder}:2"),
    ]


@pytest.mark.parametrize(
    ("splits", "wanted", "expected"),
    [
        (["train", "test"], None, "train"),
        (["test", "train"], None, "train"),
        (["train", "test"], "test", "test"),
        (["test"], None, "test"),  # the only one there is
    ],
)
def test_split_of_a_saved_dataset_dict(tmp_path, splits, wanted, expected):
    folder = save(tmp_path / "saved", **{name: [row(name)] for name in splits})
    assert of_split(folder, wanted) == [expected]


@pytest.mark.parametrize(
    ("splits", "wanted", "missing"),
    [(["train", "test"], "dev", "dev"), (["test"], "train", "train"), (["test", "dev"], None, "train")],
)
def test_split_that_is_not_there(tmp_path, splits, wanted, missing):
    folder = save(tmp_path / "saved", **{name: [row(name)] for name in splits})
    with pytest.raises(DataError, match=f"{folder}: there is no split '{missing}'.*{', '.join(splits)}"):
        of_split(folder, wanted)


def test_saved_dataset_without_rows(tmp_path):
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(str(tmp_path / "saved"))
    assert error_of(tmp_path / "saved").startswith(f"{tmp_path}/saved: ")


@pytest.mark.parametrize(
    ("damaged", "content"),
    [
        ("state.json", None),
        ("state.json", b""),
        ("state.json", b"{"),
        ("dataset_info.json", b""),
        ("dataset_info.json", b"{"),
        ("data-00000-of-00001.arrow", None),
        ("data-00000-of-00001.arrow", b""),
        ("data-00000-of-00001.arrow", b"{"),
    ],
)
def test_damaged_saved_dataset(tmp_path, damaged, content):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([ALIGNER_ROW]).save_to_disk(str(folder))
    (folder / damaged).unlink()
    if content is not None:
        (folder / damaged).write_bytes(content)
    assert error_of(folder).startswith(f"{folder}: ")


@pytest.fixture(autouse=True)
def nothing_loaded():
    """What one test loads from its hub is not there for the next."""
    parts._load_dataset.cache_clear()


def test_hub(monkeypatch):
    asked = []

    def load_dataset(path, name=None):
        asked.append((path, name))
        return datasets.DatasetDict({split: datasets.Dataset.from_list([row(split)]) for split in ("train", "test")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (record,) = read_feedback(["org/data"])
    assert record == FeedbackRecord("p", "train", True, "org/data", 1)
    assert of_split("org/data", "test") == ["test"]
    with pytest.raises(DataError, match="org/data: there is no split 'dev'.* train, test"):
        of_split("org/data", "dev")
    assert len(content_digest(Source("org/data", name="small"))) == 32
    assert asked == [("org/data", None), ("org/data", "small")]  # once each, however often they are looked at
    assert len(read_feedback(["org/data-2.5"])) == 1  # a dot makes no file of it


def test_hub_data_set_with_other_rows_has_another_digest(monkeypatch):
    def load_dataset(path, name=None):
        return datasets.DatasetDict({"train": datasets.Dataset.from_list([row(path)])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert content_digest(Source("org/data")) == content_digest(Source("org/data"))
    assert content_digest(Source("org/data")) != content_digest(Source("us/data"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("no network\nsecond line"), "(ConnectionError: no network)"),
        (FileNotFoundError(), "(FileNotFoundError: no message)"),
        (RuntimeError("\n"), "(RuntimeError: "),
    ],
)
def test_hub_that_fails(monkeypatch, error, expected):
    def load_dataset(path, name=None):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error_of("org/data")
    assert message.startswith("org/data: no such file or folder, and no data set of that name") and expected in message


@pytest.mark.parametrize(
    "path", ["data.jsonl", "dir/data.jsonl", "./data", "../data", "~/data", "/a/b", "a/b/c", "data"]
)
def test_paths_are_not_looked_up_on_the_hub(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("asked the hub"))
    assert error_of(path).startswith(f"{Path(path)}: ")


# Entries


@pytest.mark.parametrize("entry", ["a.jsonl", Path("a.jsonl"), {"path": "a.jsonl"}])
def test_entry_that_is_a_path(entry):
    assert parse_source(entry, RowReader("trl")) == Source("a.jsonl", reader=RowReader("trl"))


def test_entry_with_everything():
    entry = {
        "path": "org/data",
        "weight": 2,
        "max_records": 10,
        "split": "test",
        "name": "small",
        "format": "trl",
        "fields": {"prompt": "q"},
        "desirable_if": ">= 4",
    }
    expected = Source("org/data", 2, 10, "test", "small", RowReader("trl", {"prompt": "q"}, ">= 4"))
    assert parse_source(entry, RowReader("halos", {"label": "x"}, "< 1")) == expected


def test_entry_goes_before_the_settings_for_all():
    reader = RowReader("trl", {"prompt": "q"}, ">= 4")
    assert parse_source({"path": "a", "fields": {}}, reader).reader == RowReader("trl", {}, ">= 4")
    assert parse_source({"path": "a", "format": "auto"}, reader).reader == RowReader("auto", {"prompt": "q"}, ">= 4")


def test_what_labels_mean_is_said_in_one_way_for_an_entry():
    """Words of an entry go before a threshold for all, and the other way round."""
    words = {"desirable": ["good"], "undesirable": ["bad"]}
    chosen = parse_source(
        {"path": "a", "labels": words, "json_strings": "text"}, RowReader(desirable_if=">= 4", chat=True)
    )
    assert chosen.reader == RowReader(labels={"good": True, "bad": False}, json_strings="text", chat=True)
    chosen = parse_source({"path": "a", "desirable_if": ">= 4"}, RowReader(labels={"good": True}))
    assert chosen.reader == RowReader(desirable_if=">= 4")
    assert parse_source({"path": "a", "labels": None}, RowReader(labels={"good": True})).reader == RowReader()
    with pytest.raises(ConfigError, match="one of the two"):
        parse_source({"path": "a", "labels": words, "desirable_if": ">= 4"}, RowReader())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": ["good"]}, "labels=['good'] must be a object or null."),
        ({"labels": {"good": ["x"]}}, "must be the words of both kinds"),
        ({"json_strings": "json"}, "json_strings='json' must be auto or messages or text."),
        ({"paths": "b"}, "'paths' is unknown; use path, weight"),
        ({1: "b"}, "1 is unknown"),
        ({"path": 3}, "path=3 must be a string."),
        ({"path": None}, "path=None must be a string."),
        ({"path": ["a"]}, "must be a string."),
        ({"weight": "2"}, "weight='2' must be a number."),
        ({"weight": True}, "weight=True must be a number."),
        ({"weight": 0}, "weight=0 must be above 0."),
        ({"weight": -0.5}, "weight=-0.5 must be above 0."),
        ({"weight": math.nan}, "weight=nan must be above 0."),
        ({"weight": math.inf}, "weight=inf must be above 0."),
        ({"max_records": 1.5}, "max_records=1.5 must be a whole number."),
        ({"max_records": 0}, "max_records=0 must be above 0."),
        ({"max_records": -1}, "max_records=-1 must be above 0."),
        ({"max_records": False}, "max_records=False must be a whole number."),
        ({"split": 0}, "split=0 must be a string."),
        ({"name": ["a"]}, "must be a string."),
        ({"format": None}, "format=None must be a string."),
        ({"format": "csv"}, "'csv'"),
        ({"fields": "prompt"}, "fields='prompt' must be a object."),
        ({"fields": {"question": "q"}}, "'question'"),
        ({"fields": {"prompt": None}}, "prompt=None must be the name of a column"),
        ({"desirable_if": 4}, "desirable_if=4 must be a string or null."),
        ({"desirable_if": "4"}, "'4' must be a comparison"),
    ],
)
def test_refused_entries(change, expected):
    with pytest.raises(ConfigError) as caught:
        parse_source({"path": "a", **change}, RowReader())
    assert expected in str(caught.value)


def test_entry_without_path():
    with pytest.raises(ConfigError, match="'path' is missing"):
        parse_source({"weight": 2}, RowReader())


def test_impossible_settings_for_all():
    with pytest.raises(ConfigError, match="'csv'"):
        parse_source("a.jsonl", RowReader("csv"))


# Digest of what is in the files


def digest(path: Path | str) -> str:
    return content_digest(Source(str(path)))


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "data" / "a.jsonl", row("1"))
    write(tmp_path / "data" / "sub" / "b.jsonl", row("2"))
    return tmp_path / "data"


def test_digest_does_not_change_with_the_place(folder, tmp_path):
    before = digest(folder)
    moved = tmp_path / "another" / "much longer name"
    shutil.copytree(folder, moved)
    assert digest(folder) == digest(moved) == before
    assert digest(folder / "a.jsonl") == digest(moved / "a.jsonl")


def test_digest_changes_with_every_byte(folder):
    file = folder / "sub" / "b.jsonl"
    data = file.read_bytes()
    seen = {digest(folder)}
    for i in range(len(data)):
        file.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        seen.add(digest(folder))
    assert len(seen) == len(data) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a.jsonl").rename(folder / "c.jsonl"),
        lambda folder: (folder / "a.jsonl").unlink(),
        lambda folder: shutil.copy(folder / "a.jsonl", folder / "c.jsonl"),
        lambda folder: (folder / "a.jsonl").write_bytes((folder / "a.jsonl").read_bytes() + b"\n"),
    ],
    ids=["renamed", "removed", "added", "longer"],
)
def test_digest_changes_with_the_files(folder, change):
    before = digest(folder)
    change(folder)
    assert digest(folder) != before


def test_digest_sees_no_files_that_are_not_read(folder):
    before = digest(folder)
    (folder / "README.md").write_text("new")
    assert digest(folder) == before


def test_digest_of_a_large_file_sees_its_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 3_000_000)
    before = digest(path)
    path.write_bytes(b"x" * 2_999_999 + b"y")
    assert digest(path) != before


def test_digest_of_a_saved_dataset(tmp_path):
    first, second = (save(tmp_path / name / "saved", train=[row(name)]) for name in ("1", "2"))
    assert digest(first) == digest(first) != digest(second)


def test_digest_of_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        digest(tmp_path / "none.jsonl")


def test_split_and_name_are_for_data_sets(write_jsonl, tmp_path):
    path = write_jsonl({"prompt": "p", "response": "r", "preference": "chosen"})
    for key in ("split", "name"):
        with pytest.raises(ConfigError, match=f"{key}=x is for data sets"):
            list(read_chunks(Source(str(path), **{key: "x"}), 10))
    datasets.Dataset.from_list([{"prompt": "p", "response": "r", "preference": "chosen"}]).save_to_disk(
        tmp_path / "saved"
    )
    with pytest.raises(DataError, match="no splits; leave split=x out"):
        list(read_chunks(Source(str(tmp_path / "saved"), split="x"), 10))


def test_files_about_data_sets_are_no_data(tmp_path):
    for name in ("dataset_infos.json", "state.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match="holds no data file"):
        list(read_chunks(Source(str(tmp_path)), 10))


def test_folders_are_followed_through_links(tmp_path):
    line = json.dumps({"prompt": "p", "response": "r", "preference": "chosen"}) + "\n"
    (tmp_path / "real").mkdir()
    (tmp_path / "top" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "b.jsonl").write_text(line)
    (tmp_path / "top" / "a.jsonl").write_text(line)
    (tmp_path / "top" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "top" / "sub" / "back").symlink_to(tmp_path / "top")
    found = [Path(record.source).name for record in read_feedback([tmp_path / "top"])]
    assert found == ["a.jsonl", "b.jsonl"]


def test_a_closed_folder_is_an_error(tmp_path, monkeypatch):
    """Root may open any folder, so the system's answer is made up here."""

    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied"):
        list(read_chunks(Source(str(tmp_path)), 10))
    with pytest.raises(DataError, match=r"cannot be read \(File name too long"):
        list(read_chunks(Source("x" * 300), 10))
