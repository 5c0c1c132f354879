"""Files that hold records -> rows, one at a time, so that memory does not grow with a file.

    .jsonl .ndjson .json .csv .tsv    also behind .gz or .zst
    .parquet
    a folder that `datasets` saved

A `.json` file holds one array of objects, or is JSON Lines by another name. Text is UTF-8.
"""

import codecs
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from nemo_kto.data.records import MAX_NESTING, BadRecord, json_type
from nemo_kto.errors import DataError

_COMPRESSIONS = (".gz", ".zst")
_ABOUT_DATASETS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_CHUNK = 1 << 20
_ROWS_PER_BATCH = 1024


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
    reader = _READERS.get(data_suffix(path))
    if reader is None and not path.exists():
        raise DataError(f"{path}: no such file or folder.")
    if reader is None:
        raise DataError(f"{path}: files of this kind are not read; expected one of {', '.join(_READERS)}.")
    try:
        yield from reader(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"{path}: the file cannot be read ({reason}).") from error


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


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` saved this folder (`save_to_disk`)."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def dataset_rows(dataset: Any, source: str) -> Rows:
    """Yields the rows of a `datasets.Dataset`, numbered from 1."""
    number = 0
    for batch in dataset.with_format(None).iter(_ROWS_PER_BATCH):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield Row(source, number, _without_nulls(dict(zip(names, values, strict=True))))


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without the nulls in its structs, which stand for what other rows have and this one has not."""
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
    rest = b""
    for chunk in _chunks(handle):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    yield rest


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
        yield from _json_array(path)
        return
    first_line, newline, _ = start.partition(b"\n")
    if newline and start.startswith(b"{") and not first_line.rstrip().endswith(b"}"):
        raise DataError(
            f"{path}: the file holds one JSON object over several lines; it must hold an array of objects, or one "
            "whole object per line."
        )
    yield from _json_lines(path)


_SPACE = re.compile(r"[ \t\r\n]*")


class _Text:
    """The text of a file of which only a part is in memory: a window that is moved on as it is read."""

    def __init__(self, path: Path, handle: IO[bytes]) -> None:
        self._path = path
        self._decoded = codecs.iterdecode(_chunks(handle), "utf-8-sig")
        self._window = ""
        self._place = 0
        self.line = 1

    def error(self, reason: str) -> DataError:
        return DataError(f"{self._path}:{self.line}: {reason}; the file must be one JSON array of objects.")

    def next_character(self) -> str:
        """The next one that is no space, "" at the end; it is not taken."""
        while True:
            end = _SPACE.match(self._window, self._place).end()  # type: ignore[union-attr]  # it matches nothing, too
            self._move(end)
            if end < len(self._window) or not self._read():
                return self._window[end : end + 1]

    def take(self, length: int = 1) -> None:
        self._move(self._place + length)

    def take_value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._place)
            except json.JSONDecodeError as error:
                position = error.pos - self._place
                if not self._read():
                    self._move(position)
                    raise self.error(f"no valid JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise self.error(f"the JSON cannot be read ({error})") from error
            else:
                self._move(end)
                return value

    def _move(self, place: int) -> None:
        self.line += self._window.count("\n", self._place, place)
        self._place = place

    def _read(self) -> bool:
        """Appends to the window, at least as much as is left in it; False at the end of the file."""
        self._window, self._place = self._window[self._place :], 0
        wanted = 2 * len(self._window)
        more = False
        try:
            while len(self._window) <= wanted and (text := next(self._decoded, "")):
                self._window += text
                more = True
        except UnicodeDecodeError as error:
            self.line += self._window.count("\n") + error.object.count(b"\n", 0, error.start)
            raise self.error(f"the text is not UTF-8 ({error.reason})") from error
        return more


_DECODER = json.JSONDecoder()


def _json_array(path: Path) -> Rows:
    with _open(path) as handle:
        text = _Text(path, handle)
        assert text.next_character() == "[", path
        text.take()
        while (character := text.next_character()) != "]":
            line = text.line
            value = text.take_value()
            if isinstance(value, dict):
                yield _row(str(path), line, value)
            else:
                yield BadRecord(str(path), line, None, f"a JSON {json_type(value)} where an object was expected.")
            character = text.next_character()
            if character == ",":
                text.take()
                character = text.next_character()
                if character == "]":
                    raise text.error("a comma before the array's end")
            elif character != "]":
                raise text.error("the array goes on without a comma" if character else "the array does not end")
        text.take()
        if text.next_character():
            raise text.error("something follows the array")


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
    values = dict(zip(header, cells, strict=True))
    for name, cell in values.items():
        if re.match(r"\[?\{'(role|from|content|value)':", cell):
            reason = "holds messages as Python writes them; a cell must hold them as JSON (json.dumps)."
            return BadRecord(source, line, name, reason)
    messages = {name: value for name, cell in values.items() if (value := _messages(cell)) is not None}
    # a single one may be what somebody wrote; a prompt made of messages comes with an answer made of them
    return Row(source, line, values | messages if len(messages) > 1 else values)


def _messages(text: str) -> Any:
    """The messages whose JSON a cell holds; None for any other text."""
    if not re.match(r'\s*(\[\s*)?\{\s*"', text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    messages = value if isinstance(value, list) else [value]
    return value if all(isinstance(m, dict) and ({"role", "from"} & {*m}) for m in messages) else None


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
        for batch in file.iter_batches(_ROWS_PER_BATCH):
            for values in batch.to_pylist():
                number += 1
                yield Row(str(path), number, _without_nulls(values))


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_csv, delimiter=","),
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
}
