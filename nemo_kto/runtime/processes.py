"""Processes by name: which one it is, on which machine, and whether it is still there. Linux only; without torch."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_GONE = ("Z", "X", "x")
_STOPPED = ("T", "t")


@dataclass(frozen=True)
class ProcessName:
    """A process, of this machine or another.

    Attributes:
        host: Name of its machine, for people.
        machine: What tells machines, and containers with process numbers of their own, apart.
        pid: Its number there.
        born: When it was started, in the machine's clock ticks: numbers are used again.
    """

    host: str
    machine: str
    pid: int
    born: int

    @property
    def is_near(self) -> bool:
        """Whether it can be looked at from here."""
        return self.machine == _machine()

    @property
    def is_gone(self) -> bool:
        """Whether it has ended; never true of one that is not near."""
        if not self.is_near:
            return False
        found = _look_at(self.pid)
        return found is None or found[1] != self.born or found[0] in _GONE

    @property
    def is_stopped(self) -> bool:
        """Whether it was stopped, by SIGSTOP or a debugger, and has not ended; never true of one that is not near."""
        if not self.is_near or self.is_gone:
            return False
        found = _look_at(self.pid)
        return found is not None and found[0] in _STOPPED

    def signal(self, number: int) -> None:
        """Send it a signal, if it is near and there."""
        if self.is_near and not self.is_gone:
            try:
                os.kill(self.pid, number)
            except (ProcessLookupError, PermissionError):
                pass

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> ProcessName:
    """Return the name of this process."""
    found = _look_at(os.getpid())
    return ProcessName(socket.gethostname(), _machine(), os.getpid(), 0 if found is None else found[1])


@cache
def _machine() -> str:
    """Return what is the same for all processes that see each other's numbers, until the machine is started again."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def work_of(thread: int) -> tuple[int, float]:
    """Return what a thread of this process has done, as far as the system counts it.

    Args:
        thread: Its number for the system.

    Returns:
        Bytes that it, and the processes that this one has started, have read and written, with the pages that it had
        to be given; and the seconds that it was computing.
    """
    folder = Path(f"/proc/self/task/{thread}")
    done = _bytes(folder / "io")
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            done += sum(_bytes(Path(f"/proc/{child}/io")) for child in children.read_text(encoding="ascii").split())
    with contextlib.suppress(OSError):
        fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        faults, ticks = int(fields[7]) + int(fields[9]), int(fields[11]) + int(fields[12])
        return done + faults, ticks / os.sysconf("SC_CLK_TCK")
    return done, 0.0


def _bytes(file: Path) -> int:
    """Return the bytes that a process, or a thread, has read and written; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        counts = dict(line.split(": ") for line in file.read_text(encoding="ascii").splitlines())
        return int(counts["rchar"]) + int(counts["wchar"])
    return 0


def _look_at(pid: int) -> tuple[str, int] | None:
    """Return (state, start time) of a process; None if there is none of that number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], int(fields[19])
