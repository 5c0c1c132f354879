"""What messages say and a chat template leaves out: a silent loss, found by looking for every part in the rendering.

A template that knows no tools renders a tool call as nothing; some take the reasoning out of an answer, ignore a
developer's message, or drop the text beside a tool call. Whitespace does not count, as templates trim and indent; a
part may stand there as JSON writes it. Parts are looked for one behind the other first, which is quick and finds
nearly all; if one is not found so, the longest part takes its place in the rendering first, so that a short one that
was left out is not taken for found in the middle of another.

The reasoning of earlier turns, which many templates leave out by design, is no loss.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_kto.data.reading.records import Messages
from nemo_kto.data.tokens.chat_template import arguments_of

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names that transformers knows for the reasoning of a message; the first that is filled counts."""

_THOUGHT = re.compile(r"\s*(?:<think>)?(?P<reasoning>.*?)</think>(?P<text>.*)", re.DOTALL)
_SEPARATOR = "\0"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a conversation: what it is, for messages, and its text."""

    name: str
    text: str


def prompt_parts(messages: Messages, tools: Sequence[Any] | None) -> list[Part]:
    """Returns the parts of a prompt, in order."""
    parts = [Part("the tools' schemas", name) for name in _tool_names(tools or ())]
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if role == "assistant":
            if thought := _THOUGHT.fullmatch(content):
                content = thought["text"]
            calls = list(_calls(message, "a tool call of an earlier answer"))
            name = "the text beside a tool call of an earlier answer" if calls else "an earlier answer"
            parts += [Part(name, content), *calls]
        else:
            names = {"tool": "a tool's result", "user": "a user's message"}
            parts.append(Part(names.get(role, f"the {role} message"), content))
    return parts


def answer_parts(message: dict[str, Any]) -> list[Part]:
    """Returns the parts of a rated answer, in order."""
    content = message.get("content") or ""
    reasoning = next((message[key] for key in _REASONING_KEYS if isinstance(message.get(key), str)), "")
    parts = [Part("its reasoning", reasoning)]
    if thought := _THOUGHT.fullmatch(content):
        parts.append(Part("its reasoning", thought["reasoning"]))
        content = thought["text"]
    calls = list(_calls(message, "its tool call"))
    return [*parts, Part("the text beside its tool call" if calls else "its text", content), *calls]


def lost(parts: Iterable[Part], text: str, special: re.Pattern[str]) -> list[Part]:
    """Returns the parts that are not in a text; of one of which some lines are, the first line that is not.

    Args:
        parts: What to look for.
        text: What a chat template wrote.
        special: Pattern of the special tokens; what stands in those is no text.
    """
    wanted = [part for part in parts if part.text.strip()]
    place = 0
    for part in wanted:
        found = text.find(part.text.strip(), place)
        if found < 0:
            return _lost(wanted, text, special)
        place = found + len(part.text.strip())
    return []


def _lost(wanted: list[Part], text: str, special: re.Pattern[str]) -> list[Part]:
    room = _Room(_SEPARATOR.join(map(_dense, special.split(text))))
    missing: dict[int, Part] = {}
    for number, part in sorted(enumerate(wanted), key=lambda item: -len(item[1].text)):
        absent = next((piece for piece in special.split(part.text) if piece and not room.take(piece)), None)
        if absent is None:
            continue
        lines = [line.strip() for line in absent.splitlines() if line.strip()]
        line = next((line for line in lines if not room.take(line)), None)
        if line is not None:
            missing[number] = Part(part.name, line)
    return [missing[number] for number in sorted(missing)]


class _Room:
    """A text without whitespace, in which parts take places that no other part can have."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._taken: list[tuple[int, int]] = []

    def take(self, text: str) -> bool:
        """Takes the first free place where a text stands, in one of the forms that it may have there."""
        return any(self._take_form(_dense(form)) for form in _forms(text))

    def _take_form(self, form: str) -> bool:
        start = self._text.find(form)
        while start >= 0:
            end = start + len(form)
            if not any(start < last and first < end for first, last in self._taken):
                self._taken.append((start, end))
                return True
            start = self._text.find(form, start + 1)
        return False


def _forms(text: str) -> Iterator[str]:
    """A text, and as JSON and Python write it."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]


def _dense(text: str) -> str:
    return "".join(text.split())


def _tool_names(tools: Sequence[Any]) -> Iterator[str]:
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            yield function["name"]


def _calls(message: dict[str, Any], name: str) -> Iterator[Part]:
    """The names and arguments of a message's tool calls."""
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            yield Part(name, function["name"])
    for arguments in arguments_of(message):
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):  # of no JSON, all of it is looked for
                arguments = json.loads(arguments)
        yield from (Part(name, leaf) for leaf in _leaves(arguments))


def _leaves(value: Any) -> Iterator[str]:
    """Keys and values of arguments as text; true, false and null have too many spellings to be looked for."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)
