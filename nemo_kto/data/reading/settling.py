"""How the columns of a file are read, told once for all of its rows by the first of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nemo_kto.data.reading.columns import SPOKEN, Columns
from nemo_kto.data.reading.containers import Row
from nemo_kto.data.reading.formats import FORMATS
from nemo_kto.data.reading.json_strings import CHOICE, Reading, settled_reading
from nemo_kto.data.reading.paths import Missing, look_up, setting_of
from nemo_kto.errors import DataError

SAMPLE = 1000
"""Rows of a file by which is told how it is read."""

_OF_ALIKE = 20
"""Rows that are looked at of those that have the same columns."""

Kind = Literal["text", "messages"]

KINDS = (
    "A string may be a prompt as it stands, or what a user says: set model.data.prompt_template=chat to make messages "
    "of all strings, or keep strings and messages in files of their own."
)
"""What to do about a file with strings and with messages."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What is the same for all rows of a file.

    Attributes:
        format: A name in `FORMATS`.
        label: The column that holds the labels, or the path.
        readings: See `Columns`.
        system: Whether there is a system prompt in a field of its own, which makes messages of strings.
        images: Whether there are images in a column of their own, which make messages of strings too.
        kind: What prompts are, once read; None where no row has told.
    """

    format: str
    label: str
    readings: Mapping[str, Reading] = field(default_factory=dict)
    system: bool = False
    images: bool = False
    kind: Kind | None = None


SeenAs = Callable[[str, Row], Columns]
"""A format and a row -> the row as that format sees it."""


def best_format(rows: Sequence[Row], seen_as: SeenAs) -> str:
    """Returns the format that most rows have all fields of, or else most fields.

    Raises:
        DataError: No row is of any.
    """
    alike = _alike(rows)
    found = {name: _share_of_rows(name, alike, seen_as) for name in FORMATS}
    best = max(found, key=lambda name: found[name])
    if not any(found[best]):
        row = rows[0]
        columns = ", ".join(map(repr, row.values)) or "none"
        if len(row.values) == 1 and ";" in columns:
            columns += "; columns are separated by commas"
        raise DataError(
            f"{row.source}:{row.line}: the fields ({columns}) fit no known format. Say which of them hold prompt, "
            "response and label, with model.data.fields={prompt: <column>, response: <column>, label: <column>}, or "
            "see docs/data.md for the formats."
        )
    return best


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows with the same columns, and the same of them filled, together: some of them tell the format of all."""
    found: dict[tuple[tuple[str, bool], ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple((name, value in (None, "")) for name, value in row.values.items()), []).append(row)
    return list(found.values())


def whole_format(row: Row, seen_as: SeenAs) -> str | None:
    """Returns the first format that a row has all fields of."""
    return next((name for name in FORMATS if _share(name, seen_as(name, row))[0] == 1), None)


def _share(format: str, columns: Columns) -> tuple[float, float]:
    """How much of a format's required fields a row has, 0 if no more than a prompt; how much of their columns."""
    found = FORMATS[format]
    if any(columns.has(name) for name in found.without):
        return 0.0, 0.0
    filled = [name for name in found.required if columns.has(name)]
    if filled in ([], ["prompt"], ["label"]) or (found.fits is not None and not found.fits(columns)):
        filled = []
    there = [name for name in found.required if columns.there(name)]
    if there in ([], ["prompt"], ["label"]) or found.fits is not None:
        there = filled
    return len(filled) / len(found.required), len(there) / len(found.required)


def _share_of_rows(format: str, alike: Sequence[Sequence[Row]], seen_as: SeenAs) -> tuple[float, ...]:
    """Rows with all fields, then all fields together, then all columns."""
    whole = filled = there = 0.0
    for rows in alike:
        shares = [_share(format, seen_as(format, row)) for row in rows[:_OF_ALIKE]]
        weight = len(rows) / len(shares)
        whole += weight * sum(share == 1 for share, _ in shares)
        filled += weight * sum(share for share, _ in shares)
        there += weight * sum(share for _, share in shares)
    return whole, filled, there


def label_column(format: str, rows: Sequence[Row], views: Sequence[Columns]) -> str:
    """Returns the column, or the place, that most rows have their label in.

    Raises:
        DataError: There are several scores, and nothing says which of them is the label.
    """
    finder = FORMATS[format].labels
    if finder is not None and "label" not in views[0].given:
        places = [
            (place, value, row) for row, view in zip(rows, views, strict=True) for place, value in finder(view).items()
        ]
        values = dict(reversed([(place, value) for place, value, _ in places]))
        if len(values) > 1:
            row = next(row for place, _, row in places if place != places[0][0])
            raise DataError(_several(row, dict.fromkeys(values[place] for place, _, _ in places)))
        if values:
            return next(iter(values))
    columns = [view.column("label") for view in views if view.has("label")] or [views[0].column("label")]
    return max(dict.fromkeys(columns), key=columns.count)


def _several(row: Row, places: Mapping[str, None]) -> str:
    settings = " or ".join(setting_of("label", place) for place in list(places)[:8])
    return f"{row.source}:{row.line}: there are {len(places)} scores, each of which may be the label. Set {settings}."


def string_readings(format: str, rows: Sequence[Row], views: Sequence[Columns], choice: str) -> dict[str, Reading]:
    """Returns how the strings of each column are read that may hold messages.

    Args:
        format: A name in `FORMATS`.
        rows: Some rows of the file.
        views: The same, as the format sees them.
        choice: `model.data.json_strings`.

    Raises:
        DataError: Some strings of a column are the JSON of messages, others are not, and nothing is said about it.
    """
    spelling = FORMATS[format].spelling
    if spelling is None or choice == "text":
        return dict.fromkeys(SPOKEN, "text")
    if choice == "messages":
        return dict.fromkeys(SPOKEN, "messages")
    readings: dict[str, Reading] = {}
    for name in SPOKEN:
        strings = [(value, row) for value, row in _values(name, rows, views) if isinstance(value, str)]
        found = settled_reading((text for text, _ in strings), spelling)
        if not isinstance(found, str):
            json, text = (next(row for value, row in strings if value is one) for one in found)
            raise DataError(
                f"{json.source}:{json.line}: field '{views[0].column(name)}' is the JSON of {spelling.what}, and in "
                f"line {text.line} it is text: {CHOICE}"
            )
        readings[name] = found
    return readings


def _values(name: str, rows: Sequence[Row], views: Sequence[Columns]) -> list[tuple[object, Row]]:
    found = [(look_up(view.values, view.column(name)), row) for row, view in zip(rows, views, strict=True)]
    return [(value, row) for value, row in found if not isinstance(value, Missing)]


def has_system(views: Sequence[Columns]) -> bool:
    """Whether a file has system prompts: a string in some row, even an empty one, or a column that the user names."""
    return any(
        isinstance(look_up(view.values, view.column("system")), str)
        or ("system" in view.given and view.there("system"))
        for view in views
    )
