"""Processes by name: which one it is, on which machine, and whether it is still there. Linux only; without torch."""

from __future__ import annotations

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


def _look_at(pid: int) -> tuple[str, int] | None:
    """Return (state, start time) of a process; None if there is none of that number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], int(fields[19])
