"""Errors that are a user's to mend, and how commands report them.

Each message names the place (file, line, field or key) and what to do.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_PEER_DELAY = 3.0
"""Seconds another rank waits before it repeats an error: the launcher usually ends it first, as rank 0 reported it."""

_PARENT = os.getppid()


class KTOError(Exception):
    """Base of every error raised on purpose; the command line prints its message without a traceback."""


class ConfigError(KTOError):
    """A configuration key, a combination of keys or a layout that cannot work."""


class DataError(KTOError):
    """A data file or record that cannot be read; names file, line and field."""


class DivergenceError(KTOError):
    """Training has left the finite numbers; names the step."""


class StoppedEarly(Exception):
    """Raised on all ranks when a run is to end before training has begun: no error, as it goes on another time."""


class CheckpointError(KTOError):
    """A checkpoint or a Hugging Face folder that is missing, incomplete or of another model."""


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


def run_guarded(action: Callable[[], None]) -> None:
    """Run `action`; an error that is the user's to mend becomes one line on stderr and exit code 1.

    HYDRA_FULL_ERROR=1 adds the traceback. All other errors pass through unchanged.
    """
    try:
        action()
    except KTOError as error:
        rank = next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0")
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        if rank != "0":
            time.sleep(_PEER_DELAY)
            if os.getppid() != _PARENT:
                _leave()  # started by rank 0, which has reported the same and ended
        sys.stderr.write(f"error: {error}\n" if rank == "0" else f"[rank {rank}] error: {error}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        _leave()


def _leave() -> NoReturn:
    """End this process with exit code 1, without the interpreter's shutdown and without leaving processes behind.

    Process groups of a failed start can hang in their destructors. Megatron's checkpoint writer has started a process
    that would stay for ever and keep this one's output open.
    """
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)
