"""Overrides as people write them -> as Hydra reads them: paths and texts need no quotes of their own."""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from nemo_kto.config.folders import RECIPE
from nemo_kto.config.reader import leaf_types, options
from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError

_PLAIN_OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w.]*=")


def readable(argument: str, *, sweeps: bool = False) -> str:
    """Return an argument of the command line as Hydra accepts it, for any key: `parse_config` judges keys.

    Hydra's grammar gives `=`, commas, brackets, quotes and much else a meaning, and knows no letters but English ones.
    Where a key takes a text, whatever that grammar cannot read, or reads as something else, is that text. A list is
    one of names of files if they all exist.

    Args:
        argument: An override, which is forced, or an option of Hydra's, which stays as it is.
        sweeps: Whether several values with commas between them mean as many runs.

    Raises:
        ConfigError: It cannot be read; the message shows how to write it.
    """
    plain = argument.lstrip("+")
    if plain.startswith(f"{RECIPE}="):
        return f"+{plain}"
    if not _PLAIN_OVERRIDE.match(argument) or plain.startswith("hydra."):
        return argument
    key, _, value = plain.partition("=")
    kind = _types().get(key)
    is_text = kind is None or _takes_text(kind)
    try:
        parsed = _parser().parse_override(plain)
    except HydraException as error:
        if is_text and not _is_structure(value):
            return f"++{key}={_literally(value)}"
        if kind is not None and (files := _existing_files(value)):
            return f"++{key}=[{','.join(map(_literally, files))}]"
        raise ConfigError(_unreadable(key, value, error)) from error
    if parsed.is_sweep_override():
        if sweeps:
            return "++" + plain
        if is_text and _exists(value):
            return f"++{key}={_literally(value)}"
        raise ConfigError(_several(key, value, listed=kind is not None and typing.get_origin(_first(kind)) is list))
    found = parsed.value()
    is_file = _exists(value)
    is_another = not isinstance(found, str) or ((found != value or "${" in value) and is_file)
    if is_text and kind is not None and is_another and found is not None and not _is_structure(value):
        return f"++{key}={_literally(value)}"
    return "++" + plain


def check_readable(overrides: Sequence[str]) -> None:
    """Raise a ConfigError for what is neither an option nor KEY=VALUE, such as a key alone.

    Args:
        overrides: What `readable` has returned, without options.
    """
    for override in overrides:
        try:
            _parser().parse_override(override)
        except HydraException as error:
            raise ConfigError(
                f"{override!r} is no override. Write KEY=VALUE, without spaces around the sign, such as "
                "model.optim.lr=1e-6; docs/configuration.md lists the keys."
            ) from error


@cache
def _types() -> dict[str, Any]:
    return leaf_types(KTOConfig)


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def quoted(text: str) -> str:
    """Return text as Hydra reads it in an override, whatever is in it."""
    # Hydra's rule: a backslash counts as one unless it, or several, are followed by a quote or the end
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def _literally(value: str) -> str:
    """Return a text for Hydra; the name of a file refers to no other key."""
    return quoted(value.replace("${", "\\${") if _exists(value) else value)


def _takes_text(kind: Any) -> bool:
    """Whether a value of this type may be a text of any kind, alone or as the only one of a list."""
    kinds = options(kind)
    kinds += tuple(
        inner for one in kinds if typing.get_origin(one) is list for inner in options(*typing.get_args(one))
    )
    return str in kinds and not {int, float, bool} & set(kinds)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # too long for a name
        return False


def _first(kind: Any) -> Any:
    return options(kind)[0]


def _is_structure(value: str) -> bool:
    """Whether a value is meant as a list or a mapping; a file of that name is meant as the file."""
    ends = {"[": "]", "{": "}"}.get(value[:1])
    return ends is not None and value.endswith(ends) and not _exists(value)


def _existing_files(value: str) -> list[str]:
    """Return the names in a list, if it is one of files that exist."""
    if not (value.startswith("[") and value.endswith("]")):
        return []
    names = [name.strip() for name in value[1:-1].split(",")]
    return names if all(name and _exists(name) for name in names) else []


def _unreadable(key: str, value: str, error: HydraException) -> str:
    reason, besides = str(error).splitlines()[0], ""
    if value.startswith("["):
        parts = [part.strip().strip("'\"") for part in value.strip("[]").split(",")]
        example = f"{key}=[{','.join(map(quoted, parts))}]"
    elif value.startswith("{"):
        example = f"{key}={{path: {quoted('a=b, c.jsonl')}}}"
        besides = ". What stands in front of a colon takes no quotes, but a backslash before each such character"
    else:
        example = f"{key}={quoted(value)}"
    return (
        f"{key}={value} cannot be read ({reason}). Quote texts with anything but English letters, digits and ._-/ in "
        f"them, once for Hydra and once for the shell: {_for_shell(example)}{besides}"
    )


def _several(key: str, value: str, *, listed: bool) -> str:
    single = _for_shell(f"{key}={quoted(value)}")
    several = f", several are {_for_shell(f'{key}=[{value}]')}" if listed else ""
    return (
        f"{key}={value} has commas in it, which would mean several runs. A text with commas is {single}{several}; "
        "several runs need --multirun."
    )


def _for_shell(argument: str) -> str:
    """Return an argument as it is typed in a shell, in double quotes if they do."""
    return shlex.quote(argument) if re.search(r'["$`\\!]', argument) else f'"{argument}"'
