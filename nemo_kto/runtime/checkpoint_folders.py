"""Checkpoints as folders: which are finished, which is the newest, of which step; told by names, without torch."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_kto.errors import CheckpointError

_UNFINISHED_SUFFIX = "-unfinished"
_STEP = re.compile(r".*step=(\d+)")  # the last one, should the run's name hold another


def is_finished(folder: Path) -> bool:
    """Return whether `folder` holds a checkpoint that was written to its end."""
    return (folder / "metadata.json").is_file() and not folder.with_name(folder.name + _UNFINISHED_SUFFIX).exists()


def newest_last(folder: Path) -> Path | None:
    """Return the finished `*-last` checkpoint of the highest step in `folder`, or None.

    Two may be there when a run was killed after it wrote the new one and before it removed the old one.
    """
    found = [path for path in folder.glob("*step=*-last") if is_finished(path)] if folder.is_dir() else []
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that were taken before `checkpoint` was written, from its name.

    Raises:
        CheckpointError: The name holds no step.
    """
    match = _STEP.match(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is no checkpoint of a run: its name holds no step=<number>.")
    return int(match[1])
