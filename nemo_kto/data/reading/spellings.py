"""One message as somebody writes it -> role and content.

    OpenAI        role and content, which may be a list of parts; so of ms-swift, with roles of its own
    ShareGPT      from and value (LLaMA-Factory src/llamafactory/data/converter.py, ff6d4d12ee)
    chat-ui       from and content (src/lib/types/Message.ts, 01b4c430c3)
    LangChain     type and content, also inside `data` or `kwargs` (langchain_core/messages, load/dump.py)

Images are parts of the content, in the spellings of transformers' chat templates (src/transformers/processing_utils.py
5.23), Qwen (qwen_vl_utils), OpenAI, Anthropic and LangChain.

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
        raise RecordError(f", message {number}: 'files' cannot be trained on; write images into the content.", name)
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


def content_parts(parts: list[Any], name: str, number: int) -> list[dict[str, Any]]:
    """Returns content that is a list of parts, whoever wrote them.

    Args:
        parts: The list.
        name: See `with_role`.
        number: See `with_role`.

    Returns:
        `{"type": "text", "text": ...}` for text; for an image `{"type": "image", "image": ...}` with what `image_in`
        finds, or without it where the image is in a column.

    Raises:
        RecordError: A part is neither, or says nothing; it is named.
    """
    return [_part(part, f", message {number}: 'content' has ", name) for part in parts]


def _part(part: Any, where: str, name: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise RecordError(f"{where}a part that is a {json_type(part)}; only text and images are read.", name)
    bare = "image" if (part.get("image") or part.get("image_url")) and "text" not in part else "text"  # early Qwen's
    kind = part.get("type", bare)
    where = f"{where}a part of type {shown(kind)}"
    if kind in _IMAGE_PARTS:
        return _image_part(part, where, name)
    if kind not in _TEXT_PARTS:
        raise RecordError(f"{where}; only text and images are read.", name)
    text = part.get("text")
    if not isinstance(text, str):
        what = f"is a {json_type(text)}" if "text" in part else "is missing"
        raise RecordError(f"{where} whose 'text' {what}.", name)
    return {"type": "text", "text": text}


_IMAGE_PARTS = ("image", "image_url", "input_image")
"""Types of parts that are images: of transformers and Anthropic, of OpenAI's chat completions and its responses."""

_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "data", "bytes", "source")
"""Keys of a part, or of a struct, that hold an image or say where it is."""

_SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
"""Keys by which Qwen's own functions change one image's size."""

_ELSEWHERE = ("file_id", "file")
"""Keys that name an image which a service has."""


def _image_part(part: Mapping[str, Any], where: str, name: str) -> dict[str, Any]:
    size = next((key for key in _SIZES if part.get(key) is not None), None)
    if size is not None:
        raise RecordError(
            f"{where} with '{size}', which is not read: the model's preprocessor_config.json says it for all images.",
            name,
        )
    found, problem = image_in(part)
    if problem is not None:
        raise RecordError(f"{where} {problem}", name)
    if found is not None:
        return {"type": "image", "image": found}
    there = next((key for key in _ELSEWHERE if part.get(key) is not None), None)
    if there is not None:
        raise RecordError(f"{where} whose '{there}' names a file of a service; write the image's bytes.", name)
    if part.get("type") != "image":
        raise RecordError(f"{where} that holds no image.", name)
    index = part.get("index")
    return {"type": "image"} if index is None else {"type": "image", "index": index}


def image_in(found: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Returns the image that a part or a struct holds, and what is wrong with it; both None if it holds none.

    It is the name of a file, a data URI, base64 or bytes as they were written; `{"bytes": ...}` or `{"path": ...}`
    where nothing else can be meant.
    """
    there = {key: found[key] for key in _IMAGE_KEYS if found.get(key) not in (None, {})}
    if "bytes" in there and {*there} <= {"bytes", "path"}:  # of `datasets`, where the path is no more than a name
        return {"bytes": there["bytes"]}, None
    if len(there) > 1:
        return None, "that says more than once where its image is, in '" + "' and '".join(there) + "'; keep one."
    if not there:
        return None, None
    ((key, value),) = there.items()
    if key == "source" and isinstance(value, Mapping):  # Anthropic's
        key = {"base64": "data", "url": "url"}.get(str(value.get("type")), "file")
        if value.get(key) is None:
            return None, f"whose 'source' is of type {shown(value.get('type'))}; write the image's bytes as base64."
        value = value[key]
    elif key == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
        if value is None:
            return None, "whose 'image_url' has no 'url'."
    if key in ("base64", "data", "bytes"):
        return {"bytes": value}, None
    return {"path": value} if key == "path" else value, None
