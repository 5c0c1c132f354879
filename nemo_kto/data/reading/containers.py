"""Files that hold records -> rows, one at a time, so that memory does not grow with a file.

    .jsonl .ndjson .json .csv .tsv    also behind .gz or .zst
    .parquet

A `.json` file holds one array of objects, or is JSON Lines by another name. Text is UTF-8.
"""

import codecs
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from nemo_kto.data.reading.json_array import array_elements
from nemo_kto.data.reading.records import MAX_NESTING, BadRecord, json_type
from nemo_kto.errors import DataError, git_lfs_hint

_COMPRESSIONS = (".gz", ".zst")
_ABOUT_DATASETS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_CHUNK = 1 << 20
_ROWS_PER_BATCH = 1024
_MOST_BYTES = 64 << 20
"""Of what is read of a table at once."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Attributes:
        source: The file it was read from.
        line: See `FeedbackRecord`.
        values: Field -> value.
    """

    source: str
    line: int
    values: dict[str, Any]


Rows = Iterator[Row | BadRecord]


def read_rows(path: Path) -> Rows:
    """Yields a file's rows in order, and those that cannot be read as `BadRecord`.

    Raises:
        DataError: The file is missing, damaged, of an unknown kind, or what is wrong leaves the rest unreadable.
    """
    check_kind(path)
    hint = git_lfs_hint(path)
    if hint:
        raise DataError(f"{path}: this is not the file itself.{hint}")
    try:
        yield from _READERS[data_suffix(path)](path)
    except FileNotFoundError:
        raise no_such_file(path) from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"{path}: the file cannot be read ({reason}).") from error


def check_kind(path: Path) -> None:
    """Raises a DataError for a file whose name does not say how it is read, or that is none; it need not be there."""
    check_file(path)
    if data_suffix(path) in _READERS:
        return
    if not path.exists():
        raise DataError(f"{path}: no such file or folder.")
    raise DataError(f"{path}: files of this kind are not read; expected one of {', '.join(_READERS)}.")


def check_file(path: Path) -> None:
    """Raises a DataError for what would be waited for, or never ends; it need not be there."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path}: a pipe or a device, and data is read more than once; write it to a file.")


def no_such_file(path: Path) -> DataError:
    """The error for a file that is not there."""
    return DataError(f"{path}: no such file.")


def count_rows(path: Path) -> int | None:
    """Returns about how many rows a file has, for a progress bar; None where only reading it would tell."""
    try:
        if path.suffix.lower() == ".parquet":
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            with path.open("rb") as handle:
                return sum(chunk.count(b"\n") for chunk in _chunks(handle))
    except (OSError, pyarrow.ArrowException):
        return None  # whoever reads it says what is wrong
    return None


def data_suffix(path: Path) -> str:
    """The ending that says how a file is read, without that of its compression: "" for a name without one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_data_file(path: Path) -> bool:
    """Whether the name is that of a file with records."""
    return data_suffix(path) in _READERS and not path.name.startswith(".") and path.name not in _ABOUT_DATASETS


