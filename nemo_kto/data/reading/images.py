"""What the images of a row are, however they are written; what is in them is not looked at here."""

import base64
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from nemo_kto.data.reading.image_places import Written, is_image
from nemo_kto.data.reading.records import Image, RecordError, image_kind, json_type, shown
from nemo_kto.data.reading.spellings import image_in


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
            images += [_image(part["image"], source) for part in message["content"] if is_image(part)]
            parts = [{"type": "image"} if is_image(part) else part for part in message["content"]]
            message = {**message, "content": parts}
        messages.append(message)
    return messages, tuple(images)


def _image(written: Written, source: str) -> Image:
    try:
        return _read(written.value, source)
    except RecordError as error:
        raise RecordError(f", image {written.number}: {error.reason}", written.field, error.file) from error


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
    raise RecordError(f"{path} {what}.{beside}", file=path)


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
