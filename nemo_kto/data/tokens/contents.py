"""What a message says, be it a text or, where it shows images, a list of parts: texts and places of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_kto.data.reading.records import Messages

if TYPE_CHECKING:
    from torch import Tensor

IMAGE = "image"
"""Type of the part of a message that stands for an image."""


def texts_of(message: dict[str, Any]) -> list[str]:
    """Returns the texts of a message, in order; one for a message that is a text."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]


def images_in(messages: Messages) -> int:
    """Returns how many images some messages show."""
    contents = (message.get("content") for message in messages)
    return sum(part["type"] == IMAGE for content in contents if isinstance(content, list) for part in content)


def in_brief(tokens: Tensor, image_token_id: int | None) -> Tensor:
    """Returns tokens for people to read: with one of those that stand for an image, of many behind each other."""
    if image_token_id is None:
        return tokens
    is_image = tokens == image_token_id
    repeats = is_image.clone()
    repeats[:1] = False
    repeats[1:] &= is_image[:-1]
    return tokens[~repeats]


def as_parts(messages: Messages) -> Messages:
    """Returns messages all of whose contents are lists of parts."""
    return [
        {**message, "content": [_text_part(message["content"])]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def joined(contents: list[Any]) -> Any:
    """Returns several contents as one, an empty line between them; a text if all are."""
    contents = [content for content in contents if content]
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(contents)
    parts: list[dict[str, Any]] = []
    for content in contents:
        more = [_text_part(content)] if isinstance(content, str) else content
        last, first = (parts[-1] if parts else None), more[0]
        if last is None or last["type"] != "text":
            parts += more
        elif first["type"] == "text":
            parts[-1:] = [_text_part(f"{last['text']}\n\n{first['text']}"), *more[1:]]
        else:
            parts[-1:] = [_text_part(f"{last['text']}\n\n"), *more]
    return parts


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
