"""Where a source's rows are: its files, or its data set, found and fingerprinted."""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nemo_kto.data.reading.containers import (
    Row,
    check_file,
    check_kind,
    count_rows,
    is_data_file,
    no_such_file,
    read_rows,
)
from nemo_kto.data.reading.data_sets import dataset_rows, is_saved_dataset
from nemo_kto.data.reading.records import BadRecord, FeedbackRecord, json_type
from nemo_kto.data.reading.sources import RecordsFunction, Source
from nemo_kto.errors import ConfigError, DataError, KTOError


@dataclass(frozen=True, slots=True)
class Part:
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
    for part in parts_of(source):
        name = Path(part.name).name
        digest.update(f"{len(name)}:{name}".encode())
        for piece in part.content():
            digest.update(piece)
    return digest.hexdigest()


def plain_files(source: Source) -> list[Path] | None:
    """Returns the files of a source, in order; None for what a function reads, a saved data set, or one of the hub.

    Raises:
        DataError: See `parts_of`.
    """
    try:
        if source.function is not None or is_saved_dataset(Path(source.path)):
            return None
        files = _files(source)
        for file in files or ():
            check_file(file)
        return files
    except OSError as error:
        raise _unreadable(source, error) from error


def expected_rows(source: Source) -> int | None:
    """Returns about how many rows a source has, for a progress bar; None where only reading it would tell."""
    counts = [part.count() for part in parts_of(source)]
    known = [number for number in counts if number is not None]
    return sum(known) if len(known) == len(counts) else None


def check_there(source: Source) -> None:
    """Raises what reading a source would, where a look at names tells; opens no file and loads no data set.

    Raises:
        DataError: There is no such file, nothing in the folder or of the pattern, or a file is of no known kind.
        ConfigError: The source has a key that files have none of.
    """
    if source.function is not None:
        _check_no_data_set(source, "what a reader reads has none")
        return
    try:
        files = None if is_saved_dataset(Path(source.path)) else _files(source)
        for file in files or ():
            if not file.exists():
                raise no_such_file(file)
            check_kind(file)
    except OSError as error:
        raise _unreadable(source, error) from error


def file_names(source: Source) -> list[str]:
    """Returns the names of the files that a source consists of, in order; of a data set, its own.

    Raises:
        DataError: There are none.
    """
    return [part.name for part in parts_of(source)]


def parts_of(source: Source) -> list[Part]:
    """Returns what a source consists of.

    Raises:
        DataError: Nothing of that name is there, or it cannot be read.
        ConfigError: See `check_there`.
    """
    try:
        return _find_parts(source)
    except OSError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: Source, error: OSError) -> DataError:
    return DataError(f"{source.path}: it cannot be read ({error.strerror}: {error.filename}).")


def _find_parts(source: Source) -> list[Part]:
    path = Path(source.path)
    if source.function is not None:
        _check_no_data_set(source, "what a reader reads has none")
        return [_function_part(source.path, source.function)]
    if is_saved_dataset(path):
        return [_saved_part(path, source)]
    files = _files(source)
    return [_hub_part(source)] if files is None else [_file_part(file) for file in files]


def _files(source: Source) -> list[Path] | None:
    """The files of a source that is no saved data set; None for one of the hub. A single one need not be there."""
    path = Path(source.path)
    if "://" in source.path and not path.exists():
        raise DataError(f"{source.path}: addresses are not read. Download the file, and name it.")
    if path.exists() or not _may_be_on_hub(source.path):
        _check_no_data_set(source, "files have none")
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


def _check_no_data_set(source: Source, why: str) -> None:
    for key in ("split", "name"):
        if getattr(source, key) is not None:
            raise ConfigError(f"{source.path}: {key}={getattr(source, key)} is for data sets; {why}.")


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


def _function_part(path: str, function: RecordsFunction) -> Part:
    """What a function of other people makes of a path: its content is its rows, as nothing is known of the path."""

    def rows() -> Iterator[Row | BadRecord | FeedbackRecord]:
        try:
            for number, record in enumerate(function(path), 1):
                if isinstance(record, FeedbackRecord):
                    yield record
                elif isinstance(record, Mapping):
                    yield _row_of(record, path, number)
                else:
                    reason = f"is a {json_type(record)}; a reader has to return mappings or FeedbackRecords."
                    yield BadRecord(path, number, None, reason)
        except KTOError:
            raise
        except Exception as error:  # whatever it does
            name = getattr(function, "__qualname__", repr(function))
            raise DataError(f"{path}: the reader {name} failed ({type(error).__name__}: {error}).") from error

    def content() -> Iterator[bytes]:
        for found in rows():
            values = [found.row(), found.place] if isinstance(found, FeedbackRecord) else asdict(found)
            yield json.dumps(values, sort_keys=True, default=bytes.hex).encode()

    return Part(path, rows, content, lambda: None)


def _row_of(record: Mapping[str, Any], path: str, number: int) -> Row | BadRecord:
    """A record of a function of other people as a row, of plain values: they are compared, sent and kept."""
    values = {}
    for name, value in record.items():
        try:
            values[str(name)] = _plain(value)
        except TypeError as error:
            return BadRecord(path, number, str(name), f"holds a {error}, which no row of a file can.")
    return Row(path, number, values)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes | bytearray | memoryview):  # of an image
        return bytes(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    raise TypeError(type(value).__name__)


def _file_part(path: Path) -> Part:
    check_file(path)
    return Part(str(path), lambda: read_rows(path), lambda: _bytes_of([path]), lambda: count_rows(path))


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


def _saved_part(path: Path, source: Source) -> Part:
    import datasets

    try:
        dataset = _chosen_split(datasets.load_from_disk(str(path)), source)
    except DataError:
        raise
    except Exception as error:  # the readers behind it raise anything
        raise DataError(f"{path}: the data set cannot be read ({type(error).__name__}: {error}).") from error
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return Part(str(path), lambda: dataset_rows(dataset, str(path)), lambda: _bytes_of(files), lambda: len(dataset))


def _may_be_on_hub(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and not is_data_file(Path(path)) and not path.startswith((".", "~"))


@lru_cache(maxsize=4)
def _load_dataset(path: str, name: str | None) -> Any:
    import datasets

    return datasets.load_dataset(path, name)


def _hub_part(source: Source) -> Part:
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
    return Part(
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
