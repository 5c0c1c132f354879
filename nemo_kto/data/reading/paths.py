"""Places inside a row: `input.messages`, `outputs.generations[0].message`, `scores[name=user-feedback].value`.

A path is the name of a column, and behind it any number of

    .name          what an object has under that name
    [0], [-1]      an element of a list, from the front or from the end
    [key=value]    the element of a list whose `key` is that value

A name that has dots or brackets itself, as the columns of a flattened table have (`input.messages`), counts before
what the path would mean. JSON in a string is looked into as if it were the object or the list that it spells.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nemo_kto.data.reading.records import json_type, printable

Step = str | int | tuple[str, str]

_STEP = re.compile(
    r"(?:^|(?<=.)\.)(?P<name>[^.\[\]]+)|(?<=.)\[(?P<index>-?[0-9]+)\]|(?<=.)\[(?P<key>[^.\[\]=]+)=(?P<value>[^\[\]]*)\]",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Missing:
    """What `look_up` finds where there is nothing.

    Attributes:
        reason: What is not there, to be read behind "is missing: "; empty if it is the column.
        wrong: Whether the path leads through a value that has no such parts at all, such as a number.
    """

    reason: str = ""
    wrong: bool = False


@lru_cache(maxsize=1024)
def parse_path(text: str) -> tuple[Step, ...] | None:
    """Returns the steps of a path; None for a text that is none."""
    steps: list[Step] = []
    position = 0
    while position < len(text):
        match = _STEP.match(text, position)
        if match is None:
            return None
        if match["index"] is not None:
            steps.append(int(match["index"]))
        else:
            steps.append(match["name"] or (match["key"], match["value"]))
        position = match.end()
    return tuple(steps) or None


def look_up(values: Mapping[str, Any], path: str) -> Any:
    """Returns the value at a path of a row, or a `Missing`."""
    if path in values:
        return values[path]
    steps = parse_path(path)
    if steps is None or len(steps) == 1:
        return Missing()
    return _follow(values, steps, "")


def _follow(value: Any, steps: Sequence[Step], way: str) -> Any:
    if not steps:
        return value
    if value is None:
        return Missing(f"'{way}' is null")
    value, step = opened(value), steps[0]
    if isinstance(step, str):
        return _member(value, steps, way)
    if not isinstance(value, list):
        wanted = f"[{step}]" if isinstance(step, int) else f"[{step[0]}={step[1]}]"
        return Missing(f"'{way}' is {_a(value)}, where a list was expected for {wanted}", wrong=True)
    if isinstance(step, int):
        if not -len(value) <= step < len(value):
            return Missing(f"'{way}' has {len(value)} elements, and no [{step}]")
        return _follow(value[step], steps[1:], f"{way}[{step}]")
    return _chosen(value, step, steps[1:], way)


def _member(value: Any, steps: Sequence[Step], way: str) -> Any:
    """What an object has under the name that the first steps are, or several of them with dots between."""
    if not isinstance(value, Mapping):
        return Missing(f"'{way}' is {_a(value)}, where an object with '{steps[0]}' was expected", wrong=True)
    names: list[str] = []
    for step in steps:
        if not isinstance(step, str):
            break
        names.append(step)
    for length in range(len(names), 0, -1):
        name = ".".join(names[:length])
        if name in value:
            return _follow(value[name], steps[length:], f"{way}.{name}" if way else name)
    if not way:
        return Missing()
    there = ", ".join(f"'{name}'" for name in list(value)[:8])
    return Missing(f"'{way}' has no '{names[0]}', " + (f"but {there}" if there else "it is empty"))


def _chosen(value: list[Any], step: tuple[str, str], rest: Sequence[Step], way: str) -> Any:
    """What the rest of a path leads to in the element that a step names; in all of them, if there are several."""
    key, wanted = step
    name = f"[{key}={wanted}]"
    elements = [element for element in value if isinstance(element, Mapping) and key in element]
    matches = [element for element in elements if _is(element[key], wanted)]
    if not matches:
        there = ", ".join(dict.fromkeys(_text(element[key]) for element in elements)) or "none"
        return Missing(f"'{way}' has no {name}; the values of '{key}' there: {there}")
    found = [_follow(element, rest, way + name) for element in matches]
    if any(other != found[0] for other in found[1:]):
        return Missing(f"'{way}' has {len(matches)} elements {name}, which do not agree", wrong=True)
    return found[0]


def _is(value: Any, wanted: str) -> bool:
    """Whether a value is the one that a path spells; a number is however many digits it is written with."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(wanted) == value
        except ValueError:
            return False
    return _text(value) == wanted


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _a(value: Any) -> str:
    name = json_type(value)
    if isinstance(value, str):
        return "a string that is no JSON of one"
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def opened(value: Any) -> Any:
    """Returns the object or list whose JSON a string holds; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        found = _parsed(value)
        return value if found is None else found
    return value


@lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    """The JSON in a text, None if it is none; several places of one row may be asked for."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


_OTHER_VALUES = ("true", "false", "null", "nan", "inf")
"""Words that an override takes for something else than text."""


def setting_of(name: str, path: str) -> str:
    """Returns how `fields` is told where something is, as a command line takes it."""
    return f"model.data.fields={{{name}: {quoted(path)}}}"


def quoted(text: str) -> str:
    """Returns text as Hydra reads it in an override."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", text) and text.lower() not in _OTHER_VALUES:
        return text
    escaped = printable(text)
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', escaped)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'
