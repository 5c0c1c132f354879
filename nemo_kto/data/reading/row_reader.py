"""Rows -> records: which format a file is in, and which columns the user says otherwise of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from nemo_kto.data.reading.columns import SCORES, Columns
from nemo_kto.data.reading.containers import Row
from nemo_kto.data.reading.conversations import checked_answer, checked_kwargs, checked_tools
from nemo_kto.data.reading.formats import FIELDS, FORMATS
from nemo_kto.data.reading.images import taken_out
from nemo_kto.data.reading.json_strings import JSON_STRINGS, MESSAGES, Reading, Spelling
from nemo_kto.data.reading.labels import Judge, parse_threshold, parse_weight
from nemo_kto.data.reading.paths import opened, parse_path
from nemo_kto.data.reading.records import FeedbackRecord, RecordError
from nemo_kto.data.reading.settling import (
    KINDS,
    Kind,
    Settled,
    best_format,
    has_system,
    label_column,
    string_readings,
    whole_format,
)
from nemo_kto.errors import ConfigError, DataError

_NOT_READ = ("videos", "audios", "rejected_images")
"""Columns of what LLaMA-Factory and ms-swift put into the places that messages leave for it, but for images."""


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads the rows of a file.

    Attributes:
        format: A name in `FORMATS`, or "auto".
        fields: One of `FIELDS` -> the column it is in, or the path.
        desirable_if: See `parse_threshold`; None where labels are no ratings.
        labels: See `parse_words`.
        json_strings: Whether strings that are the JSON of messages are "messages" or "text"; "auto": what a column is
            in all of its rows.
        chat: Whether all strings are made messages.
        settled: How the file's rows are read; None until `settle` has seen some.
    """

    format: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    desirable_if: str | None = None
    labels: Mapping[str, bool] = field(default_factory=dict)
    json_strings: str = "auto"
    chat: bool = False
    settled: Settled | None = None

    def check(self) -> None:
        """Raises a ConfigError for a format, name or value that does not exist, or keys that exclude each other."""
        if self.format not in ("auto", *FORMATS):
            raise ConfigError(f"Unknown data format {self.format!r}; use one of auto, {', '.join(FORMATS)}.")
        for name, column in self.fields.items():
            if not isinstance(column, str) or not column:
                raise ConfigError(f"model.data.fields: {name}={column!r} must be the name of a column, or a path.")
            if name not in FIELDS:
                raise ConfigError(f"model.data.fields: unknown name {name!r}; use some of {', '.join(FIELDS)}.")
        if self.json_strings not in JSON_STRINGS:
            raise ConfigError(f"model.data.json_strings={self.json_strings!r} must be {' or '.join(JSON_STRINGS)}.")
        if self.desirable_if is not None:
            parse_threshold(self.desirable_if)
            if self.labels:
                raise ConfigError(
                    "model.data.labels says what words mean, model.data.desirable_if which ratings are desirable; set "
                    "one of the two."
                )

    def settle(self, rows: Sequence[Row]) -> "RowReader":
        """Returns a reader for the file that begins with some rows.

        Args:
            rows: At least one; `SAMPLE` of them are enough.

        Raises:
            DataError: They are of no format, or can be read in two ways.
            ConfigError: A path in `fields` is none, and no column has that name.
        """
        self._check_paths(rows)
        format = best_format(rows, self._seen_as) if self.format == "auto" else self.format
        views = [self._seen_as(format, row) for row in rows]
        settled = Settled(
            format,
            label=label_column(format, rows, views),
            readings=string_readings(format, rows, views, self.json_strings),
            system=has_system(views),
            images=any(view.shows_images() for view in views),
        )
        reader = replace(self, settled=settled)
        return replace(reader, settled=replace(settled, kind=reader._kind_of(rows)))

    def read(self, row: Row) -> list[FeedbackRecord]:
        """Returns the records in a row.

        Raises:
            RecordError: The row is not of the format.
            DataError: See `settle`, where nothing has been settled.
        """
        settled = self.settled or self.settle([row]).settled
        assert settled is not None
        try:
            return self._records(row, self._seen(row, settled), settled)
        except RecordError as error:
            reason = error.reason + self._other_format(row, settled, error)
            raise RecordError(reason, error.field, error.file) from error

    def _records(self, row: Row, columns: Columns, settled: Settled) -> list[FeedbackRecord]:
        for name in _NOT_READ:
            if opened(row.values.get(name)):  # in a table, an empty list is its JSON
                raise RecordError("cannot be trained on; only text and images are read.", name)
        tools = checked_tools(columns.get("tools"), columns.column("tools"))
        kwargs = checked_kwargs(columns.get("chat_template_kwargs"), columns.column("chat_template_kwargs"))
        weight = parse_weight(columns.get("weight"), columns.column("weight"))
        system, system_name = columns.get("system"), columns.column("system")
        images = columns.images()
        answers = FORMATS[settled.format].read(columns)
        spoken = [text for answer in answers for text in (answer.prompt, answer.response)]
        # messages on one side leave one way only to take a string on another
        as_messages = (
            self.chat or settled.system or settled.images or not all(isinstance(text, str) for text in spoken)
        )
        records = []
        for answer in answers:
            prompt, response = checked_answer(
                answer.prompt,
                answer.response,
                names=answer.names,
                system=system,
                system_name=system_name,
                as_messages=as_messages,
                images=images,
            )
            prompt, shown = taken_out(prompt, row.source)
            records.append(
                FeedbackRecord(prompt, response, answer.desirable, row.source, row.line, tools, kwargs, weight, shown)
            )
        if settled.kind not in (None, _kind(records[0])):
            raise _other_kind(
                _kind(records[0]),
                answers[0].names[0],
                system_name=None if system is None else system_name,
                images_name=images.column if images.values else None,
            )
        return records

    def _kind_of(self, rows: Sequence[Row]) -> Kind | None:
        """What prompts are in the rows that can be read; a DataError where they are both."""
        first: dict[Kind, Row] = {}
        for row in rows:
            try:
                first.setdefault(_kind(self.read(row)[0]), row)
            except RecordError:
                continue  # whoever reads the row says so
        if len(first) == 2:
            text, messages = first["text"], first["messages"]
            raise DataError(
                f"{text.source}:{text.line}: the prompt is a string, and in line {messages.line} it is made of "
                f"messages. {KINDS}"
            )
        return next(iter(first), None)

    def _check_paths(self, rows: Sequence[Row]) -> None:
        for name, path in self.fields.items():
            if parse_path(path) is None and not any(path in row.values for row in rows):
                raise ConfigError(
                    f"model.data.fields: {name}={path!r} is neither a column of {rows[0].source} nor a path. A path "
                    "is a column and behind it any number of .name, [0] and [key=value]."
                )

    def _seen_as(self, format: str, row: Row) -> Columns:
        """The row as a format sees it, before anything is settled."""
        names = {**FORMATS[format].names}
        if self.desirable_if is not None and FORMATS[format].rated:
            # a column of labels is one of ratings only where there is no other
            scores = tuple(name for name in SCORES if name in row.values)
            names["label"] = scores or (*names.get("label", ("label",)), *SCORES)
        return self._columns(row, names, {})

    def _seen(self, row: Row, settled: Settled) -> Columns:
        names = {**FORMATS[settled.format].names, "label": (settled.label,)}
        return self._columns(row, names, settled.readings, FORMATS[settled.format].spelling or MESSAGES)

    def _columns(
        self,
        row: Row,
        names: Mapping[str, tuple[str, ...]],
        readings: Mapping[str, Reading],
        spelling: Spelling = MESSAGES,
    ) -> Columns:
        threshold = None if self.desirable_if is None else parse_threshold(self.desirable_if)
        given = {name: (column,) for name, column in self.fields.items()}
        return Columns(
            row.values, {**names, **given}, Judge(self.labels, threshold), frozenset(given), readings, spelling
        )

    def _other_format(self, row: Row, settled: Settled, error: RecordError) -> str:
        """What to add to an error about a row that is of another format than its file."""
        if self.format != "auto" or not error.reason.startswith("is missing"):
            return ""
        other = whole_format(row, self._seen_as)
        if other in (None, settled.format):
            return ""
        return f" The row is of the format {other}, the file of {settled.format}: keep the two in files of their own."


def _other_kind(kind: Kind, name: str, system_name: str | None, images_name: str | None) -> RecordError:
    """The error for a row that is of another kind than its file."""
    if system_name is not None:
        return RecordError(f"is a system prompt, and the rows before had none and are strings. {KINDS}", system_name)
    if images_name is not None and kind == "messages":
        return RecordError(f"holds images, and the rows before had none and are strings. {KINDS}", images_name)
    here, others = ("a string", "made of messages") if kind == "text" else ("made of messages", "strings")
    return RecordError(f"is {here}, where the rows before are {others}. {KINDS}", name)


def _kind(record: FeedbackRecord) -> Kind:
    return "text" if isinstance(record.prompt, str) else "messages"
