"""`nemo-kto checkpoint list | verify`: which checkpoints a run has, and whether they are what was written."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_kto.errors import ConfigError
from nemo_kto.runtime.checkpoint_folders import DAMAGED_FOLDER, checkpoints_in, fault_of, is_unfinished, step_of
from nemo_kto.runtime.checkpoint_manifest import MANIFEST_FILE


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint and its state: `whole`, `unfinished`, `damaged`, or `unverifiable` for want of a manifest."""

    name: str
    step: int
    bytes: int
    state: str
    fault: str | None


def list_checkpoints(options: argparse.Namespace) -> None:
    """Print the checkpoints of a run, the newest first, judged by the sizes of their files."""
    _print(options, _found(options.log_dir, checksums=False))


def verify(options: argparse.Namespace) -> None:
    """Print them, judged by the checksums of their files; exit code 1 if one is damaged."""
    found = _found(options.log_dir, checksums=True)
    _print(options, found)
    if any(one.state == "damaged" for one in found):
        raise SystemExit(1)


def _found(log_dir: Path, *, checksums: bool) -> list[Found]:
    """Return what is known of the checkpoints in a log folder, or of those in the folder itself.

    Raises:
        ConfigError: There are none.
    """
    folder = log_dir / "checkpoints" if (log_dir / "checkpoints").is_dir() else log_dir
    found = [_judged(checkpoint, checksums=checksums) for checkpoint in checkpoints_in(folder)]
    if not found:
        raise ConfigError(f"{log_dir} holds no checkpoints. Name the log folder of a run.")
    return found


def _judged(checkpoint: Path, *, checksums: bool) -> Found:
    fault = None if is_unfinished(checkpoint) else fault_of(checkpoint, checksums=checksums)
    if is_unfinished(checkpoint):
        state = "unfinished"
    elif fault is not None:
        state = "damaged"
    else:
        state = "whole" if (checkpoint / MANIFEST_FILE).exists() else "unverifiable"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    return Found(name=checkpoint.name, step=step_of(checkpoint), bytes=size, state=state, fault=fault)


_STYLES = {"whole": "green", "unfinished": "yellow", "unverifiable": "yellow", "damaged": "red"}
_WORDS = {
    "unfinished": "the run was stopped while it was written; the next one removes it",
    "unverifiable": f"it has no {MANIFEST_FILE}: it is of an earlier version, or that was lost",
}


def _print(options: argparse.Namespace, found: list[Found]) -> None:
    if options.json:
        print(json.dumps([asdict(one) for one in found]))
        return
    table = Table("step", "checkpoint", "MB", "state")
    for one in found:
        words = one.fault or _WORDS.get(one.state)
        state = Text(one.state if words is None else f"{one.state}: {words}", style=_STYLES[one.state])
        table.add_row(f"{one.step:,}", Text(one.name), f"{one.bytes / 1e6:,.1f}", state)
    console = Console()
    console.print(table)
    whole = next((one for one in found if one.state in ("whole", "unverifiable")), None)
    if whole is None:
        console.print("None can be gone on from.", style="red")
    else:
        console.print(f"A run goes on from {whole.name}.", markup=False, highlight=False)
    aside = options.log_dir / DAMAGED_FOLDER
    if aside.is_dir():
        console.print(f"{len(list(aside.iterdir()))} damaged before are in {aside}.", markup=False, highlight=False)
