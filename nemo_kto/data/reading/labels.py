"""What people write for thumbs up and down, and for how much one counts; anything else is an error."""

import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from nemo_kto.data.reading.paths import quoted
from nemo_kto.data.reading.records import RecordError, json_type, shown
from nemo_kto.errors import ConfigError

_NUMBER = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)


def number_in(value: Any) -> float:
    """Returns the number that a value is, or that a table's cell spells; NaN if it is none."""
    if isinstance(value, bool | bytes) or (isinstance(value, str) and not _NUMBER.fullmatch(value)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


@dataclass(frozen=True, slots=True)
class Threshold:
    """`>= 4`: which ratings are desirable."""

    text: str
    holds_for: Callable[[float, float], bool]
    limit: float

    def holds(self, value: Any, column: str) -> bool:
        """Whether a rating is desirable; a RecordError if it is no number."""
        number = number_in(value)
        if math.isnan(number):
            raise RecordError(f"must be a number, to be compared with '{self.text}', got {shown(value)}.", column)
        return self.holds_for(number, self.limit)


_COMPARISONS = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}


@lru_cache(maxsize=64)
def parse_threshold(text: str) -> Threshold:
    """Returns what `>= 4` and the like mean.

    Raises:
        ConfigError: It is no comparison with a number.
    """
    match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*", text)
    if match is None:
        raise ConfigError(
            f"model.data.desirable_if={text!r} must be a comparison with a number, such as '>= 4'; the operators are "
            f"{', '.join(_COMPARISONS)}."
        )
    return Threshold(text.strip(), _COMPARISONS[match[1]], float(match[2]))


def parse_weight(value: Any, column: str) -> float:
    """Returns a sample's weight in the loss; 1 where none is given.

    Raises:
        RecordError: It is no number of at least 0.
    """
    if value is None or (isinstance(value, str) and not value.strip()):  # the empty cell of a table
        return 1.0
    weight = number_in(value)
    if not 0 <= weight < math.inf:
        raise RecordError(
            f"must be a number of at least 0, by which the sample's loss is multiplied, got {shown(value)}.", column
        )
    return weight


_LABELS = {
    "true": True,
    "1": True,
    "1.0": True,  # as tables write booleans between missing ones
    "chosen": True,
    "desirable": True,
    "thumbs up": True,
    "thumb up": True,
    "up": True,
    "👍": True,
    "false": False,
    "0": False,
    "0.0": False,
    "rejected": False,
    "undesirable": False,
    "thumbs down": False,
    "thumb down": False,
    "down": False,
    "👎": False,
}
_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]")
_SIDES = {"desirable": True, "undesirable": False}


def parse_words(labels: Any) -> dict[str, bool]:
    """Returns what the words and numbers of `model.data.labels` mean, each written as labels are compared.

    Args:
        labels: `{desirable: [good, like], undesirable: [bad]}`, or None.

    Raises:
        ConfigError: It is no such mapping, or a word is in both lists.
    """
    found: dict[str, bool] = {}
    if labels is None:
        return found
    if not isinstance(labels, Mapping) or not {*labels} <= {*_SIDES}:
        raise ConfigError(
            f"model.data.labels={labels!r} must be the words of both kinds, such as {{desirable: [good, like], "
            "undesirable: [bad]}."
        )
    for side, words in labels.items():
        for word in words if isinstance(words, list | tuple) else [words]:
            if not isinstance(word, str | int | float):
                raise ConfigError(
                    f"model.data.labels: {side} holds a {json_type(word)}; it must hold words or numbers."
                )
            key = _compared(word)
            if found.setdefault(key, _SIDES[side]) is not _SIDES[side]:
                raise ConfigError(f"model.data.labels: {word!r} is in both lists.")
    return found


def _compared(value: str | float) -> str:
    """A label as it is compared with the words that the user has given a meaning."""
    if isinstance(value, bool):
        return str(int(value))
    text = value if isinstance(value, str) else str(value)
    number = number_in(text)
    if not math.isnan(number):
        return repr(int(number)) if number.is_integer() else repr(number)
    return {"true": "1", "false": "0"}.get(_plain(text), _plain(text))


def _plain(text: str) -> str:
    """A label without what does not matter: capitals, spaces around, a thumb's colour, `_` or `-` for a space."""
    return _SKIN_TONES.sub("", re.sub(r"[\s_-]+", " ", text.strip().lower()))


@dataclass(frozen=True, slots=True)
class Judge:
    """What the labels of a source mean.

    Attributes:
        words: See `parse_words`; they count before the labels that are known anyway.
        threshold: Which ratings are desirable; None where labels are no ratings.
    """

    words: Mapping[str, bool] = field(default_factory=dict)
    threshold: Threshold | None = None

    def meaning(self, value: Any) -> bool | None:
        """What the user's own words say of a label; None if it is none of them."""
        return self.words.get(_compared(value)) if self.words and isinstance(value, str | int | float) else None

    def desirable(self, value: Any, column: str) -> bool:
        """Whether a label, or a rating, says desirable; a RecordError if it does not say."""
        if self.threshold is not None:
            return self.threshold.holds(value, column)
        return self.kind(value, column)

    def kind(self, value: Any, column: str) -> bool:
        """Whether a label that is no rating says desirable; see `parse_label`."""
        meaning = self.meaning(value)
        return parse_label(value, column, rates=not self.words) if meaning is None else meaning


def parse_label(value: Any, column: str, *, rates: bool = True) -> bool:
    """Returns whether a label says desirable.

    Args:
        value: The label.
        column: Where it is.
        rates: Whether labels could be taken for ratings instead, for advice.

    Raises:
        RecordError: It is none of the labels that mean a thumb up or a thumb down.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str):
        known = _LABELS.get(_plain(value))
        if known is not None:
            return known
    raise RecordError(
        'must be true or false, 1 or 0, "chosen" or "rejected", or a thumb "up" or "down", got '
        + shown(value)
        + "."
        + _advice(value, rates=rates),
        column,
    )


def _advice(value: Any, *, rates: bool) -> str:
    """What to do about a label that is not known."""
    is_number = isinstance(value, str | int | float) and math.isfinite(number_in(value))
    advice = ""
    if is_number and rates:
        advice = " To make labels of ratings, set model.data.desirable_if='>= 4' or the like."
    if is_number or (isinstance(value, str) and 0 < len(value.strip()) <= 40 and value.isprintable()):
        word = quoted(value) if isinstance(value, str) else json.dumps(value)
        advice += (
            f" To say what this one means, set model.data.labels={{desirable: [{word}]}} or "
            f"model.data.labels={{undesirable: [{word}]}}."
        )
    return advice
