"""The arguments of tool calls, which people write in two forms: an object, or its JSON in a string as OpenAI does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from nemo_kto.data.reading.records import Messages


def calls_of(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields what a message's tool calls say: objects with `name` and `arguments`, if they are there."""
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        if isinstance(function, dict):
            yield function


def arguments_of(message: dict[str, Any]) -> list[Any]:
    """Returns the arguments of a message's tool calls, as they are written."""
    return [function["arguments"] for function in calls_of(message) if "arguments" in function]


def with_arguments(messages: Messages, convert: Callable[[Any], Any]) -> Messages:
    """Returns messages with other arguments."""

    def call(of: dict[str, Any]) -> dict[str, Any]:
        if isinstance(of.get("function"), dict):
            return {**of, "function": call(of["function"])}
        return {**of, "arguments": convert(of["arguments"])} if "arguments" in of else of

    return [
        {**message, "tool_calls": [call(of) for of in message["tool_calls"]]} if message.get("tool_calls") else message
        for message in messages
    ]


def as_object(arguments: Any) -> Any:
    """Returns the object that a string spells, and everything else as it is: what a model wrote may be no JSON."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def as_string(arguments: Any) -> Any:
    """Returns an object's JSON, and everything else as it is."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def quoted_twice(messages: Messages, text: str) -> bool:
    """Returns whether a text has arguments that are JSON in a string as a JSON string."""
    written = (value for message in messages for value in arguments_of(message) if isinstance(value, str))
    return any(
        isinstance(as_object(value), dict) and json.dumps(value, ensure_ascii=False) in text for value in written
    )


def leaves(value: Any) -> Iterator[str]:
    """Yields keys and values of arguments as text; true, false and null have too many spellings to be looked for."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)