def rows_at_once(size: int, rows: int) -> int:
    """Returns how many rows of a table are few enough to be in memory, images in them or not."""
    return max(1, min(_ROWS_PER_BATCH, _MOST_BYTES * rows // max(size, 1)))


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row without the nulls in its structs, which stand for what other rows have and this one has not."""
    return {name: _compact(value) for name, value in row.items()}


def _compact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _compact(inner) for key, inner in value.items() if inner is not None}
    return [_compact(inner) for inner in value] if isinstance(value, list) else value


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path)  # type: ignore[return-value]  # it has all that is used of IO[bytes]
    if path.suffix.lower() == ".zst":
        with path.open("rb"):
            pass  # for Python's own errors about missing files
        return pyarrow.input_stream(str(path), compression="zstd")  # type: ignore[no-any-return]
    return path.open("rb")


def _chunks(handle: IO[bytes]) -> Iterator[bytes]:
    while chunk := handle.read(_CHUNK):
        yield chunk


def _lines(handle: IO[bytes]) -> Iterator[bytes]:
    """Lines end at a newline byte only, so line numbers agree with any editor's."""
    pieces: list[bytes] = []
    for chunk in _chunks(handle):
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        for line in others:
            yield b"".join(pieces)
            pieces = [line]
    yield b"".join(pieces)


def _json_lines(path: Path) -> Rows:
    with _open(path) as handle:
        for number, raw in enumerate(_lines(handle), start=1):
            if raw.strip():
                yield _parse_line(raw, str(path), number)


def _parse_line(raw: bytes, source: str, number: int) -> Row | BadRecord:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRecord(source, number, None, f"the line is not UTF-8 text (byte {error.start + 1}).")
    except json.JSONDecodeError as error:
        reason = (
            f"the line is not valid JSON ({error.msg}, column {error.colno}); "
            "the file must be JSON Lines, one whole object per line."
        )
        return BadRecord(source, number, None, reason)
    except ValueError as error:  # an integer of thousands of digits
        return BadRecord(source, number, None, f"the line's JSON cannot be read ({error}).")
    except RecursionError:
        return BadRecord(source, number, None, "the line's JSON is nested too deeply.")
    if not isinstance(row, dict):
        reason = f"the line holds a JSON {json_type(row)}; the file must be JSON Lines, one object per line."
        return BadRecord(source, number, None, reason)
    return _row(source, number, row)


def _row(source: str, number: int, values: dict[str, Any]) -> Row | BadRecord:
    """The row, unless it is nested more deeply than can be sent to another process."""
    level: list[Any] = [values]
    for _ in range(MAX_NESTING):
        nested = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = [inner for outer in nested for inner in outer if isinstance(inner, dict | list)]
        if not level:
            return Row(source, number, values)
    return BadRecord(source, number, None, "the JSON is nested too deeply.")


def _json(path: Path) -> Rows:
    with _open(path) as handle:
        start = handle.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    if start.startswith(b"["):
        with _open(path) as handle:
            for line, value in array_elements(_chunks(handle), str(path)):
                if isinstance(value, dict):
                    yield _row(str(path), line, value)
                else:
                    reason = f"a JSON {json_type(value)} where an object was expected."
                    yield BadRecord(str(path), line, None, reason)
        return
    first_line, newline, _ = start.partition(b"\n")
    if newline and start.startswith(b"{") and not first_line.rstrip().endswith(b"}"):
        raise DataError(
            f"{path}: the file holds one JSON object over several lines; it must hold an array of objects, or one "
            "whole object per line."
        )
    yield from _json_lines(path)


def _csv(path: Path, delimiter: str) -> Rows:
    csv.field_size_limit(sys.maxsize)  # answers are longer than its 128 KiB
    with _open(path) as handle:
        reader = csv.reader(_text_lines(path, handle), delimiter=delimiter, strict=True)
        header: list[str] = []
        last = 0
        try:
            for cells in reader:
                line, last = last + 1, reader.line_num
                if header and cells:
                    yield _csv_row(header, cells, str(path), line)
                if not header:
                    header = _checked_header(cells, path)
        except csv.Error as error:
            raise DataError(f"{path}:{last + 1}: no valid CSV ({error}).") from error


def _checked_header(names: list[str], path: Path) -> list[str]:
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise DataError(f"{path}: two columns are called {twice!r}.")
    return names


def _csv_row(header: list[str], cells: list[str], source: str, line: int) -> Row | BadRecord:
    if len(cells) != len(header):
        return BadRecord(source, line, None, "the number of cells is not that of the header.")
    return Row(source, line, dict(zip(header, cells, strict=True)))


def _text_lines(path: Path, handle: IO[bytes]) -> Iterator[str]:
    for number, raw in enumerate(_lines(handle), start=1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8") + "\n"
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: the line is not UTF-8 text (byte {error.start + 1}).") from error


def _parquet(path: Path) -> Rows:
    number = 0
    with path.open("rb") as handle, pyarrow.parquet.ParquetFile(handle) as file:
        _checked_header(file.schema_arrow.names, path)
        size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
        for batch in file.iter_batches(rows_at_once(size, file.metadata.num_rows)):
            for values in batch.to_pylist():
                number += 1
                yield Row(str(path), number, without_nulls(values))


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_csv, delimiter=","),
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
}
