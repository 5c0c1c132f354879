"""Where in a prompt the images of a row stand.

A place is a part of a message, or a mark in its text, or in front of what the user says first, as TRL has it
(`prepare_multimodal_messages` of trl/data_utils.py, 1.16). Marks are those of LLaMA-Factory (data/mm_plugin.py, 0.9.5)
and ms-swift (template/base.py, 4.6).
"""

import re
from collections.abc import Mapping
from itertools import count
from typing import Any, NamedTuple

from nemo_kto.data.reading.records import Messages, RecordError, shown

MARK = "<image>"
"""What LLaMA-Factory and ms-swift write into texts where an image stands."""


class Listed(NamedTuple):
    """The images of a row that are in a column of their own, and the column."""

    column: str
    values: list[Any]


NO_IMAGES = Listed("images", [])


class Written(NamedTuple):
    """An image as a row has it: its field, the number that messages call it by there, and what stands there."""

    field: str
    number: int
    value: Any


def placed(prompt: Messages, answer: Messages, listed: Listed, names: tuple[str, str]) -> tuple[Messages, Messages]:
    """Returns messages with each image in its place, and content that is text alone as a string.

    Args:
        prompt: The messages; content is a string, or a list of parts as `content_parts` returns them.
        answer: What the prompt was answered with, of the same form; it may not hold images.
        listed: The images of the column.
        names: The fields that the two come from.

    Returns:
        Both, with parts `{"type": "image", "image": Written(...)}` and `{"type": "text", ...}` in the prompt.

    Raises:
        RecordError: There are more places than images, or fewer, or one is in the answer.
    """
    if any(is_image(part) for message in answer for part in _parts(message)):
        raise RecordError("has an image in the rated answer; images stand in the prompt only.", names[1])
    if listed.values and not any(is_image(part) for message in prompt for part in _parts(message)):
        prompt = _with_places(prompt, answer, listed, names)
    prompt = _filled(prompt, listed, names[0])
    return [_joined(message) for message in prompt], [_joined(message) for message in answer]


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content", "")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def is_image(part: Mapping[str, Any]) -> bool:
    """Whether a part of a message is an image."""
    return bool(part["type"] == "image")


def _with_places(prompt: Messages, answer: Messages, listed: Listed, names: tuple[str, str]) -> Messages:
    """The messages with parts for the images of a column: where their texts have marks, or else in front."""
    wanted = len(listed.values)
    marks, more = _marks(prompt), _marks(answer)
    if marks == wanted:
        return [_divided(message) for message in prompt]
    if marks or more:
        there = f"the prompt has {_several(marks, f'mark {MARK}', f'marks {MARK}')}"
        there += f" and the answer {more}" if more else ""
        raise RecordError(
            f"holds {_several(wanted, 'image')}, and {there}; there must be one for each.", listed.column
        )
    for place, message in enumerate(prompt):
        if message["role"] == "user" and isinstance(message.get("content"), str):
            parts = [*({"type": "image"} for _ in range(wanted)), *_parts(message)]
            return [*prompt[:place], {**message, "content": parts}, *prompt[place + 1 :]]
    raise RecordError(
        f'holds {_several(wanted, "image")}, and nothing says where: put parts {{"type": "image"}} into the messages.',
        listed.column,
    )


def _marks(messages: Messages) -> int:
    return sum(part["text"].count(MARK) for message in messages for part in _parts(message))


def _divided(message: dict[str, Any]) -> dict[str, Any]:
    """A message with parts for the marks in its text."""
    parts = []
    for part in _parts(message):
        for piece in re.split(f"({MARK})", part["text"]):
            if piece:
                parts.append({"type": "image"} if piece == MARK else {"type": "text", "text": piece})
    return {**message, "content": parts} if any(map(is_image, parts)) else message


def _filled(prompt: Messages, listed: Listed, name: str) -> Messages:
    """The messages with an image in each part for one: its own, or the next one of the column."""
    places = [part for message in prompt for part in _parts(message) if is_image(part)]
    empty = [part for part in places if "image" not in part]
    if len(empty) != len(listed.values):
        raise RecordError(
            f'has {_several(len(empty), "part")} {{"type": "image"}} to be filled from '
            f"'{listed.column}', which holds {_several(len(listed.values), 'image')}; there must be one for each.",
            name,
        )
    for place, part in enumerate(empty):
        if part.get("index", place) != place:
            raise RecordError(
                f"has image {place + 1} with 'index' {shown(part['index'])}; images are in the order of their parts.",
                name,
            )
    numbers, column = count(1), count(1)

    def fill(part: dict[str, Any]) -> dict[str, Any]:
        if not is_image(part):
            return part
        number = next(numbers)
        if "image" in part:
            return {"type": "image", "image": Written(name, number, part["image"])}
        number = next(column)
        return {"type": "image", "image": Written(listed.column, number, listed.values[number - 1])}

    if not places:
        return prompt
    return [
        {**message, "content": [*map(fill, message["content"])]}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """A message with parts that are all text as one with a string, as most people write it."""
    content = message.get("content")
    if not isinstance(content, list) or any(map(is_image, content)):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def _several(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"
