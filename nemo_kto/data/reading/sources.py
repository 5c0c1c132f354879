"""What a user names as data -> records: a file, a folder, a pattern, a saved data set, or one of the hub.

Bad records are yielded among the good ones, so that whoever reads decides whether one ends the run.
"""

import glob
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from nemo_kto.data.reading.containers import (
    Row,
    check_kind,
    count_rows,
    dataset_rows,
    is_data_file,
    is_saved_dataset,
    no_such_file,
    read_rows,
)
from nemo_kto.data.reading.records import BadRecord, FeedbackRecord, RecordError, json_type
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.errors import ConfigError, DataError, KTOError

MAX_SHOWN = 10
"""Bad records that an error lists."""


RecordsFunction = Callable[[str], Iterable[Mapping[str, Any] | FeedbackRecord]]


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of a list of data.

    Attributes:
        path: A file, a folder with such files, a pattern (`*`, `?`, `[`; `**` for any folders), a folder that
            `datasets` saved, or the name of a data set on the hub.
        weight: How often each record occurs in an epoch: 2 deals all of them twice, 0.5 a half of them.
        max_records: Most records taken; None for all.
        split: Which split of a data set; None for "train", or for the only one.
        name: Which configuration of a data set on the hub.
        reader: How its rows are read.
        function: What yields its rows from `path`, whatever that names: a function of other people, which takes the
            path and returns records as mappings or as `FeedbackRecord`; None for the files, or the data set, of that
            name.
    """

    path: str
    weight: float = 1.0
    max_records: int | None = None
    split: str | None = None
    name: str | None = None
    reader: RowReader = field(default_factory=RowReader)
    function: RecordsFunction | None = None


_READER_KEYS = ("format", "fields", "desirable_if")
_KINDS: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "weight": (int, float),
    "max_records": (int,),
    "split": (str,),
    "name": (str,),
    "format": (str,),
    "fields": (dict,),
    "desirable_if": (str, type(None)),
}
"""Key of an entry -> types of its value."""


def parse_source(
    entry: str | Path | Mapping[str, Any], reader: RowReader, function: RecordsFunction | None = None
) -> Source:
    """Returns the source that an entry means: a path, or a mapping with `path` and other attributes of `Source`.

    Args:
        entry: The entry; `format`, `fields` and `desirable_if` in it count before those of `reader`.
        reader: How rows are read unless the entry says so.
        function: See `Source`.

    Raises:
        ConfigError: A key or a value is impossible.
    """
    reader.check()
    if not isinstance(entry, Mapping):
        return Source(str(entry), reader=reader, function=function)
    where = f"model.data.data_prefix: in {dict(entry)}"
    for key, value in entry.items():
        if key not in _KINDS:
            raise ConfigError(f"{where}, {key!r} is unknown; use {', '.join(_KINDS)}.")
        if isinstance(value, bool) or not isinstance(value, _KINDS[key]):
            kinds = [json_type(kind()) for kind in _KINDS[key]]
            wanted = "whole number" if _KINDS[key] == (int,) else " or ".join(dict.fromkeys(kinds))
            raise ConfigError(f"{where}, {key}={value!r} must be a {wanted}.")
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise ConfigError(f"{where}, {key}={value} must be above 0.")
    if not entry.get("path"):
        raise ConfigError(f"{where}, 'path' is missing.")
    own = {key: entry[key] for key in _READER_KEYS if key in entry}
    chosen = RowReader(
        **{"format": reader.format, "fields": reader.fields, "desirable_if": reader.desirable_if, **own}
    )
    chosen.check()
    others = {key: value for key, value in entry.items() if key not in own}
    return Source(**others, reader=chosen, function=function)


@dataclass(frozen=True, slots=True)
class _Part:
    """A file or a data set: its name, its rows, bytes that change with what is in it, about how many rows it has."""

    name: str
    rows: Callable[[], Iterator[Row | BadRecord | FeedbackRecord]]
    content: Callable[[], Iterator[bytes]]
    count: Callable[[], int | None]


def content_digest(source: Source) -> str:
    """Returns a digest of the bytes that a source consists of.

    Raises:
        DataError: They cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(source):
        name = Path(part.name).name
        digest.update(f"{len(name)}:{name}".encode())
        for piece in part.content():
            digest.update(piece)
    return digest.hexdigest()


def expected_rows(source: Source) -> int | None:
    """Returns about how many rows a source has, for a progress bar; None where only reading it would tell."""
    counts = [part.count() for part in _parts(source)]
    known = [number for number in counts if number is not None]
    return sum(known) if len(known) == len(counts) else None


