"""`FeedbackRecord`, the one type between the readers of feedback files and tokenisation; and what a bad one is."""

import base64
import json
import os
import re
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
MAX_NESTING = 100
"""Lists and objects inside each other; Python gives up at several hundred, where one record must not end a run."""

EMPTY = (
    "is empty; there is nothing to learn from.",
    "ends with an empty answer; there is nothing to learn from.",
    "the response has no tokens.",
)
"""Reasons of bad records that have no answer: no characters, or none that the tokenizer knows."""


_BEGINNINGS = {
    "png": rb"\x89PNG\r\n\x1a\n",
    "jpeg": rb"\xff\xd8\xff",
    "gif": rb"GIF8[79]a",
    "webp": rb"RIFF.{4}WEBP",
    "bmp": rb"BM.{4}\0{4}",
    "tiff": rb"II\*\0|MM\0\*",
}
"""Kinds of images -> with what their files begin."""


def image_kind(data: bytes) -> str | None:
    """Returns what kind of image some bytes begin as, None for none of those that people have."""
    return next((kind for kind, start in _BEGINNINGS.items() if re.match(start, data, re.DOTALL)), None)


@dataclass(frozen=True, slots=True)
class Image:
    """Where an image of a record is: exactly one of the two is set.

    Attributes:
        file: The file, as it can be opened.
        data: Its bytes, as a PNG or JPEG file has them.
    """

    file: str | None = None
    data: bytes | None = None

    def __post_init__(self) -> None:
        if (self.file is None) == (self.data is None):
            raise ValueError("an Image is either a file or data")

    def written(self) -> str:
        """The image as a file of records has it: the file's name from the root, or its bytes as a data URI."""
        if self.data is None:
            return os.path.join(os.getcwd(), self.file or "")
        kind = image_kind(self.data)
        media_type = "application/octet-stream" if kind is None else f"image/{kind}"
        return f"data:{media_type};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True, slots=True)
class FeedbackRecord:
    """One piece of binary feedback and where it was read.

    Attributes:
        prompt: The prompt as text, or as chat messages that end before the assistant's answer.
        response: The answer as text, or as a list of exactly one assistant message; of the prompt's kind. Calls of
            tools are as they were written: `arguments` may be an object, or a string with its JSON.
        desirable: True for thumbs up.
        source: Path of the file, or name of the data set, it came from.
        line: Line in that file, counted from 1; where there are no lines, the number of the record.
        tools: JSON schemas of the tools that the chat template is told of.
        template_kwargs: Other variables for the chat template.
        weight: What its loss is multiplied with.
        images: The images of the prompt, in the order of its parts `{"type": "image"}`; a record with images is made
            of messages, whose content is a list of such parts and of `{"type": "text", "text": ...}` where it has one.
    """

    prompt: str | Messages
    response: str | Messages
    desirable: bool
    source: str
    line: int
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None
    weight: float = 1.0
    images: tuple[Image, ...] = ()

    @property
    def place(self) -> str:
        """`file:line`, the way error messages name the record."""
        return f"{self.source}:{self.line}"

    def row(self) -> dict[str, Any]:
        """The record as a row of format `trl`; reading that gives the same record."""
        row: dict[str, Any] = {"prompt": self.prompt, "completion": self.response, "label": self.desirable}
        if self.tools is not None:
            row["tools"] = self.tools
        if self.template_kwargs is not None:
            row["chat_template_kwargs"] = self.template_kwargs
        if self.weight != 1:
            row["weight"] = self.weight
        if self.images:
            row["images"] = [image.written() for image in self.images]
        return row


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used.

    Attributes:
        source: See `FeedbackRecord`.
        line: See `FeedbackRecord`.
        field: Name of the field at fault; None if it is the whole record.
        reason: What is wrong, to be read behind the field's name.
        file: The file beside the data that is at fault, from the root: of an image; None for none.
    """

    source: str
    line: int
    field: str | None
    reason: str
    file: str | None = None

    def row(self) -> dict[str, Any]:
        """What a list of bad records says of it."""
        return {"source": self.source, "line": self.line, "field": self.field, "reason": self.reason}

    def __str__(self) -> str:
        """`file:line: field 'x' is wrong.`"""
        return f"{self.source}:{self.line}: {RecordError(self.reason, self.field)}"


class RecordError(Exception):
    """Raised where a record turns out to be bad; whoever knows file and line makes a `BadRecord` of it."""

    def __init__(self, reason: str, field: str | None = None, file: str | None = None) -> None:
        """Keeps the reason, the name of the field and the file at fault; see `BadRecord`."""
        self.reason = printable(reason)
        self.file = file
        self.field = None if field is None else printable(field)
        super().__init__(self.reason, self.field)

    def __str__(self) -> str:
        """The reason, behind the field's name."""
        if self.field is None:
            return self.reason
        return f"field '{self.field}'{'' if self.reason.startswith(',') else ' '}{self.reason}"

    def at(self, source: str, line: int) -> BadRecord:
        """What is bad there."""
        return BadRecord(source, line, self.field, self.reason, self.file)


def json_type(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """The beginning of a value as JSON, for messages."""
    try:
        return printable(json.dumps(value, ensure_ascii=False)[:80])
    except (TypeError, ValueError, RecursionError):
        return json_type(value)


def printable(text: str) -> str:
    """Text that can be written anywhere: half of a surrogate pair, which JSON can spell, cannot."""
    return text.encode("utf-8", "backslashreplace").decode()
