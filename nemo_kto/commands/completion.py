"""`nemo-kto completion`: a script that completes commands, options, keys of the configuration and their values."""

from __future__ import annotations

import argparse
import shlex
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import shtab

from nemo_kto.config.descriptions import descriptions
from nemo_kto.config.folders import RECIPE, recipes
from nemo_kto.config.reader import leaf_types, options
from nemo_kto.config.schema import KTOConfig

_KEYS, _OVERRIDES = "_nemo_kto_keys", "_nemo_kto_overrides"
"""Functions of the scripts: they complete a key, and KEY=VALUE."""

# Of KEY=VALUE bash sees three words, as COMP_WORDBREAKS has the sign. What shtab calls runs in a process of its own,
# which cannot tell the shell to put no space behind a key: the last function does.
_BASH = """
{keys}() {{ compgen -W {names} -- "$1"; }}

{overrides}() {{
  local word="$1" key=""
  if [[ "$word" == "=" ]]; then
    key="${{COMP_WORDS[COMP_CWORD-1]}}" word=""
  elif [[ "${{COMP_WORDS[COMP_CWORD-1]}}" == "=" ]]; then
    key="${{COMP_WORDS[COMP_CWORD-2]}}"
  fi
  case "$key" in
    "") compgen -W {keys_with_sign} -- "$word" ;;
{values}
    *) compgen -f -- "$word" ;;
  esac
}}
"""
_BASH_END = """
_nemo_kto() {{
  {function} "$@"
  [[ "${{COMPREPLY[0]-}}" == *= ]] && compopt -o nospace
  return 0
}}
complete -o bashdefault -F _nemo_kto nemo-kto
"""
_ZSH = """
{keys}() {{ compadd -- {names} }}

{overrides}() {{
  if ! compset -P '*='; then
    compadd -S '' -- {keys_with_sign}
    return
  fi
  case "${{IPREFIX%=}}" in
{values}
    *) _files ;;
  esac
}}
"""


def run(settings: argparse.Namespace) -> None:
    """Print the script of a shell."""
    for action in _actions(settings.parser):
        if action.dest == "overrides":
            action.complete = {"bash": _OVERRIDES, "zsh": _OVERRIDES}  # type: ignore[attr-defined]
        elif action.dest == "key":
            action.complete = {"bash": _KEYS, "zsh": _KEYS}  # type: ignore[attr-defined]
        elif action.type is Path or action.dest == "files":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    own = (_bash if settings.shell == "bash" else _zsh)(list(descriptions()), {RECIPE: list(recipes()), **_choices()})
    script = shtab.complete(settings.parser, shell=settings.shell, preamble=own)
    print(script + (_BASH_END.format(function="_shtab_nemo_kto") if settings.shell == "bash" else ""))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of those below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
        else:
            yield action


def _choices() -> dict[str, list[str]]:
    """Return the keys that only take certain words -> these."""
    words: dict[str, list[str]] = {}
    for key, kind in leaf_types(KTOConfig).items():
        kinds = options(kind)
        found = [word for each in kinds for word in _words(each)]
        if found:
            words[key] = [*found, *(["null"] if type(None) in kinds else [])]
    return words


def _words(kind: Any) -> list[str]:
    if typing.get_origin(kind) is Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    return ["true", "false"] if kind is bool else []


def _bash(keys: list[str], choices: Mapping[str, list[str]]) -> str:
    values = [f'    {key}) compgen -W {shlex.quote(" ".join(words))} -- "$word" ;;' for key, words in choices.items()]
    return _BASH.format(
        keys=_KEYS,
        overrides=_OVERRIDES,
        names=shlex.quote(" ".join(keys)),
        keys_with_sign=shlex.quote(" ".join(f"{key}=" for key in {**choices, **dict.fromkeys(keys)})),
        values="\n".join(values),
    )


def _zsh(keys: list[str], choices: Mapping[str, list[str]]) -> str:
    values = [f"    {key}) compadd -- {shlex.join(words)} ;;" for key, words in choices.items()]
    return _ZSH.format(
        keys=_KEYS,
        overrides=_OVERRIDES,
        names=" ".join(keys),
        keys_with_sign=" ".join(f"{key}=" for key in {**choices, **dict.fromkeys(keys)}),
        values="\n".join(values),
    )
