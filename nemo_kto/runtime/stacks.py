"""Where the threads of a process are, for people and to be compared."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sysconfig
import tempfile
import traceback
from datetime import datetime
from pathlib import Path
from types import FrameType

from torch._C import _distributed_c10d

STACK_SIGNAL = signal.SIGUSR2
"""What a process with a `StackFile` writes its stacks at; others die of it."""

_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


class StackFile:
    """A file without a name that this process writes the stacks of its threads to when it gets a signal.

    Attributes:
        number: Of the open file.
    """

    def __init__(self) -> None:
        self.number = os.memfd_create("stacks")
        chain = callable(signal.getsignal(STACK_SIGNAL))
        faulthandler.register(STACK_SIGNAL, file=self.number, all_threads=True, chain=chain)

    def close(self) -> None:
        """Listen no more."""
        faulthandler.unregister(STACK_SIGNAL)
        os.close(self.number)

    def read(self) -> str:
        """Return what has been written."""
        return read_stacks(os.getpid(), self.number)


def read_stacks(pid: int, number: int) -> str:
    """Return what is in an open file of a process of the same user; nothing if that cannot be read."""
    try:
        return Path(f"/proc/{pid}/fd/{number}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def report(frame: FrameType | None) -> str:
    """Return what is to be known of this process: what a thread waits for, its stack, and what the others do.

    Args:
        frame: Of that thread.
    """
    parts = [*_unfinished_exchanges(), "".join(traceback.format_stack(frame)) if frame else ""]
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return "\n".join([*parts, f"All threads:\n{file.read()}"])


def place_of(frame: FrameType | None) -> int:
    """Return a number for where in the program a thread is, callers included."""
    places = []
    while frame is not None:
        places.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return hash(tuple(places))


def in_words(frame: FrameType | None) -> str:
    """Return where a thread is: its innermost function, and the innermost line that is not a library's."""
    if frame is None:
        return "no Python code"
    code, found = frame.f_code, frame
    while found is not None and _is_library(found.f_code.co_filename):
        found = found.f_back  # type: ignore[assignment]
    shown = found or frame
    name = getattr(code, "co_qualname", code.co_name)  # before Python 3.11 without its class
    return f"{name} ({'/'.join(Path(shown.f_code.co_filename).parts[-3:])}:{shown.f_lineno})"


def _is_library(file: str) -> bool:
    return file.startswith(("<", *_LIBRARIES)) and "nemo_kto" not in Path(file).parts


def _unfinished_exchanges() -> list[str]:
    """Return what torch's flight recorder knows of exchanges that have begun and not ended, in words."""
    try:
        entries = json.loads(_distributed_c10d._dump_fr_trace_json()).get("entries", [])
    except (AttributeError, ValueError, RuntimeError):  # of another version of torch
        return []
    lines = [
        f"{entry['profiling_name']} number {entry['collective_seq_id']} of group {entry['process_group'][-1]}, sizes "
        f"{entry['input_sizes']}, begun {datetime.fromtimestamp(entry['time_created_ns'] / 1e9):%H:%M:%S}"
        for entry in entries
        if not entry.get("retired") and entry.get("state") != "completed"
    ]
    return ["Exchanges that have begun and not ended:\n" + "\n".join(lines[-20:]) + "\n"] if lines else []
