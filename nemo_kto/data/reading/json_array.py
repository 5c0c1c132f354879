"""A JSON array of any length, one element at a time: Python's `json` reads whole texts only."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from nemo_kto.errors import DataError

_DECODER = json.JSONDecoder()


def array_elements(chunks: Iterator[bytes], name: str) -> Iterator[tuple[int, Any]]:
    """Yields (line on which it begins, value) of each element.

    Args:
        chunks: The UTF-8 text of the array, in pieces of any length; it begins with "[" or white space.
        name: Of the file, for messages.

    Raises:
        DataError: The text is no array, or no UTF-8.
    """
    text = _Text(name, chunks)
    if text.next_character() != "[":
        raise text.error("it does not begin with an array")
    text.take()
    while (character := text.next_character()) != "]":
        line = text.line
        yield line, text.take_value()
        character = text.next_character()
        if character == ",":
            text.take()
            character = text.next_character()
            if character == "]":
                raise text.error("a comma before the array's end")
        elif character != "]":
            raise text.error("the array goes on without a comma" if character else "the array does not end")
    text.take()
    if text.next_character():
        raise text.error("something follows the array")


_SPACE = re.compile(r"[ \t\r\n]*")


class _Text:
    """The text of a file of which only a part is in memory: a window that is moved on as it is read."""

    def __init__(self, name: str, chunks: Iterator[bytes]) -> None:
        self._name = name
        self._decoded = codecs.iterdecode(chunks, "utf-8-sig")
        self._window = ""
        self._place = 0
        self.line = 1

    def error(self, reason: str) -> DataError:
        return DataError(f"{self._name}:{self.line}: {reason}; the file must be one JSON array of objects.")

    def next_character(self) -> str:
        """The next one that is no space, "" at the end; it is not taken."""
        while True:
            end = _SPACE.match(self._window, self._place).end()  # type: ignore[union-attr]  # it matches nothing, too
            self._move(end)
            if end < len(self._window) or not self._read():
                return self._window[end : end + 1]

    def take(self, length: int = 1) -> None:
        self._move(self._place + length)

    def take_value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._place)
            except json.JSONDecodeError as error:
                position = error.pos - self._place
                if not self._read():
                    self._move(position)
                    raise self.error(f"no valid JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise self.error(f"the JSON cannot be read ({error})") from error
            else:
                self._move(end)
                return value

    def _move(self, place: int) -> None:
        self.line += self._window.count("\n", self._place, place)
        self._place = place

    def _read(self) -> bool:
        """Appends to the window, at least as much as is left in it; False at the end of the file."""
        self._window, self._place = self._window[self._place :], 0
        wanted = 2 * len(self._window)
        more = False
        try:
            while len(self._window) <= wanted and (text := next(self._decoded, "")):
                self._window += text
                more = True
        except UnicodeDecodeError as error:
            self.line += self._window.count("\n") + error.object.count(b"\n", 0, error.start)
            raise self.error(f"the text is not UTF-8 ({error.reason})") from error
        return more
