"""What messages say and a chat template leaves out: a silent loss, found by looking for every part in the rendering.

A template that knows no tools renders a tool call as nothing; some take the reasoning out of an answer, ignore a
developer's message, or drop the text beside a tool call. Whitespace does not count, as templates trim and indent; a
part may stand there as JSON writes it. Parts are looked for one behind the other first, which is quick and finds
nearly all; if one is not found so, the longest part takes its place in the rendering first, so that a short one that
was left out is not taken for found in the middle of another.

The reasoning of earlier turns, which many templates leave out by design, is no loss; nor is a switch such as
`/no_think`, which some templates obey and do not write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_kto.data.reading.records import Messages
from nemo_kto.data.tokens.contents import texts_of
from nemo_kto.data.tokens.reasoning import reasonings_of, thought_of
from nemo_kto.data.tokens.tool_calls import arguments_of, as_object, calls_of, leaves

REASONING = "its reasoning"
"""Name of the part of an answer that is."""

_SWITCH = re.compile(r"(?<!<)/(?:no_)?think\b")
_TAKEN = 0


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a conversation: what it is, for messages, and its text.

    Attributes:
        name: What it is.
        text: Its text.
        first: Whether it takes its place before equal parts that are not: what templates rarely leave out.
    """

    name: str
    text: str
    first: bool = False


def prompt_parts(messages: Messages, tools: Sequence[Any] | None) -> list[Part]:
    """Returns the parts of a prompt, in order."""
    parts = [Part("the tools' schemas", text) for text in _tool_texts(tools or ())]
    for message in messages:
        role, texts = message["role"], texts_of(message)
        if role == "assistant":
            calls = list(_calls(message, "a tool call of an earlier answer"))
            name = "the text beside a tool call of an earlier answer" if calls else "an earlier answer"
            parts += [*(Part(name, thought_of(text)[1], first=True) for text in texts), *calls]
        else:
            name = {"tool": "a tool's result", "user": "a user's message"}.get(role, f"the {role} message")
            parts += [Part(name, text, first=role == "user") for text in texts]
    return parts


def answer_parts(message: dict[str, Any]) -> list[Part]:
    """Returns the parts of a rated answer, in order."""
    thought, content = thought_of(message.get("content") or "")
    calls = list(_calls(message, "its tool call"))
    text = Part("the text beside its tool call" if calls else "its text", content, first=True)
    return [*(Part(REASONING, said) for said in reasonings_of(message)), Part(REASONING, thought), text, *calls]


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
    room = _Room([_dense(piece) for piece in special.split(text)])
    missing: dict[int, Part] = {}
    for number, part in sorted(enumerate(wanted), key=lambda item: (-len(_dense(item[1].text)), not item[1].first)):
        absent = next((piece for piece in special.split(part.text) if piece and not room.take(piece)), None)
        if absent is None:
            continue
        lines = [_SWITCH.sub("", line).strip() for line in absent.splitlines()]
        line = next((line for line in lines if line and not room.take(line)), None)
        if line is not None:
            missing[number] = Part(part.name, line)
    return [missing[number] for number in sorted(missing)]


class _Room:
    """A text without whitespace, in which parts take places that no other part can have."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._text = bytearray(bytes([_TAKEN]).join(piece.encode("utf-8", "surrogatepass") for piece in pieces))

    def take(self, text: str) -> bool:
        """Takes the first free place where a text stands, in one of the forms that it may have there."""
        return any(self._take_form(_dense(form).encode("utf-8", "surrogatepass")) for form in _forms(text))

    def _take_form(self, form: bytes) -> bool:
        start = self._text.find(form)
        if start < 0:
            return False
        self._text[start : start + len(form)] = bytes([_TAKEN]) * len(form)
        return True


def _forms(text: str) -> Iterator[str]:
    """A text, and as JSON and Python write it."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]


def _dense(text: str) -> str:
    return "".join(text.split())


def _tool_texts(tools: Sequence[Any]) -> Iterator[str]:
    """Of each tool what tells best whether a template wrote it: its description, or its name."""
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, dict):
            texts = (function.get(key) for key in ("description", "name"))
            yield from [text for text in texts if isinstance(text, str) and text.strip()][:1]


def _calls(message: dict[str, Any], name: str) -> Iterator[Part]:
    """The names and arguments of a message's tool calls."""
    for function in calls_of(message):
        if isinstance(function.get("name"), str):
            yield Part(name, function["name"], first=True)
    for arguments in arguments_of(message):
        yield from (Part(name, leaf, first=True) for leaf in leaves(as_object(arguments)))
