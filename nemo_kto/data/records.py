"""Feedback files -> `FeedbackRecord`, the one type between the readers and tokenisation.

Two layouts of JSON Lines (one object per line, UTF-8, blank lines skipped) are read:

    nemo_aligner   {"prompt": ..., "response": ..., "preference": "chosen" | "rejected"}
    trl            {"prompt": ..., "completion": ..., "label": true | false}

In both, prompt and response are either two strings or two lists of messages `{"role": ..., "content": ...}`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_kto.errors import ConfigError, DataError

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class FeedbackRecord:
    """One piece of binary feedback and where it was read.

    Attributes:
        prompt: The prompt as text, or as chat messages that end before the assistant's answer.
        response: The answer as text, or as a list of exactly one assistant message; of the prompt's kind.
        desirable: True for thumbs up.
        source: Path of the file it came from.
        line: Line in that file, counted from 1.
    """

    prompt: str | Messages
    response: str | Messages
    desirable: bool
    source: str
    line: int

    @property
    def place(self) -> str:
        """`file:line`, the way error messages name the record."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class _Layout:
    """Field names of a file format and the values its label field may take."""

    response: str
    label: str
    label_values: Mapping[Any, bool]


_LAYOUTS = {
    "nemo_aligner": _Layout("response", "preference", {"chosen": True, "rejected": False}),
    "trl": _Layout("completion", "label", {True: True, False: False}),
}
FORMATS = ("auto", *_LAYOUTS)


def read_feedback(paths: Sequence[str | Path], *, format: str = "auto") -> list[FeedbackRecord]:
    """Reads every record of the given JSONL files, in order.

    Args:
        paths: The files; at least one.
        format: "nemo_aligner", "trl", or "auto", which decides for each file from the fields of its first record.

    Raises:
        DataError: A file is missing, empty or not JSON Lines, or a record lacks a field or has a wrong value in
            it; the message names file, line and field.
        ConfigError: `format` is none of the names above.
    """
    if format not in FORMATS:
        raise ConfigError(f"Unknown data format {format!r}; use one of {', '.join(FORMATS)}.")
    if not paths:
        raise DataError("No data file was given; name at least one JSONL file.")
    return [record for path in paths for record in _read_file(Path(path), format)]


def _read_file(path: Path, format: str) -> list[FeedbackRecord]:
    records: list[FeedbackRecord] = []
    layout = _LAYOUTS.get(format)
    for line, row in _json_lines(path):
        layout = layout or _detect_layout(row, f"{path}:{line}")
        records.append(_parse_record(row, layout, str(path), line))
    if not records:
        raise DataError(f"{path}: the file holds no record; each line must be one JSON object.")
    return records


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object). Lines end at a newline byte only, so line numbers agree with any editor's."""
    try:
        with path.open("rb") as handle:
            for number, raw in enumerate(handle, start=1):
                if raw.strip():
                    yield number, _parse_line(raw, f"{path}:{number}")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from error


def _parse_line(raw: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: the line is not UTF-8 text (byte {error.start + 1}).") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: the line is not valid JSON ({error.msg}, column {error.colno}); "
            "the file must be JSON Lines, one whole object per line."
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{place}: the line's JSON cannot be read ({error}).") from error
    except RecursionError as error:
        raise DataError(f"{place}: the line's JSON is nested too deeply.") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: the line holds a JSON {_json_type(row)}; the file must be JSON Lines, one object per line."
        )
    return row


def _detect_layout(row: Mapping[str, Any], place: str) -> _Layout:
    # A record with all fields of a layout decides first; one with some of them still tells which layout was meant, so
    # that the message can name the field that is missing.
    for enough in (all, any):
        for layout in _LAYOUTS.values():
            if enough(field in row for field in (layout.response, layout.label)):
                return layout
    expected = " or ".join(f"'prompt', '{x.response}', '{x.label}' ({name})" for name, x in _LAYOUTS.items())
    found = ", ".join(repr(key) for key in row) or "none"
    raise DataError(f"{place}: the fields ({found}) fit no known format; expected {expected}.")


def _parse_record(row: Mapping[str, Any], layout: _Layout, source: str, line: int) -> FeedbackRecord:
    place = f"{source}:{line}"
    for field in ("prompt", layout.response, layout.label):
        if field not in row:
            raise DataError(f"{place}: field '{field}' is missing.")
    prompt, response = row["prompt"], row[layout.response]
    _check_conversation(prompt, f"{place}: field 'prompt'")
    _check_conversation(response, f"{place}: field '{layout.response}'")
    if isinstance(prompt, str) != isinstance(response, str):
        raise DataError(
            f"{place}: field 'prompt' is a {_json_type(prompt)} and field '{layout.response}' a "
            f"{_json_type(response)}; both must be strings or both lists of messages."
        )
    if isinstance(prompt, list):
        _check_roles(prompt, response, layout, place)
    elif not response:
        raise DataError(f"{place}: field '{layout.response}' is empty; there is nothing to learn from.")
    return FeedbackRecord(prompt, response, _parse_label(row[layout.label], layout, place), source, line)


def _check_conversation(value: Any, where: str) -> None:
    """Checks that a field is a string or a non-empty list of messages with text in `role` and `content`."""
    if isinstance(value, str):
        _check_text(value, where)
        return
    if not isinstance(value, list):
        raise DataError(f"{where} must be a string or a list of messages, not a {_json_type(value)}.")
    if not value:
        raise DataError(f"{where} is an empty list of messages.")
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f"{where}, message {index + 1}: must be an object, not a {_json_type(message)}.")
        for key in ("role", "content"):
            text = message.get(key)
            if not isinstance(text, str):
                problem = "is missing" if key not in message else f"must be a string, not a {_json_type(text)}"
                raise DataError(f"{where}, message {index + 1}: '{key}' {problem}.")
            _check_text(text, f"{where}, message {index + 1}: '{key}'")


def _check_text(text: str, where: str) -> None:
    # JSON can spell half of a surrogate pair; no tokenizer takes it, and its own error would not name the line.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half of a surrogate pair at character {error.start + 1}, which is not text."
        ) from error


def _check_roles(prompt: Messages, response: Messages, layout: _Layout, place: str) -> None:
    if prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: field 'prompt' ends with an assistant message; "
            f"the answer that was rated belongs into '{layout.response}'."
        )
    if len(response) != 1 or response[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in response)
        raise DataError(
            f"{place}: field '{layout.response}' must hold exactly one message, of role 'assistant'; got: {roles}."
        )
    if not response[0]["content"]:
        raise DataError(f"{place}: field '{layout.response}' is empty; there is nothing to learn from.")


def _parse_label(value: Any, layout: _Layout, place: str) -> bool:
    # The type is compared too: for Python, 1 == True.
    for known, desirable in layout.label_values.items():
        if type(value) is type(known) and value == known:
            return desirable
    choices = " or ".join(json.dumps(known) for known in layout.label_values)
    raise DataError(f"{place}: field '{layout.label}' must be {choices}, got {json.dumps(value)[:80]}.")


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names[type(value)]
