"""One message as somebody writes it -> role and content.

    OpenAI        role and content, which may be a list of parts; so of ms-swift, with roles of its own
    ShareGPT      from and value (LLaMA-Factory src/llamafactory/data/converter.py, ff6d4d12ee)
    chat-ui       from and content (src/lib/types/Message.ts, 01b4c430c3)
    LangChain     type and content, also inside `data` or `kwargs` (langchain_core/messages, load/dump.py)

Keys that are not known here are kept: what a chat template does with a message is its own business.
"""

import json
from collections.abc import Mapping
from typing import Any

from nemo_kto.data.reading.records import RecordError, json_type, shown

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

_LANGCHAIN = {"human": "user", "ai": "assistant", "AIMessageChunk": "assistant", "system": "system", "tool": "tool"}
"""LangChain's `type` -> role."""

_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of parts that are text: of OpenAI's chat completions, and of its responses."""


def with_role(message: Any, name: str, number: int) -> Any:
    """Returns a message with role and content, whoever wrote it; what is no message of anybody's as it is.

    Args:
        message: The message.
        name: The field it is in.
        number: Which of the field's messages it is.

    Raises:
        RecordError: The speaker is unknown, or what a call of a tool says is no call.
    """
    if not isinstance(message, Mapping):
        return message
    if "role" in message:
        if message["role"] not in ("tool_response", "tool_call"):
            return message
        return _spoken(message["role"], message, "content", {**message}, name, number)
    if "from" in message:
        if message.get("value") is None and "content" in message:
            return _of_chat_ui(message, name, number)
        return _spoken(message["from"], message, "value", {}, name, number)
    return _of_langchain(message, name, number)


def is_message(value: Mapping[str, Any]) -> bool:
    """Whether an object is one message of somebody's."""
    if {"role", "from"} & {*value}:
        return True
    return "type" in value and bool({"content", "data", "kwargs"} & {*value})


def _spoken(speaker: Any, message: Any, key: str, rest: dict[str, Any], name: str, number: int) -> dict[str, Any]:
    role = _role(speaker, name, number)
    text = message.get(key)
    if role == "call":
        return _call(speaker, text, name, number)
    if text is None:
        raise RecordError(f", message {number}: '{key}' is {'null' if key in message else 'missing'}.", name)
    return {**rest, "role": role, "content": text}


def _role(speaker: Any, name: str, number: int) -> str:
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(_SPEAKERS)
        raise RecordError(f", message {number}: 'from' must be one of {known}, got {shown(speaker)}.", name)
    return role


def _call(speaker: Any, text: Any, name: str, number: int) -> dict[str, Any]:
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise RecordError(f", message {number}: the text of a {speaker} is no JSON ({error}).", name) from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RecordError(f", message {number}: a {speaker} needs 'name' and 'arguments'.", name)
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _of_chat_ui(message: Mapping[str, Any], name: str, number: int) -> dict[str, Any]:
    """What was said; not the scores, times and numbers that chat-ui keeps with it."""
    if message.get("files"):
        raise RecordError(f", message {number}: 'files' cannot be trained on; only text is.", name)
    found = {"role": _role(message["from"], name, number), "content": message["content"]}
    if message.get("reasoning"):
        found["reasoning_content"] = message["reasoning"]  # as templates call it
    return found


def _of_langchain(message: Mapping[str, Any], name: str, number: int) -> Any:
    inner = message.get("kwargs") if message.get("type") == "constructor" else message.get("data", message)
    if not isinstance(inner, Mapping) or "content" not in inner:
        return message
    kind = inner.get("type", message.get("type"))
    if kind in (None, "constructor") and isinstance(message.get("id"), list) and message["id"]:
        kind = str(message["id"][-1]).removesuffix("Message").lower()  # langchain.schema.messages.HumanMessage
    role = _LANGCHAIN.get(kind) if isinstance(kind, str) else None
    if role is None:
        if kind is None:
            return message
        known = ", ".join(_LANGCHAIN)
        raise RecordError(f", message {number}: 'type' must be one of {known}, got {shown(kind)}.", name)
    found: dict[str, Any] = {"role": role, "content": inner["content"]}
    found |= {key: inner[key] for key in ("name", "tool_call_id") if inner.get(key) is not None}
    calls = inner.get("tool_calls")
    extra = inner.get("additional_kwargs")
    if not calls and isinstance(extra, Mapping) and extra.get("tool_calls"):
        return {**found, "tool_calls": extra["tool_calls"]}  # as OpenAI wrote them, before LangChain had its own
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) and "name" in call for call in calls):
            raise RecordError(
                f", message {number}: 'tool_calls' must be a list of calls with 'name' and 'args'.", name
            )
        found["tool_calls"] = [_langchain_call(call) for call in calls]
    return found


def _langchain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    found = {"type": "function", "function": {"name": call["name"], "arguments": call.get("args", {})}}
    return {"id": call["id"], **found} if call.get("id") is not None else found


def joined_parts(parts: list[Any], name: str, number: int) -> str:
    """Returns the text of content that is a list of parts; a RecordError that names the first that is no text."""
    return "".join(_part(part, f", message {number}: 'content' has ", name) for part in parts)


def _part(part: Any, where: str, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RecordError(f"{where}a part that is a {json_type(part)}; only text is trained on.", name)
    kind = part.get("type", "text")
    if kind not in _TEXT_PARTS:
        raise RecordError(f"{where}a part of type {shown(kind)}; only text is trained on.", name)
    text = part.get("text")
    if not isinstance(text, str):
        what = f"is a {json_type(text)}" if "text" in part else "is missing"
        raise RecordError(f"{where}a part of type {shown(kind)} whose 'text' {what}.", name)
    return text
