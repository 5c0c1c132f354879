"""Strings that are the JSON of messages, as tables hold them; and strings that only look like it.

Whether a column's strings are messages or text is settled once for a file (`settling.py`), of whatever kind it is.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from nemo_kto.data.reading.paths import opened
from nemo_kto.data.reading.records import RecordError

JSON_STRINGS = ("auto", "messages", "text")
"""Values of `model.data.json_strings`."""

Reading = Literal["json", "no_json", "either", "text"]
"""How strings are read: all are JSON, none may be, each is what it is, or nobody asks."""

Opener = Callable[[str], Any]
"""What a string holds besides text: its JSON; None for text."""

CHOICE = (
    "set model.data.json_strings=messages to read such strings as messages, or model.data.json_strings=text to take "
    "them for text."
)
_AS_PYTHON = re.compile(r"\s*\[?\s*\{\s*'(role|from|content|value|type)':")


def messages_in(text: str) -> Any:
    """Returns the messages whose JSON a string is, or the single one; None for any other text."""
    if not re.match(r'\s*(\[\s*)?\{\s*"', text):
        return None
    value = opened(text)
    return value if _are_messages(value if isinstance(value, list) else [value]) else None


def objects_in(text: str) -> Any:
    """Returns the object, or the list of objects, whose JSON a string is; None for any other text."""
    value = opened(text)
    if isinstance(value, list):
        inner = value[0] if len(value) == 1 and isinstance(value[0], list) else value  # as a batch of one
        return value if inner and all(isinstance(one, Mapping) for one in inner) else None
    return value if isinstance(value, Mapping) else None


def _are_messages(values: list[Any]) -> bool:
    """Whether all have a speaker, and one of them something to say."""
    if not all(isinstance(value, Mapping) and {"role", "from"} & {*value} for value in values):
        return False
    return any({"content", "value", "tool_calls"} & {*value} for value in values)


def settled_reading(strings: Iterable[str], opener: Opener) -> Reading | tuple[str, str]:
    """Returns how a column's strings are read; where some are JSON and others are not, the first of either kind."""
    first: dict[bool, str] = {}
    for text in strings:
        if text.strip() and not _AS_PYTHON.match(text):
            first.setdefault(opener(text) is not None, text)
    if len(first) == 2:
        return first[True], first[False]
    if not first:
        return "either"
    return "json" if True in first else "no_json"


def read_string(text: str, column: str, reading: Reading, opener: Opener) -> Any:
    """Returns the JSON that a string is, or the string, as the column is read.

    Raises:
        RecordError: It is not what the file's other rows hold, or holds messages as Python writes them.
    """
    if reading == "text":
        return text
    if _AS_PYTHON.match(text):
        raise RecordError(
            "holds messages as Python writes them; write them as JSON (json.dumps). If it is text, set "
            "model.data.json_strings=text.",
            column,
        )
    found = opener(text)
    if found is None and reading == "json":
        if not text.strip():
            raise RecordError("is empty, where the file's other rows hold messages.", column)
        raise RecordError(f"is text, where the file's other rows hold the JSON of messages: {CHOICE}", column)
    if found is not None and reading == "no_json":
        raise RecordError(f"is the JSON of messages, where the file's other rows hold text: {CHOICE}", column)
    return text if found is None else found


def parsed_json(value: Any, name: str) -> Any:
    """The value of a field that may hold its JSON as a string, as tables do; a RecordError if it is none."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        python = " Write lists and objects as JSON (json.dumps)." if "'" in value else ""
        raise RecordError(f"is a string that is no JSON ({error}).{python}", name) from error
