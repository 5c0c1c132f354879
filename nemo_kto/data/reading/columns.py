"""A row seen through names of our own, and what a format's reader makes of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_kto.data.reading.image_places import Listed
from nemo_kto.data.reading.json_strings import MESSAGES, Reading, Spelling, parsed_json, read_string
from nemo_kto.data.reading.labels import Judge
from nemo_kto.data.reading.paths import Missing, look_up
from nemo_kto.data.reading.records import RecordError, json_type

SCORES = ("score", "rating", "reward")
"""Columns of ratings, tried where labels are made of them."""

SPOKEN = ("prompt", "response", "chosen", "rejected", "output_A", "output_B")
"""Our names of what may be text or messages."""

_IMAGES = ("images", "image")
"""Columns of images, of several and of one, as TRL has them; either may hold both."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt with one rated response, not yet checked; `names` are the columns the two came from."""

    prompt: Any
    response: Any
    desirable: bool
    names: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Columns:
    """A row seen through names of our own, whatever its columns are called.

    Attributes:
        values: The row.
        names: Our name -> the columns it may be in, or paths; the first that is there counts.
        judge: What labels mean.
        given: Those of our names that the user has given a column.
        readings: Which of `SPOKEN` -> how its strings are read; "either" where nothing is said.
        spelling: What strings of these may spell.
    """

    values: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]]
    judge: Judge = field(default_factory=Judge)
    given: frozenset[str] = frozenset()
    readings: Mapping[str, Reading] = field(default_factory=dict)
    spelling: Spelling = MESSAGES

    def column(self, name: str) -> str:
        """The column a value is in, or would be in."""
        columns = self.names.get(name, (name,))
        if len(columns) == 1:
            return columns[0]
        found = {column: look_up(self.values, column) for column in columns}
        there = [column for column, value in found.items() if not isinstance(value, Missing)]
        filled = (column for column in there if _is_filled(found[column]))
        return next(filled, there[0] if there else columns[0])

    def there(self, name: str) -> bool:
        """Whether the row has such a column, whatever is in it."""
        return not isinstance(look_up(self.values, self.column(name)), Missing)

    def has(self, name: str) -> bool:
        """Whether the row has such a column, with something in it: no null, no empty cell of a table."""
        value = look_up(self.values, self.column(name))
        return not isinstance(value, Missing) and _is_filled(value)

    def get(self, name: str) -> Any:
        """A value that may be missing: None.

        Raises:
            RecordError: Its path leads through a value of the wrong kind; or see `read_string`.
        """
        column = self.column(name)
        value = look_up(self.values, column)
        if isinstance(value, Missing):
            if value.wrong and name in self.given:
                raise RecordError(f"cannot be looked up: {value.reason}.", column)
            return None
        return self._read(name, value)

    def need(self, name: str) -> Any:
        """A value that must be there; a RecordError if it is not, or see `read_string`."""
        column = self.column(name)
        value = look_up(self.values, column)
        if isinstance(value, Missing):
            reason = f"is missing: {value.reason}." if value.reason else "is missing."
            hint = f" If another column holds it, set model.data.fields={{{name}: <column>}}."
            hint = "" if name in self.given else hint
            raise RecordError(reason + hint, column)
        return self._read(name, value)

    def _read(self, name: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if name == "messages" and value.lstrip().startswith(("[", "{")):
            return parsed_json(value, self.column(name))  # no text could be meant
        if name not in SPOKEN:
            return value
        return read_string(value, self.column(name), self.readings.get(name, "either"), self.spelling)

    def images(self) -> Listed:
        """The images that are in a column of their own; a RecordError for a column that is none of images."""
        columns = self.names.get("images", _IMAGES)
        found = [Listed(column, self._images_in(column)) for column in columns]
        filled = [listed for listed in found if listed.values]
        if len(filled) > 1:
            raise RecordError(f"and '{filled[1].column}' both hold images; keep one of the two.", filled[0].column)
        return filled[0] if filled else found[0]

    def shows_images(self) -> bool:
        """Whether there is something in a column of images."""
        try:
            return bool(self.images().values)
        except RecordError:  # whoever reads the row says so
            return True

    def _images_in(self, column: str) -> list[Any]:
        value = look_up(self.values, column)
        if isinstance(value, Missing):
            if value.wrong and "images" in self.given:
                raise RecordError(f"cannot be looked up: {value.reason}.", column)
            return []
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):  # as tables hold lists
            value = parsed_json(value, column)
        if value is None or value == {} or (isinstance(value, str) and not value.strip()):
            return []
        if isinstance(value, str | bytes | Mapping):
            return [value]
        if not isinstance(value, list):
            raise RecordError(f"must be a list of images, or a single one, not a {json_type(value)}.", column)
        return value

    def label(self) -> bool:
        """Whether the answer is desirable; a RecordError for a label that does not say so."""
        column = self.column("label")
        score = next((name for name in SCORES if self.values.get(name) is not None), None)
        if score is not None and "label" not in self.given and not self.judge.words and not self.there("label"):
            raise RecordError(
                f"is missing. To make labels of '{score}', set model.data.desirable_if='>= 4' or the like.", column
            )
        return self.judge.desirable(self.need("label"), column)


def _is_filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())
