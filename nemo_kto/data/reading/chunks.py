"""A source's rows -> records, some at a time.

Bad records are yielded among the good ones, so that whoever reads decides whether one ends the run.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nemo_kto.data.reading.columns import SPOKEN
from nemo_kto.data.reading.containers import Row
from nemo_kto.data.reading.labels import parse_words
from nemo_kto.data.reading.parts import parts_of
from nemo_kto.data.reading.records import BadRecord, FeedbackRecord, RecordError
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.settling import SAMPLE, Settled
from nemo_kto.data.reading.sources import Source, parse_source
from nemo_kto.errors import DataError

MAX_SHOWN = 10
"""Bad records that an error lists."""

_MOST_HELD = 16 << 20
"""Characters and bytes of rows from which on no more are added to a chunk: many of them may wait to be tokenised."""


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


def read_chunks(source: Source, size: int) -> Iterator[Chunk]:
    """Yields a source's rows in order, at most `size` at a time, and how they are read; fewer where they hold images.

    Raises:
        DataError: Nothing of that name is there, it cannot be read, holds no record, is of no known format, or can be
            read in two ways.
    """
    for file, part in enumerate(parts_of(source)):
        rows = part.rows()
        sample = list(itertools.islice(rows, SAMPLE))
        if not sample:
            raise DataError(f"{part.name}: the file holds no record.")
        reader = _settled(source.reader, sample)
        rows = itertools.chain(sample, rows)
        while chunk := _some(rows, size):
            if reader.settled is None:
                reader = _settled(reader, chunk)
            yield Chunk(reader, chunk, file)


def _some(rows: Iterator[Row | BadRecord | FeedbackRecord], size: int) -> list[Row | BadRecord | FeedbackRecord]:
    """The next rows: so many, or those that first hold more than is to be in memory at once."""
    found: list[Row | BadRecord | FeedbackRecord] = []
    held = 0
    for row in itertools.islice(rows, size):
        found.append(row)
        held += _held([*row.values.values()] if isinstance(row, Row) else 0)
        if held > _MOST_HELD:
            break
    return found


def _held(value: Any) -> int:
    """How much there is in a value, in characters and bytes."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return 0
    return sum(map(_held, value))


def _settled(reader: RowReader, found: Sequence[Row | BadRecord | FeedbackRecord]) -> RowReader:
    """The reader of a file of which some rows are known; the same as before where none of them is one."""
    rows = [row for row in found if isinstance(row, Row)]
    return reader.settle(rows) if rows else reader


_OF_RECORDS = RowReader("trl", settled=Settled("trl", "label", dict.fromkeys(SPOKEN, "text")))
"""Records say themselves what they are."""


def parse_chunk(chunk: Chunk) -> Iterator[FeedbackRecord | BadRecord]:
    """Yields the records of some rows, in order."""
    of_records = replace(_OF_RECORDS, chat=chunk.reader.chat)
    for row in chunk.rows:
        if isinstance(row, BadRecord):
            yield row
            continue
        try:
            if isinstance(row, FeedbackRecord):  # of a function of other people: judged as a row that says the same
                yield from of_records.read(Row(row.source, row.line, row.row()))
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
    labels: Mapping[str, Any] | None = None,
    json_strings: str = "auto",
) -> list[FeedbackRecord]:
    """Returns every record of some sources, in order; for more data than fits into memory, see `read_chunks`.

    Args:
        paths: See `Source.path`; at least one.
        format: See `RowReader`; "auto" decides for each file.
        fields: See `RowReader`.
        desirable_if: See `RowReader`.
        labels: See `parse_words`.
        json_strings: See `RowReader`.

    Raises:
        DataError: See `read_chunks`; or records are bad: the message names file, line, field and reason of the first
            ten.
        ConfigError: A format, a field or a value does not exist.
    """
    if not paths:
        raise DataError("No data was given; name at least one file.")
    reader = RowReader(format, fields or {}, desirable_if, parse_words(labels), json_strings)
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
