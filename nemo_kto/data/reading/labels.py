"""What people write for thumbs up and down, and for how much one counts; anything else is an error."""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_kto.data.reading.records import RecordError, shown
from nemo_kto.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Threshold:
    """`>= 4`: which ratings are desirable."""

    text: str
    holds_for: Callable[[float, float], bool]
    limit: float

    def holds(self, value: Any, column: str) -> bool:
        """Whether a rating is desirable; a RecordError if it is no number."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
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
    if value is None:
        return 1.0
    weight = -1.0 if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
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


def parse_label(value: Any, column: str) -> bool:
    """Returns whether a label says desirable.

    Raises:
        RecordError: It is none of the labels that mean a thumb up or a thumb down.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str):
        known = _LABELS.get(_SKIN_TONES.sub("", re.sub(r"[\s_-]+", " ", value.strip().lower())))
        if known is not None:
            return known
    hint = ""
    if isinstance(value, int | float):
        hint = " To make labels of ratings, set model.data.desirable_if, for example to '>= 4'."
    raise RecordError(
        'must be true or false, 1 or 0, "chosen" or "rejected", or a thumb "up" or "down", got '
        + shown(value)
        + "."
        + hint,
        column,
    )
