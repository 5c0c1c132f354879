"""What names alone tell about a source: the errors of reading it, and nothing about what only reading tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_kto.data.reading import parts
from nemo_kto.data.reading.chunks import read_chunks
from nemo_kto.data.reading.parts import check_there, content_digest
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import Source, parse_source
from nemo_kto.errors import KTOError

ROW = json.dumps({"prompt": "p", "completion": " a", "label": True}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.jsonl").write_text(ROW)
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "notes.txt").write_text("no data")
    return tmp_path


def source(folder: Path, path: str, **keys: str) -> Source:
    return parse_source({"path": str(folder / path), **keys}, RowReader())


def error_of_reading(given: Source) -> KTOError:
    """Return what the token cache raises, which reads the bytes first and then the rows."""
    with pytest.raises(KTOError) as raised:
        content_digest(given)
        for _ in read_chunks(given, 10):
            pass
    return raised.value


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("none.jsonl", {}),
        ("none", {}),
        ("none.csv.gz", {}),
        ("*.csv", {}),
        ("**/*.parquet", {}),
        ("empty", {}),
        ("notes.txt", {}),
        ("full/a.jsonl", {"split": "train"}),
        ("none.jsonl", {"name": "default"}),
    ],
)
def test_the_error_is_that_of_reading(folder: Path, name: str, keys: dict[str, str]) -> None:
    given = source(folder, name, **keys)
    later = error_of_reading(given)
    with pytest.raises(type(later)) as raised:
        check_there(given)
    assert str(raised.value) == str(later)


def test_a_closed_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(top: Path, onerror: object, followlinks: bool) -> None:
        onerror(PermissionError(13, "Permission denied", str(top)))  # type: ignore[operator]

    monkeypatch.setattr(parts.os, "walk", closed)
    given = source(folder, "full")
    with pytest.raises(KTOError) as raised:
        check_there(given)
    assert str(raised.value) == str(error_of_reading(given))


@pytest.mark.parametrize("name", ["full", "full/a.jsonl", "full/*.jsonl", "broken.jsonl"])
def test_what_is_there_is_not_opened(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    given = source(folder, name)
    monkeypatch.setattr(Path, "open", refuse)
    check_there(given)


def test_data_sets_are_not_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that `datasets` saved nor what may be one of the hub."""
    (folder / "full" / "dataset_info.json").write_text("{}")
    monkeypatch.setattr(parts, "_saved_part", None)
    monkeypatch.setattr(parts, "_hub_part", None)
    check_there(source(folder, "full"))
    check_there(parse_source("somebody/feedback", RowReader()))
