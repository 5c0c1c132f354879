"""Prompts and responses as people write them -> strings, or chat messages with role and content.

What a chat template does with a message is its own business: keys that are not known here are kept.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_kto.data.reading.records import EMPTY, MAX_NESTING, Messages, RecordError, json_type, shown


def checked_answer(
    prompt: Any, response: Any, *, names: tuple[str, str], system: Any = None, system_name: str = "system"
) -> tuple[str, str] | tuple[Messages, Messages]:
    """Returns prompt and response as a record holds them.

    Args:
        prompt: Text, or messages.
        response: Text, or one assistant message, in a list or by itself; of the prompt's kind.
        names: The fields that the two come from.
        system: A system prompt from a field of its own, None if there is no such field. Even an empty one makes
            messages of strings: all records of a file go the same way.
        system_name: That field.

    Raises:
        RecordError: One of them is of another type, empty, or the roles do not fit.
    """
    if isinstance(response, dict):
        response = [response]
    prompt = _conversation(prompt, names[0])
    response = _conversation(response, names[1], len(prompt) if names[0] == names[1] else 0)
    if isinstance(prompt, str) != isinstance(response, str):
        raise RecordError(
            f"is a {json_type(prompt)} and field '{names[1]}' a {json_type(response)}; both must be strings or both "
            "lists of messages.",
            names[0],
        )
    if system is not None:
        prompt, response = _with_system(prompt, response, system, system_name)
    if isinstance(prompt, list):
        _check_roles(prompt, response, names)
    elif not response:
        raise RecordError(EMPTY[0], names[1])
    return prompt, response


def split_conversation(messages: Any, name: str) -> tuple[Messages, Messages]:
    """Returns a conversation's prompt and its last message, the answer; raises a RecordError for anything else."""
    if not isinstance(messages, list):
        raise RecordError(f"must be a list of messages, not a {json_type(messages)}.", name)
    if len(messages) < 2:
        raise RecordError("must hold at least two messages, the last one the rated answer.", name)
    return messages[:-1], messages[-1:]


def checked_tools(value: Any, name: str) -> list[Any] | None:
    """Returns the tools of a record: a list, or None for none; raises a RecordError for anything else."""
    value = parsed_json(value, name)
    if value in (None, "", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RecordError("must be a list of objects, the tools' JSON schemas.", name)
    _check_text(value, name)
    return value


def checked_kwargs(value: Any, name: str) -> dict[str, Any] | None:
    """Returns variables for the chat template, or None for none; raises a RecordError for anything but an object."""
    value = parsed_json(value, name)
    if value in (None, "", {}):
        return None
    if not isinstance(value, dict):
        raise RecordError(f"must be an object, not a {json_type(value)}.", name)
    _check_text(value, name)
    taken = sorted(
        {"conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize"} & {*value}
    )
    if taken:
        raise RecordError(f"must not set '{taken[0]}'.", name)
    return value


def parsed_json(value: Any, name: str) -> Any:
    """The value of a field that may hold its JSON as a string, as tables do; a RecordError if it is none."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"is a string that is no JSON ({error}).", name) from error


def _conversation(value: Any, name: str, before: int = 0) -> Any:
    """Text as it is; messages without keys that are null, and with content that is text."""
    if isinstance(value, str):
        _check_text(value, name)
        return value
    if not isinstance(value, list):
        raise RecordError(f"must be a string or a list of messages, not a {json_type(value)}.", name)
    if not value:
        raise RecordError("is an empty list of messages.", name)
    return [_message(message, name, index) for index, message in enumerate(value, start=before + 1)]


def turns(value: Any, name: str) -> Any:
    """Returns a conversation with ShareGPT's and ms-swift's messages written as role and content.

    Args:
        value: The conversation, or its JSON as tables hold it; a single message counts as one of one.
        name: Its field.

    Raises:
        RecordError: A speaker is unknown, or a call is no JSON.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = parsed_json(value, name)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_turn(message, name, number) for number, message in enumerate(value, start=1)]


_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
"""ShareGPT's `from`, or the roles that ms-swift has besides the usual ones -> role, or "call" for a call of a tool."""


