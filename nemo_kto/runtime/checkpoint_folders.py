"""Checkpoints as folders: which are finished and whole, which is the newest, of which step; without torch."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_kto.config.folders import link_out_of
from nemo_kto.errors import CheckpointError, DamagedCheckpointError
from nemo_kto.runtime.checkpoint_manifest import first_fault

DAMAGED_FOLDER = "damaged_checkpoints"
"""Folder beside `checkpoints` where those are put that cannot be used."""

_UNFINISHED_SUFFIX = "-unfinished"
_STEP = re.compile(r".*step=(\d+)")  # the last one, should the run's name hold another
_PARTS = ("metadata.json", ".metadata")
_COMMON_PART = "common.pt"


def is_unfinished(folder: Path) -> bool:
    """Return whether a run was stopped while it wrote the checkpoint `folder`."""
    return folder.with_name(folder.name + _UNFINISHED_SUFFIX).exists()


def is_finished(folder: Path) -> bool:
    """Return whether `folder` holds a checkpoint that was written to its end."""
    return (folder / "metadata.json").is_file() and not is_unfinished(folder)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return all checkpoints in `folder`, whole or not, the newest first; of one step, the `*-last` one first."""
    found = [path for path in folder.iterdir() if path.is_dir() and _STEP.match(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (step_of(path), path.name.endswith("-last"), path.name), reverse=True)


def fault_of(checkpoint: Path, *, checksums: bool) -> str | None:
    """Return what is wrong with a finished checkpoint; None if nothing is.

    Args:
        checkpoint: The folder.
        checksums: Whether its files are read, to compare them with what was written; otherwise only their sizes.
    """
    missing = next((name for name in (*_PARTS, _COMMON_PART) if not (checkpoint / name).is_file()), None)
    if missing is not None and not (missing == _COMMON_PART and keeps_common_among_tensors(checkpoint)):
        return f"{missing} is missing"
    link = link_out_of(checkpoint, below=True)
    if link is not None:
        return f"{link.name} is a link out of the checkpoint"
    return first_fault(checkpoint, checksums=checksums)


def keeps_common_among_tensors(checkpoint: Path) -> bool:
    """Return whether a checkpoint keeps what is no tensor as Megatron-Core 0.19 does, rather than in common.pt.

    It is an entry of its index then, which has the name of each.
    """
    try:
        return b"common_state/shard_0_1" in (checkpoint / ".metadata").read_bytes()
    except OSError:
        return False


def newest_whole(folder: Path, *, checksums: bool = False) -> tuple[Path | None, list[DamagedCheckpointError]]:
    """Return the newest checkpoint in `folder` that can be used, and what is wrong with those that are newer.

    Two of one step, or of consecutive ones, may be there when a run was killed between writing and removing.
    """
    damaged = []
    for checkpoint in checkpoints_in(folder):
        if is_unfinished(checkpoint):
            continue
        fault = fault_of(checkpoint, checksums=checksums)
        if fault is None:
            return checkpoint, damaged
        damaged.append(DamagedCheckpointError(checkpoint, fault))
    return None, damaged


def set_aside(checkpoint: Path) -> Path:
    """Move a checkpoint that cannot be used to where it is in nobody's way; returns its new place.

    Raises:
        CheckpointError: It cannot be moved.
    """
    folder = checkpoint.parent.with_name(DAMAGED_FOLDER)
    place, number = folder / checkpoint.name, 1
    while place.exists():
        number += 1
        place = folder / f"{checkpoint.name}.{number}"
    try:
        folder.mkdir(exist_ok=True)
        checkpoint.rename(place)
    except OSError as error:
        raise CheckpointError(f"{checkpoint} cannot be moved to {place}: {error.strerror}") from error
    return place


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that were taken before `checkpoint` was written, from its name.

    Raises:
        CheckpointError: The name holds no step.
    """
    match = _STEP.match(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is no checkpoint of a run: its name holds no step=<number>.")
    return int(match[1])
