"""What processes that write a checkpoint tell the rank that forked them, without a process in between.

Megatron-Core (dist_checkpointing/strategies/filesystem_async.py, 0.16) keeps a `multiprocessing.Manager` for this: a
process of 286 MB that imports everything once more, dies of a signal to the process group, so that no checkpoint can
be written any more, and stays for ever when its rank is killed. A file without a name does the same: what is forked
has it too, and it is gone with the last of them.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import queue
import signal
import tempfile
from typing import Any

_PR_SET_PDEATHSIG = 1


class WriteResults:
    """One message at a time from the process that made it, or from one forked from that, to the former."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)

    def put(self, message: Any) -> None:
        """Replace the message."""
        descriptor, data = self._file.fileno(), pickle.dumps(message)
        os.ftruncate(descriptor, 0)
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], written)

    def get_nowait(self) -> Any:
        """Take the message.

        Raises:
            queue.Empty: There is none, or it was not written to its end.
        """
        descriptor = self._file.fileno()
        size = os.fstat(descriptor).st_size
        data = bytearray()
        while len(data) < size and (piece := os.pread(descriptor, size - len(data), len(data))):
            data += piece
        os.ftruncate(descriptor, 0)
        try:
            return pickle.loads(data)  # written by this process or a copy of it: nobody else can open the file
        except (EOFError, pickle.UnpicklingError) as error:
            raise queue.Empty from error


def become_helper(parent: int) -> None:
    """Let this forked process go on when the group is told to end, and end with its parent.

    Signals to the group (of Slurm, a terminal, Kubernetes) are for ranks, which finish what they do and save: for that
    they need their helpers. But a rank that is killed must not leave any behind.

    Args:
        parent: Process id of the parent, which may be gone already.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