def _turn(message: Any, name: str, number: int) -> Any:
    if not isinstance(message, dict):
        return message
    if "role" in message:
        speaker, text, rest = message["role"], message.get("content"), message
        if speaker not in ("tool_response", "tool_call"):
            return message
    elif "from" in message:
        speaker, text, rest = message["from"], message.get("value"), {}
    else:
        return message
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RecordError(
            f", message {number}: 'from' must be one of {', '.join(_SPEAKERS)}, got {shown(speaker)}.", name
        )
    if role != "call":
        return {**rest, "role": role, "content": text}
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise RecordError(f", message {number}: the text of a {speaker} is no JSON ({error}).", name) from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RecordError(f", message {number}: a {speaker} needs 'name' and 'arguments'.", name)
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _message(message: Any, name: str, index: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RecordError(f", message {index}: must be an object, not a {json_type(message)}.", name)
    result = {key: value for key, value in message.items() if value is not None}
    needed = ("role",) if result.get("tool_calls") else ("role", "content")
    for key in needed:
        if key not in result:
            problem = "is null" if key in message else "is missing"
            raise RecordError(f", message {index}: '{key}' {problem}.", name)
    if isinstance(result.get("content"), list):
        result["content"] = _joined_parts(result["content"], name, index)
    for key in ("role", "content"):
        if not isinstance(result.get(key, ""), str):
            raise RecordError(f", message {index}: '{key}' must be a string, not a {json_type(result[key])}.", name)
    calls = result.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RecordError(f", message {index}: 'tool_calls' must be a list of objects.", name)
    if calls:
        result["tool_calls"] = [_call(call) for call in calls]
    _check_text(result, name, f", message {index}: ")
    return result


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments, which OpenAI writes as JSON in a string, are what chat templates expect: an object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call  # what the model wrote is no JSON: it stays as it was written
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _joined_parts(parts: list[Any], name: str, index: int) -> str:
    """The text of content that is a list of parts, OpenAI's way."""
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) != len(parts):
        raise RecordError(f", message {index}: 'content' has parts that are no text; only text is trained on.", name)
    return "".join(strings)


def _check_text(value: Any, name: str, where: str = "", depth: int = MAX_NESTING) -> None:
    if depth < 0:
        raise RecordError("is nested too deeply.", name)
    # JSON can spell half of a surrogate pair; no tokenizer takes it, and its own error would not name the line.
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            reason = f"holds half of a surrogate pair at character {error.start + 1}, which is not text."
            raise RecordError(where + reason, name) from error
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check_text(key, name, where)
            _check_text(inner, name, where or f", '{key}': ", depth - 1)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for inner in value:
            _check_text(inner, name, where, depth - 1)
    elif value is not None and not isinstance(value, bool | int | float):
        raise RecordError(f"{where}holds a {json_type(value)}, which is not JSON.", name)


def _with_system(prompt: Any, response: Any, system: Any, name: str) -> tuple[Messages, Messages]:
    if not isinstance(system, str):
        raise RecordError(f"must be a string, not a {json_type(system)}.", name)
    _check_text(system, name)
    if isinstance(prompt, str):
        prompt, response = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": response}]
    if not system:
        return prompt, response
    if prompt[0]["role"] == "system":
        raise RecordError("is set, and the messages begin with a system message as well.", name)
    return [{"role": "system", "content": system}, *prompt], response


def _check_roles(prompt: Messages, response: Messages, names: tuple[str, str]) -> None:
    together = names[0] == names[1]
    if prompt[-1]["role"] == "assistant" and not together:
        raise RecordError(
            f"ends with an assistant message; the answer that was rated belongs into '{names[1]}'.", names[0]
        )
    if len(response) != 1 or response[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in response)
        what = "must end with the rated answer, a message" if together else "must hold exactly one message,"
        raise RecordError(f"{what} of role 'assistant'; got: {roles}.", names[1])
    if prompt[-1]["role"] == "assistant":
        raise RecordError("ends with two assistant messages; only the last one is the rated answer.", names[0])
    if not response[0].get("content") and not response[0].get("tool_calls"):
        raise RecordError(EMPTY[1] if together else EMPTY[0], names[1])
