"""Strings that are the JSON of messages, as tables hold them; and strings that only look like it.

Whether a column's strings are messages or text is settled once for a file (`settling.py`), of whatever kind it is.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nemo_kto.data.reading.paths import opened
from nemo_kto.data.reading.records import RecordError
from nemo_kto.data.reading.spellings import is_message

JSON_STRINGS = ("auto", "messages", "text")
"""Values of `model.data.json_strings`."""

Reading = Literal["json", "no_json", "either", "messages", "text"]
"""How strings are read: all are JSON, none may be, each is what it is; what spells messages is JSON; all are text."""

CHOICE = (
    "set model.data.json_strings=messages to read what spells messages, or model.data.json_strings=text to take all "
    "for text."
)
_AS_PYTHON = re.compile(r"\s*\[?\s*\{\s*'(role|from|content|value|type)':")


def messages_in(text: str) -> Any:
    """Returns the messages whose JSON a string is, or the single one; None for any other text."""
    if not re.match(r'\s*(\[\s*)?\{\s*"', text):
        return None
    value = opened(text)
    return value if _are_messages(value if isinstance(value, list) else [value]) else None


def _objects_in(text: str) -> Any:
    """The object, or the list of objects, whose JSON a string is."""
    value = opened(text)
    if isinstance(value, list):
        inner = value[0] if len(value) == 1 and isinstance(value[0], list) else value  # as a batch of one
        return value if inner and all(isinstance(one, Mapping) for one in inner) else None
    return value if isinstance(value, Mapping) else None


def _exported_messages_in(text: str) -> Any:
    """The messages, or the object around them, whose JSON a string is."""
    value = _objects_in(text)
    if isinstance(value, Mapping):
        return value if is_message(value) or {"messages", "message", "generations", "choices"} & {*value} else None
    inner = value[0] if value and isinstance(value[0], list) else value or []
    return value if inner and all(is_message(one) for one in inner) else None


def _are_messages(values: list[Any]) -> bool:
    """Whether all have a speaker, and one of them something to say."""
    if not all(isinstance(value, Mapping) and {"role", "from"} & {*value} for value in values):
        return False
    return any({"content", "value", "tool_calls"} & {*value} for value in values)


@dataclass(frozen=True, slots=True)
class Spelling:
    """What strings may spell.

    Attributes:
        what: Its name, for messages.
        find: Text -> what it spells, None for nothing.
        find_messages: The same, only if there are messages in it.
    """

    what: str
    find: Callable[[str], Any]
    find_messages: Callable[[str], Any]


MESSAGES = Spelling("messages", messages_in, messages_in)
OBJECTS = Spelling("an object", _objects_in, _exported_messages_in)


def settled_reading(strings: Iterable[str], spelling: Spelling) -> Reading | tuple[str, str]:
    """Returns how a column's strings are read; where some are JSON and others are not, the first of either kind."""
    first: dict[bool, str] = {}
    for text in strings:
        if text.strip() and not _AS_PYTHON.match(text):
            first.setdefault(spelling.find(text) is not None, text)
    if len(first) == 2:
        return first[True], first[False]
    if not first:
        return "either"
    return "json" if True in first else "no_json"


def read_string(text: str, column: str, reading: Reading, spelling: Spelling) -> Any:
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
    found = spelling.find_messages(text) if reading == "messages" else spelling.find(text)
    if found is None and reading == "json":
        if not text.strip():
            raise RecordError(f"is empty, where the file's other rows hold the JSON of {spelling.what}.", column)
        raise RecordError(f"is text, where the file's other rows hold the JSON of {spelling.what}: {CHOICE}", column)
    if found is not None and reading == "no_json":
        raise RecordError(f"is the JSON of {spelling.what}, where the file's other rows hold text: {CHOICE}", column)
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
