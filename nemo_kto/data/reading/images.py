"""Images of a row: where in a prompt they stand, and what they are, however both are written.

A place is a part of a message, or a mark in its text, or in front of what the user says first, as TRL has it
(`prepare_multimodal_messages` of trl/data_utils.py, 1.16). Marks are those of LLaMA-Factory (data/mm_plugin.py, 0.9.5)
and ms-swift. What is in an image is not looked at here.
"""

import base64
import os
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from nemo_kto.data.reading.records import Image, Messages, RecordError, image_kind, json_type, shown
from nemo_kto.data.reading.spellings import image_in

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
    if any(_is_image(part) for message in answer for part in _parts(message)):
        raise RecordError("has an image in the rated answer; images stand in the prompt only.", names[1])
    if listed.values and not any(_is_image(part) for message in prompt for part in _parts(message)):
        prompt = _with_places(prompt, answer, listed, names)
    prompt = _filled(prompt, listed, names[0])
    return [_joined(message) for message in prompt], [_joined(message) for message in answer]


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content", "")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _is_image(part: Mapping[str, Any]) -> bool:
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
    return {**message, "content": parts} if any(map(_is_image, parts)) else message


def _filled(prompt: Messages, listed: Listed, name: str) -> Messages:
    """The messages with an image in each part for one: its own, or the next one of the column."""
    places = [part for message in prompt for part in _parts(message) if _is_image(part)]
    empty = [part for part in places if "image" not in part]
    if len(empty) != len(listed.values):
        raise RecordError(
            f'has {_several(len(empty), "part")} {{"type": "image"}} without an image of their own, and '
            f"'{listed.column}' holds {_several(len(listed.values), 'image')}; there must be one for each.",
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
        if not _is_image(part):
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
    if not isinstance(content, list) or any(map(_is_image, content)):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def _several(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def taken_out(prompt: Any, source: str) -> tuple[Any, tuple[Image, ...]]:
    """Returns a prompt as a record has it, and its images.

    Args:
        prompt: Text, or messages as `placed` returns them.
        source: Where the row was read, see `FeedbackRecord`: what file names are relative to.

    Raises:
        RecordError: An image is no file and no bytes.
    """
    if isinstance(prompt, str) or not any(isinstance(message.get("content"), list) for message in prompt):
        return prompt, ()
    images, messages = [], []
    for message in prompt:
        if isinstance(message.get("content"), list):
            images += [_image(part["image"], source) for part in message["content"] if _is_image(part)]
            parts = [{"type": "image"} if _is_image(part) else part for part in message["content"]]
            message = {**message, "content": parts}
        messages.append(message)
    return messages, tuple(images)


def _image(written: Written, source: str) -> Image:
    try:
        return _read(written.value, source)
    except RecordError as error:
        raise RecordError(f", image {written.number}: {error.reason}", written.field) from error


def _read(value: Any, source: str) -> Image:
    while isinstance(value, Mapping):
        if {*value} == {"bytes"}:
            return Image(data=_bytes(value["bytes"]))
        if {*value} == {"path"}:
            return _file(value["path"], source)
        found, problem = image_in(value)
        if found is None:
            raise RecordError(f"is an object {problem or 'that holds no image.'}")
        value = found
    if isinstance(value, bytes):
        return Image(data=_bytes(value))
    if not isinstance(value, str):
        raise RecordError(f"must be the name of a file, a data URI, base64 or bytes, not a {json_type(value)}.")
    if value[:5].lower() == "data:":
        return Image(data=_from_data_uri(value))
    # a name that is there counts before what else its characters could mean
    if _starts_as_image(value) and not os.path.isfile(_absolute(value, source) or ""):
        return Image(data=_bytes(value))
    return _file(value, source)


def _bytes(value: Any) -> bytes:
    """The bytes that a value is, or that it spells in base64."""
    if isinstance(value, str):
        value = _from_data_uri(value) if value[:5].lower() == "data:" else _from_base64(value)
    if not isinstance(value, bytes):
        raise RecordError(f"must be bytes, or their base64, not a {json_type(value)}.")
    if not value:
        raise RecordError("is empty.")
    return value


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise RecordError(f"is no base64 ({error}).") from error


def _from_data_uri(text: str) -> bytes:
    head, comma, data = text.partition(",")
    kind, *settings = head[5:].lower().split(";")
    if not comma or "base64" not in settings:
        raise RecordError("is a data URI without base64; write data:image/png;base64,... .")
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise RecordError(f"is a data URI of type {shown(kind)}, and no image.")
    return _bytes(_from_base64(data))


_BEGINNING = 24
"""Characters of base64 that spell enough bytes to tell an image by."""


def _starts_as_image(text: str) -> bool:
    """Whether a text begins as the base64 of an image does."""
    try:
        return (
            image_kind(base64.b64decode("".join(text[: 2 * _BEGINNING].split())[:_BEGINNING], validate=True))
            is not None
        )
    except ValueError:
        return False


_LONGEST = 4096
"""Characters of a file's name that a system takes."""


def _file(name: Any, source: str) -> Image:
    if not isinstance(name, str):
        raise RecordError(f"must be the name of a file, not a {json_type(name)}.")
    if not name.strip():
        raise RecordError("is an empty string.")
    if len(name) > _LONGEST:
        raise RecordError("is neither the name of a file nor the base64 of an image.")
    if re.match(r"[a-z][a-z0-9+.-]*:/", name, re.IGNORECASE) and not _FILE_URI.match(name):
        raise RecordError(
            f"{shown(name)} is an address, and training has no network: download the image, and name its file."
        )
    path = _absolute(name, source)
    if path is None:
        raise RecordError(
            f"{shown(name)} is relative, and {source} is no file that it could lie beside; name it from the root."
        )
    if os.path.isfile(path):
        return Image(file=path)
    what = "is no file" if os.path.exists(path) else "is not there"
    beside = "" if os.path.isabs(_local(name)) else " Names are relative to the folder of the data."
    raise RecordError(f"{path} {what}.{beside}")


def _absolute(name: str, source: str) -> str | None:
    """A file's name from the root; None if it is relative and there is nothing that it could be relative to."""
    path = _local(name)
    if os.path.isabs(path):
        return path
    place = Path(source).absolute()
    folder = place if place.is_dir() else place.parent if place.is_file() else None
    if folder is None:
        return None
    # what is behind a link is not above it, so that only a name without `..` can be shortened
    return os.path.join(folder, path if ".." in path else os.path.normpath(path))


_FILE_URI = re.compile(r"file:(?://(?:localhost)?(?=/))?(?!//)", re.IGNORECASE)


def _local(name: str) -> str:
    """A file's name as the system takes it."""
    uri = _FILE_URI.match(name)
    return os.path.expanduser(name if uri is None else unquote(name[uri.end() :]))