def check_there(source: Source) -> None:
    """Raises what reading a source would, where a look at names tells; opens no file and loads no data set.

    Raises:
        DataError: There is no such file, nothing in the folder or of the pattern, or a file is of no known kind.
        ConfigError: The source has a key that files have none of.
    """
    if source.function is not None:
        return
    try:
        files = None if is_saved_dataset(Path(source.path)) else _files(source)
        for file in files or ():
            if not file.exists():
                raise no_such_file(file)
            check_kind(file)
    except OSError as error:
        raise _unreadable(source, error) from error


class Chunk(NamedTuple):
    """Some consecutive rows of a file.

    Attributes:
        reader: How they are read.
        rows: The rows.
        file: Which of the source's files they are in, counted from 0; see `file_names`.
    """

    reader: RowReader
    rows: list[Row | BadRecord | FeedbackRecord]
    file: int = 0


def file_names(source: Source) -> list[str]:
    """Returns the names of the files that a source consists of, in order; of a data set, its own.

    Raises:
        DataError: There are none.
    """
    return [part.name for part in _parts(source)]


def read_chunks(source: Source, size: int) -> Iterator[Chunk]:
    """Yields a source's rows in order, at most `size` at a time, and how they are read.

    Raises:
        DataError: Nothing of that name is there, it cannot be read, holds no record, or is of no known format.
    """
    for file, part in enumerate(_parts(source)):
        reader: RowReader | None = None
        chunk: list[Row | BadRecord | FeedbackRecord] = []
        empty = True
        for row in part.rows():
            empty = False
            if reader is None and isinstance(row, Row):
                reader = source.reader.detect(row)
            chunk.append(row)
            if len(chunk) == size:
                yield Chunk(reader or source.reader, chunk, file)
                chunk = []
        if empty:
            raise DataError(f"{part.name}: the file holds no record.")
        if chunk:
            yield Chunk(reader or source.reader, chunk, file)


_OF_RECORDS = RowReader("trl")


def parse_chunk(chunk: Chunk) -> Iterator[FeedbackRecord | BadRecord]:
    """Yields the records of some rows, in order."""
    for row in chunk.rows:
        if isinstance(row, BadRecord):
            yield row
            continue
        try:
            if isinstance(row, FeedbackRecord):  # of a function of other people: judged as a row that says the same
                yield from _OF_RECORDS.read(Row(row.source, row.line, row.row()))
            else:
                yield from chunk.reader.read(row)
        except RecordError as error:
            yield error.at(row.source, row.line)


def read_feedback(
    paths: Sequence[str | Path],
    *,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    desirable_if: str | None = None,
) -> list[FeedbackRecord]:
    """Returns every record of some sources, in order; for more data than fits into memory, see `read_chunks`.

    Args:
        paths: See `Source.path`; at least one.
        format: See `RowReader`; "auto" decides for each file.
        fields: See `RowReader`.
        desirable_if: See `RowReader`.

    Raises:
        DataError: See `read_chunks`; or records are bad: the message names file, line, field and reason of the first
            ten.
        ConfigError: A format, a field or the threshold does not exist.
    """
    if not paths:
        raise DataError("No data was given; name at least one file.")
    reader = RowReader(format, fields or {}, desirable_if)
    records, bad = [], []
    for path in paths:
        for chunk in read_chunks(parse_source(path, reader), 1000):
            for record in parse_chunk(chunk):
                if isinstance(record, FeedbackRecord):
                    records.append(record)
                else:
                    bad.append(record)
            if len(bad) > MAX_SHOWN:
                raise bad_records_error(bad)
    if bad:
        raise bad_records_error(bad)
    return records


def bad_records_error(bad: Sequence[BadRecord]) -> DataError:
    """The error for records that cannot be used, of which there may be more than those given."""
    if len(bad) == 1:
        return DataError(f"{bad[0]} Set model.data.on_bad_record=skip to leave such records out.")
    shown = "".join(f"\n  {record}" for record in bad[:MAX_SHOWN])
    count = f"{len(bad)} records" if len(bad) <= MAX_SHOWN else f"More than {MAX_SHOWN} records"
    return DataError(
        f"{count} cannot be used:{shown}\nMend them, or set model.data.on_bad_record=skip to leave such records out."
    )


def _parts(source: Source) -> list[_Part]:
    try:
        return _find_parts(source)
    except OSError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: Source, error: OSError) -> DataError:
    return DataError(f"{source.path}: it cannot be read ({error.strerror}: {error.filename}).")


def _find_parts(source: Source) -> list[_Part]:
    path = Path(source.path)
    if source.function is not None:
        return [_function_part(source.path, source.function)]
    if is_saved_dataset(path):
        return [_saved_part(path, source)]
    files = _files(source)
    return [_hub_part(source)] if files is None else [_file_part(file) for file in files]


