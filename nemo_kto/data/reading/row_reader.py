"""Rows -> records: which format a file is in, and which columns the user says otherwise of."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nemo_kto.data.reading.containers import Row
from nemo_kto.data.reading.conversations import checked_answer, checked_kwargs, checked_tools
from nemo_kto.data.reading.formats import FIELDS, FORMATS, SCORES, Columns
from nemo_kto.data.reading.labels import parse_threshold, parse_weight
from nemo_kto.data.reading.records import FeedbackRecord, RecordError
from nemo_kto.errors import ConfigError, DataError

_PICTURES = ("images", "videos", "audios")
"""Columns of what LLaMA-Factory and ms-swift put into the places that messages leave for it."""


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads the rows of a file.

    Attributes:
        format: A name in `FORMATS`, or "auto".
        fields: One of `FIELDS` -> the column it is in.
        desirable_if: See `parse_threshold`; None where labels are no ratings.
        label: The column that holds the labels; None until `detect` has seen a row.
    """

    format: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    desirable_if: str | None = None
    label: str | None = None

    def check(self) -> None:
        """Raises a ConfigError for a format, a name or a threshold that does not exist."""
        if self.format not in ("auto", *FORMATS):
            raise ConfigError(f"Unknown data format {self.format!r}; use one of auto, {', '.join(FORMATS)}.")
        for name, column in self.fields.items():
            if not isinstance(column, str):
                raise ConfigError(f"model.data.fields: {name}={column!r} must be the name of a column.")
            if name not in FIELDS:
                raise ConfigError(f"model.data.fields: unknown name {name!r}; use some of {', '.join(FIELDS)}.")
        if self.desirable_if is not None:
            parse_threshold(self.desirable_if)

    def detect(self, row: Row) -> "RowReader":
        """Returns a reader for the row's file: of the format that has all its fields or most, with its label column.

        Raises:
            DataError: It is of none.
        """
        if self.format != "auto":
            return replace(self, label=self._columns(self.format, row).column("label"))
        found = {name: self._share(name, row) for name in FORMATS}
        best = max(found, key=lambda name: found[name])
        if not any(found[best]):
            columns = ", ".join(map(repr, row.values)) or "none"
            if len(row.values) == 1 and ";" in columns:
                columns += "; columns are separated by commas"
            raise DataError(
                f"{row.source}:{row.line}: the fields ({columns}) fit no known format. Say with model.data.fields "
                "which of them hold prompt, response and label, or see docs/data.md for the formats."
            )
        return replace(self, format=best, label=self._columns(best, row).column("label"))

    def read(self, row: Row) -> list[FeedbackRecord]:
        """Returns the records in a row.

        Raises:
            RecordError: The row is not of the format.
        """
        columns = self._columns(self.format, row)
        for name in _PICTURES:
            if row.values.get(name):
                raise RecordError("cannot be trained on; only text is.", name)
        tools = checked_tools(columns.get("tools"), columns.column("tools"))
        kwargs = checked_kwargs(columns.get("chat_template_kwargs"), columns.column("chat_template_kwargs"))
        weight = parse_weight(columns.get("weight"), columns.column("weight"))
        records = []
        for answer in FORMATS[self.format].read(columns):
            prompt, response = checked_answer(
                answer.prompt,
                answer.response,
                names=answer.names,
                system=columns.get("system"),
                system_name=columns.column("system"),
            )
            records.append(
                FeedbackRecord(prompt, response, answer.desirable, row.source, row.line, tools, kwargs, weight)
            )
        return records

    def _columns(self, format: str, row: Row) -> Columns:
        names = {**FORMATS[format].names}
        if self.desirable_if is None:
            threshold = None
        else:
            threshold = parse_threshold(self.desirable_if)
            # a column of labels is one of ratings only where there is no other
            scores = tuple(name for name in SCORES if name in row.values)
            names["label"] = scores or (*names.get("label", ("label",)), *SCORES)
        if self.label is not None:  # the same in every row of a file, whatever is missing in one
            names["label"] = (self.label,)
        given = {name: (column,) for name, column in self.fields.items()}
        return Columns(row.values, names | given, threshold, frozenset(given))

    def _share(self, format: str, row: Row) -> tuple[float, float]:
        """How much of a format's required fields a row has, 0 if no more than a prompt; how much of their columns."""
        columns, required = self._columns(format, row), FORMATS[format].required
        if any(columns.has(name) for name in FORMATS[format].without):
            return 0.0, 0.0
        filled = [name for name in required if columns.has(name)]
        there = [name for name in required if columns.column(name) in row.values]
        return _share_of(filled, required), _share_of(there, required)


def _share_of(names: list[str], required: tuple[str, ...]) -> float:
    return 0.0 if names in ([], ["prompt"], ["label"]) else len(names) / len(required)
