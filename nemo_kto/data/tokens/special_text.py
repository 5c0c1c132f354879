"""Special tokens that people spelled in their messages, kept apart from those that a chat template writes.

What a template writes is control, what people wrote is text. Before messages reach the template, the special tokens
spelled in them are hidden behind characters that nothing else in them has; afterwards they are put back, and where
they stand is remembered (`Spans`), so that tokenisation makes ordinary tokens of them.
"""

import re
from collections.abc import Callable
from typing import Any

from nemo_kto.data.reading.records import RecordError

Spans = tuple[tuple[int, int], ...]
"""(first character, character behind the last) of each special token that is to be ordinary text."""


class Marker:
    """Hides special tokens in texts behind characters that nothing else in them has, and finds them again."""

    def __init__(self, special: re.Pattern[str], given: Any) -> None:
        """Chooses those characters; `given` holds all texts."""
        self._special = special
        self._hidden: list[str] = []
        used = {character for text in strings(given) for character in text}
        sign = next((chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used), None)  # private use
        if sign is None:
            raise RecordError("the text spells special tokens and uses every character of Unicode's private use area.")
        self._sign = sign

    def hide(self, text: str) -> str:
        """The text without special tokens."""
        return self._special.sub(self._hide_one, text)

    def _hide_one(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._sign}{len(self._hidden) - 1}{self._sign}"

    def reveal(self, text: str) -> tuple[str, Spans]:
        """The text as it was, and where special tokens had been hidden."""
        parts: list[str] = []
        spans, length = [], 0
        escaped = re.escape(ascii(self._sign)[1:-1])  # as templates write objects in Python's way, or as ASCII JSON
        sign = f"(?:{self._sign}|{escaped})"
        for number, part in enumerate(re.split(f"{sign}([0-9]+){sign}", text)):
            if number % 2:
                part = self._hidden[int(part)]
                spans.append((length, length + len(part)))
            elif self._sign in part:
                raise RecordError("the chat template cuts through special tokens that the messages spell.")
            parts.append(part)
            length += len(part)
        return "".join(parts), tuple(spans)


def token_pattern(tokens: set[str]) -> re.Pattern[str]:
    """A pattern that finds any of some tokens, of those at one place the longest; nothing if there are none."""
    names = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def strings(value: Any) -> list[str]:
    """Every string in messages, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in strings(part)]
    return [text for inner in value for text in strings(inner)] if isinstance(value, list | tuple) else []


def hidden(value: Any, hide: Callable[[str], str]) -> Any:
    """Messages with special tokens hidden in all of their strings."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {hide(key): hidden(inner, hide) for key, inner in value.items()}
    return [hidden(inner, hide) for inner in value] if isinstance(value, list) else value