def _files(source: Source) -> list[Path] | None:
    """The files of a source that is no saved data set; None for one of the hub. A single one need not be there."""
    path = Path(source.path)
    for key in ("split", "name"):
        if getattr(source, key) is not None and (path.exists() or not _may_be_on_hub(source.path)):
            raise ConfigError(f"{source.path}: {key}={getattr(source, key)} is for data sets; files have none.")
    if path.is_dir():
        files = sorted(_files_below(path))
        if not files:
            raise DataError(f"{path}: the folder holds no data file (.jsonl, .json, .parquet, .csv ...).")
        return files
    if not path.exists() and glob.has_magic(source.path):
        found = [Path(name) for name in sorted(glob.glob(source.path, recursive=True)) if Path(name).is_file()]
        if not found:
            raise DataError(f"{source.path}: no file has a name like this.")
        return found
    return [path] if path.exists() or not _may_be_on_hub(source.path) else None


def _files_below(folder: Path) -> Iterator[Path]:
    """Data files of a folder and those below, links followed, hidden ones left out; an OSError at a closed one."""
    visited = set()
    for name, below, files in os.walk(folder, onerror=_raise, followlinks=True):
        place = Path(name)
        if place.resolve() in visited:  # a link that leads back
            below.clear()
            continue
        visited.add(place.resolve())
        below[:] = [inner for inner in below if not inner.startswith(".")]
        yield from (place / file for file in files if is_data_file(Path(file)))


def _raise(error: OSError) -> None:
    raise error


def _function_part(path: str, function: RecordsFunction) -> _Part:
    """What a function of other people makes of a path: its content is its rows, as nothing is known of the path."""

    def rows() -> Iterator[Row | BadRecord | FeedbackRecord]:
        try:
            for number, record in enumerate(function(path), 1):
                if isinstance(record, FeedbackRecord):
                    yield record
                elif isinstance(record, Mapping):
                    yield Row(path, number, dict(record))
                else:
                    reason = f"is a {json_type(record)}; model.data.reader has to return mappings or FeedbackRecords."
                    yield BadRecord(path, number, None, reason)
        except KTOError:
            raise
        except Exception as error:  # whatever it does
            name = f"{function.__module__}.{function.__qualname__}"
            raise DataError(f"{path}: the reader {name} failed ({type(error).__name__}: {error}).") from error

    def content() -> Iterator[bytes]:
        for row in rows():
            yield repr(row).encode("utf-8", "backslashreplace")

    return _Part(path, rows, content, lambda: None)


def _file_part(path: Path) -> _Part:
    return _Part(str(path), lambda: read_rows(path), lambda: _bytes_of([path]), lambda: count_rows(path))


def _bytes_of(files: Sequence[Path]) -> Iterator[bytes]:
    for file in files:
        try:
            with file.open("rb") as handle:
                while piece := handle.read(1 << 20):
                    yield piece
        except FileNotFoundError:
            raise no_such_file(file) from None
        except OSError as error:
            raise DataError(f"{file}: the file cannot be read ({error.strerror}).") from error


def _saved_part(path: Path, source: Source) -> _Part:
    import datasets

    try:
        dataset = _chosen_split(datasets.load_from_disk(str(path)), source)
    except DataError:
        raise
    except Exception as error:  # the readers behind it raise anything
        raise DataError(f"{path}: the data set cannot be read ({type(error).__name__}: {error}).") from error
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return _Part(str(path), lambda: dataset_rows(dataset, str(path)), lambda: _bytes_of(files), lambda: len(dataset))


def _may_be_on_hub(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and not is_data_file(Path(path)) and not path.startswith((".", "~"))


@lru_cache(maxsize=4)
def _load_dataset(path: str, name: str | None) -> Any:
    import datasets

    return datasets.load_dataset(path, name)


def _hub_part(source: Source) -> _Part:
    try:
        dataset = _chosen_split(_load_dataset(source.path, source.name), source)
    except DataError:
        raise
    except Exception as error:  # the network, the hub and the readers behind it raise anything
        raise DataError(
            f"{source.path}: no such file or folder, and no data set of that name could be loaded from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})."
        ) from error
    fingerprint = dataset._fingerprint.encode()
    return _Part(
        source.path, lambda: dataset_rows(dataset, source.path), lambda: iter([fingerprint]), lambda: len(dataset)
    )


def _chosen_split(loaded: Any, source: Source) -> Any:
    """The split of a data set that the source names."""
    if not isinstance(loaded, dict):
        if source.split is not None:
            raise DataError(f"{source.path}: the data set has no splits; leave split={source.split} out.")
        return loaded
    names = list(loaded)
    wanted = source.split or ("train" if "train" in names or len(names) != 1 else names[0])
    if wanted not in loaded:
        raise DataError(f"{source.path}: there is no split {wanted!r}; choose with `split` one of {', '.join(names)}.")
    return loaded[wanted]
