"""The pages that people read, as the tests of this folder see them: blocks of code, commands, links, code spans."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        *sorted(ROOT.glob("*.md")),
        *sorted(ROOT.glob("docs/**/*.md")),
        *sorted(ROOT.glob("examples/**/*.md")),
    ]
}
"""Path in the repository -> text."""

_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\[(?:[^\[\]`]|`[^`]*`)*\]\(([^)\s]+)\)")
_ARRAY = re.compile(r"^(\w+)=\((.*)\)$", re.DOTALL)
_VARIABLE = re.compile(r"^[A-Z][A-Z0-9_]*=")


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        page: Path of the page in the repository.
        line: Of the fence, counted from 1.
        language: What stands behind the fence.
        text: What is inside.
    """

    page: str
    line: int
    language: str
    text: str


def blocks(page: str, *languages: str) -> list[Block]:
    """Return the blocks of a page in these languages, in order."""
    text = PAGES[page]
    found = (
        Block(page, text.count("\n", 0, match.start()) + 1, match[2], match[3]) for match in _FENCED.finditer(text)
    )
    return [block for block in found if block.language in languages]


def prose(page: str) -> str:
    """Return a page without its blocks."""
    return _FENCED.sub("", PAGES[page])


def spans(page: str) -> list[str]:
    """Return what stands in backticks on a page."""
    return _SPAN.findall(prose(page))


def links(page: str) -> list[str]:
    """Return the targets of the links and pictures of a page."""
    return _LINK.findall(re.sub(_SPAN, lambda span: "`" + "x" * len(span[1]) + "`", prose(page)))


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower())) for heading in headings}


class Command(NamedTuple):
    """One command of a shell script.

    Attributes:
        variables: Assignments before it, `NAME=value`.
        words: Its words.
    """

    variables: list[str]
    words: list[str]


def commands(script: str, arrays: dict[str, list[str]]) -> Iterator[Command]:
    """Yield the commands of a script; `arrays` has those of earlier scripts, and gets those of this one."""
    for statement in _statements(script):
        array = _ARRAY.match(statement)
        if array is not None:
            arrays[array[1]] = shlex.split(array[2])
            continue
        lexer = shlex.shlex(statement, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                yield from _command(words)
                words = []
            elif array_name := re.fullmatch(r"\$\{(\w+)\[@\]\}", word):
                words += arrays[array_name[1]]
            else:
                words.append(word)


def _statements(script: str) -> Iterator[str]:
    """Yield what a line says, with the lines that it goes on in."""
    kept = ""
    for line in script.replace("\\\n", " ").splitlines():
        kept += line + "\n"
        try:
            words = shlex.split(kept, comments=True)
        except ValueError:
            continue  # inside of a quotation
        if words and "=(" in words[0] and not words[-1].endswith(")"):
            continue  # inside of an array
        if words:
            yield kept.strip()
        kept = ""


def _command(words: list[str]) -> Iterator[Command]:
    """Yield the command of these words, if they are one and not the shell's own."""
    while words and words[0] in ("until", "while", "do", "then"):
        words = words[1:]
    if words and words[0] not in (":", "[", "done", "fi"):
        first = next((number for number, word in enumerate(words) if not _VARIABLE.match(word)), len(words))
        yield Command(words[:first], words[first:])
