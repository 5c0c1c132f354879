"""Prompts and responses as people write them -> strings, or chat messages with role and content."""

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_kto.data.reading.image_places import NO_IMAGES, Listed, placed
from nemo_kto.data.reading.json_strings import parsed_json
from nemo_kto.data.reading.records import EMPTY, MAX_NESTING, Messages, RecordError, json_type
from nemo_kto.data.reading.spellings import content_parts, is_message, with_role


def checked_answer(
    prompt: Any,
    response: Any,
    *,
    names: tuple[str, str],
    system: Any = None,
    system_name: str = "system",
    as_messages: bool = False,
    images: Listed = NO_IMAGES,
) -> tuple[str, str] | tuple[Messages, Messages]:
    """Returns prompt and response as a record holds them: both strings, or both messages if one of them is.

    Args:
        prompt: Text, or messages, or a single one.
        response: Text, or one assistant message, in a list or by itself.
        names: The fields that the two come from.
        system: A system prompt from a field of its own, None if there is none. Even an empty one makes messages of
            strings: all records of a file go the same way.
        system_name: That field.
        as_messages: Make messages of strings in any case.
        images: Those of the prompt that are in a column of their own; they too make messages of strings.

    Returns:
        Both; messages have images as `placed` puts them there.

    Raises:
        RecordError: One of them is of another type, empty, or the roles or the images do not fit.
    """
    prompt = _conversation(prompt, names[0])
    response = _conversation(response, names[1], len(prompt) if names[0] == names[1] else 0)
    as_messages = as_messages or system is not None or not (isinstance(prompt, str) and isinstance(response, str))
    if not as_messages and not images.values:
        if not response:
            raise RecordError(EMPTY[0], names[1])
        return prompt, response
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    if system is not None:
        prompt = _with_system(prompt, system, system_name)
    prompt, response = placed(prompt, response, images, names)
    _check_roles(prompt, response, names)
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


def _conversation(value: Any, name: str, before: int = 0) -> Any:
    """Text as it is; messages without keys that are null, and with content that is text, or text and images."""
    if isinstance(value, str):
        _check_text(value, name)
        return value
    if isinstance(value, dict) and is_message(value):
        value = [value]
    if not isinstance(value, list):
        raise RecordError(f"must be a string or a list of messages, not a {json_type(value)}.", name)
    if not value:
        raise RecordError("is an empty list of messages.", name)
    return [_message(message, name, number) for number, message in enumerate(value, start=before + 1)]


def _message(message: Any, name: str, number: int) -> dict[str, Any]:
    message = with_role(message, name, number)
    if not isinstance(message, dict):
        raise RecordError(f", message {number}: must be an object, not a {json_type(message)}.", name)
    result = {key: value for key, value in message.items() if value is not None}
    if isinstance(result.get("function_call"), dict) and not result.get("tool_calls"):  # OpenAI's first form
        result["tool_calls"] = [{"type": "function", "function": result.pop("function_call")}]
    needed = ("role",) if result.get("tool_calls") else ("role", "content")
    for key in needed:
        if key not in result:
            raise RecordError(f", message {number}: '{key}' {_absence(key, message)}.", name)
    text = result.get("content")
    if isinstance(text, list):
        result["content"] = content_parts(text, name, number)
        text = "".join(part.get("text", "") for part in result["content"])
    for key, kind in (("role", str), ("content", str | list)):
        if not isinstance(result.get(key, ""), kind):
            raise RecordError(f", message {number}: '{key}' must be a string, not a {json_type(result[key])}.", name)
    calls = result.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RecordError(f", message {number}: 'tool_calls' must be a list of objects.", name)
    _check_text({**result, "content": text}, name, f", message {number}: ")
    return result


_INSTEAD = ("refusal", "audio", "parts", "reasoning_content", "reasoning", "thinking")
"""Keys that say something where `content` does not."""


def _absence(key: str, message: Mapping[str, Any]) -> str:
    """What is true of a key that a message has to have."""
    problem = "is null" if key in message else "is missing"
    instead = next((other for other in _INSTEAD if message.get(other)), None) if key == "content" else None
    return problem if instead is None else f"{problem}, and what is in '{instead}' is not trained on"


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


def _with_system(prompt: Messages, system: Any, name: str) -> Messages:
    if not isinstance(system, str):
        raise RecordError(f"must be a string, not a {json_type(system)}.", name)
    _check_text(system, name)
    if not system:
        return prompt
    if prompt[0]["role"] == "system":
        raise RecordError("is set, and the messages begin with a system message as well.", name)
    return [{"role": "system", "content": system}, *prompt]


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
