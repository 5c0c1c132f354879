"""The reasoning of answers: where messages have it, and where chat templates look for it.

It is in a field of its own, for which there are several names, or in the content, between `<think>` and `</think>`. A
template knows one of those names, or none; some take reasoning out of every answer, the rated one included, which a
model has written all the same.
"""

from __future__ import annotations

import re

from nemo_kto.data.reading.records import Messages

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names that transformers knows for the reasoning of a message; the first that is filled counts."""
OPEN, CLOSE = "<think>", "</think>"

# A block at the beginning, which a model that was cut off has not closed; or up to a closing tag, where the header of
# the answer opens it.
_THOUGHT = re.compile(
    r"\s*(?:<think>(?P<block>.*?)(?:</think>|\Z)|(?P<rest>(?:(?!<think>).)*?)</think>(?!.*<think>))(?P<text>.*)",
    re.DOTALL,
)


def thought_of(content: str) -> tuple[str, str]:
    """Returns the reasoning that an answer begins with, and the rest."""
    found = _THOUGHT.fullmatch(content) if "think>" in content else None  # which a search would take long to find
    if found is None:
        return "", content
    return found["block"] if found["block"] is not None else found["rest"], found["text"]


def reasoning_of(message: dict[str, object]) -> str:
    """Returns the reasoning that a message has in a field of its own."""
    return next(iter(reasonings_of(message)), "")


def reasonings_of(message: dict[str, object]) -> list[str]:
    """Returns the reasoning of each of those fields, once where several say the same."""
    texts = (message.get(key) for key in REASONING_KEYS)
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text))


def under_known_name(messages: Messages, template: str) -> tuple[Messages, str | None]:
    """Returns messages with their reasoning in the field that a template reads, and its name if any was moved."""
    read = [key for key in REASONING_KEYS if _reads(template, key)]
    if not read:
        return messages, None
    known = read[0]
    moved = [
        message
        if not (text := reasoning_of(message)) or any(message.get(key) for key in read)
        else _without(message, text) | {known: text}
        for message in messages
    ]
    return (moved, known) if moved != messages else (messages, None)


def _reads(template: str, key: str) -> bool:
    """Whether a template looks at a field of that name; a variable, such as DeepSeek-V3.1's `thinking`, is none."""
    return re.search(rf"[.'\"]{key}\b", template) is not None


def _without(message: dict[str, object], text: str) -> dict[str, object]:
    """Returns a message without a reasoning, under whatever names; another one stays, to be found where it is lost."""
    return {key: value for key, value in message.items() if key not in REASONING_KEYS or value not in (text, None, "")}


def written_behind(header: str, content: str) -> str | None:
    """Returns what a model writes of an answer, its reasoning included, behind the answer's header.

    None where the header leaves no place for reasoning, as it closes the block, or begins with another one.

    Args:
        header: The end of the prompt of inference, which may open the block.
        content: The answer, which begins with a block, or goes on in the one that the header opens.
    """
    _, is_open, begun = header.rpartition(OPEN)
    if CLOSE in (begun if is_open else header):
        return None
    if not is_open:
        return content
    if content.startswith(OPEN + begun):
        return content[len(OPEN + begun) :]
    if begun.strip():
        return None
    if not content.lstrip().startswith(OPEN):
        return content
    inside = content.lstrip().removeprefix(OPEN)
    return inside.lstrip() if begun else inside
