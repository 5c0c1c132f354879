"""`nemo-kto config`: what a key of the configuration means, what it takes, and its default."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import textwrap

from nemo_kto.config.descriptions import Description, below, descriptions

_WIDEST = 100
"""Columns that are read easily."""


def run(options: argparse.Namespace) -> None:
    """Print the key or section that is asked for, or all keys."""
    if options.own_process:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` has seen enough
    found = list(descriptions().values()) if options.key is None else below(options.key)
    if options.json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=1, ensure_ascii=False))
        return
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    print("\n\n".join(_shown(each, width) for each in found))


def _shown(key: Description, width: int) -> str:
    takes = f"takes {key.takes}; default {key.default}"
    lines = [line for text in (takes, key.meaning) for line in textwrap.wrap(text, width - 4)]
    return "\n".join([key.key, *(f"    {line}" for line in lines)])
