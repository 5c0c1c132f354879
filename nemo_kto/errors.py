"""Errors that are a user's to mend, and how commands report them.

Each message names the place (file, line, field or key) and what to do.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from nemo_kto import stopping

_PEER_DELAY = 3.0
"""Seconds another rank waits before it repeats an error: the launcher usually ends it first, as rank 0 reported it."""

_PARENT = os.getppid()

_GIT_LFS = b"version https://git-lfs"
"""What a file begins with that stands for one that Git LFS keeps."""


class KTOError(Exception):
    """Base of every error raised on purpose; the command line prints its message without a traceback.

    Attributes:
        said_here: Whether, of several ranks that end, it is this one that reports it; None if that is not known.
    """

    said_here: bool | None = None


class ConfigError(KTOError):
    """A configuration key, a combination of keys or a layout that cannot work."""


class DataError(KTOError):
    """A data file or record that cannot be read; names file, line and field."""


class DivergenceError(KTOError):
    """Training has left the finite numbers; names the step."""


class RankError(KTOError):
    """A process of the run has ended, does not answer, or cannot be reached; names it."""


class StoppedEarly(Exception):
    """Raised on all ranks when a run is to end before training has begun: no error, as it goes on another time."""


class CheckpointError(KTOError):
    """A checkpoint or a Hugging Face folder that is missing, incomplete or of another model."""


class UploadError(KTOError):
    """A folder that is complete here, but could not be put on the Hugging Face Hub."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint with a file that is not what was written.

    Attributes:
        folder: The checkpoint.
        fault: The file, and what is wrong with it.
    """

    def __init__(self, folder: Path, fault: str) -> None:
        super().__init__(f"The checkpoint {folder} is damaged: {fault}.")
        self.folder = folder
        self.fault = fault

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels between ranks."""
        return DamagedCheckpointError, (self.folder, self.fault)


class SaveError(CheckpointError):
    """A checkpoint that could not be written; the same on all ranks, and nothing is left of it.

    Attributes:
        folder: Where it would be.
        reason: Why, in words.
    """

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"The checkpoint {folder} could not be written: {reason}.")
        self.folder = folder
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels between ranks."""
        return SaveError, (self.folder, self.reason)


def git_lfs_hint(file: Path) -> str:
    """Return what to do about a file that only says where Git LFS has it, as a sentence behind others; "" for others.

    A clone without Git LFS has such files in place of weights, tokenizers and data.
    """
    try:
        with file.open("rb") as handle:
            is_pointer = handle.read(len(_GIT_LFS)) == _GIT_LFS
    except OSError:
        return ""
    return " It only says where Git LFS has the file: run `git lfs pull` in its folder." if is_pointer else ""


def run_guarded(action: Callable[[], None]) -> None:
    """Run `action`; an error that is the user's to mend becomes one line on stderr and exit code 1.

    HYDRA_FULL_ERROR=1 adds the traceback. A command that is stopped ends with the exit code that says so. All other
    errors pass through unchanged.
    """
    try:
        action()
    except stopping.Stopped as stop:
        stopping.say_stopped(stop.reason)
        _leave(stopping.STOPPED_EARLY)
    except KeyboardInterrupt:  # of commands that have nothing to go on with
        stopping.say("Interrupted.")
        _leave(stopping.INTERRUPTED)
    except KTOError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        _report(error)
        _leave(1)


def _report(error: KTOError) -> None:
    """Print an error, unless another rank does."""
    rank = next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0")
    if error.said_here is False:
        return
    if rank != "0" and error.said_here is None:
        time.sleep(_PEER_DELAY)
        if os.getppid() != _PARENT:
            return  # started by rank 0, which has reported the same and ended
    spoken_for = rank == "0" or isinstance(error, RankError)
    sys.stderr.write(f"error: {error}\n" if spoken_for else f"[rank {rank}] error: {error}\n")


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    stopping.leave(code)
