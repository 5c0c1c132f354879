"""The other processes of this node, started early: they import while the first one reads the data, and wait.

Lightning starts them when all is judged and the data is read, and each then takes as long for its imports as the first
one took. Here they are started as soon as the configuration has been judged, and import, and do nothing else until
Lightning's launcher calls them up (`launcher.py`) with the environment in which it would have started them. One that
is not called up ends: its pipe is closed however the first process ends, also when it is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

_VARIABLE = "NEMO_KTO_STANDBY"
"""Environment variable of a process that waits: the file descriptor it waits at."""

_LAUNCHED = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Any of these means that somebody else starts processes, or that this is one of those that were started."""


@dataclass
class _Waiting:
    process: subprocess.Popen[bytes]
    pipe: IO[bytes]


_waiting: dict[int, _Waiting] = {}
"""Local rank -> a process that was started by this one and has not been called up."""


@contextmanager
def standing_by(number: int | None) -> Iterator[None]:
    """Start the other processes of this node; at the end, those that were not called up are ended.

    Args:
        number: Processes of this node, this one included; None if that is not known yet, and nothing is done.
    """
    if number is not None and not any(name in os.environ for name in _LAUNCHED):
        for local_rank in range(1, number):
            _waiting[local_rank] = _start(local_rank)
    try:
        yield
    finally:
        _dismiss()


def call_up(environments: Mapping[int, Mapping[str, str]]) -> list[subprocess.Popen[bytes]] | None:
    """Return the processes that stood by and go on now, by rank; None, and none is left, unless all stood by.

    Args:
        environments: Local rank -> the environment that its process goes on in.
    """
    ready = [rank for rank, waiting in _waiting.items() if waiting.process.poll() is None]
    if not environments or sorted(ready) != sorted(environments):
        _dismiss()
        return None
    called = []
    for rank, environment in sorted(environments.items()):
        waiting = _waiting.pop(rank)
        with suppress(BrokenPipeError), waiting.pipe:  # whoever watches the processes finds one that has ended
            waiting.pipe.write(json.dumps(dict(environment)).encode())
        called.append(waiting.process)
    return called


def wait_until_called() -> None:
    """Return in the first process at once, in one that stands by when it is called up; else end this process."""
    descriptor = os.environ.pop(_VARIABLE, None)
    if descriptor is None:
        return
    with open(int(descriptor), "rb") as pipe:
        given = pipe.read()  # up to the end of the pipe
    try:
        environment = json.loads(given)
    except ValueError:  # nothing, or what was written when the first process was killed
        os._exit(0)
    os.environ.clear()
    os.environ.update(environment)


def _start(local_rank: int) -> _Waiting:
    end, beginning = os.pipe()
    try:
        process = subprocess.Popen(
            _command(), env={**os.environ, "LOCAL_RANK": str(local_rank), _VARIABLE: str(end)}, pass_fds=(end,)
        )
    finally:
        os.close(end)
    return _Waiting(process, open(beginning, "wb"))


def _command() -> Sequence[str]:
    """Return the command of this process, as Lightning's launcher finds it."""
    spec = sys.modules["__main__"].__spec__
    program = [os.path.abspath(sys.argv[0])] if spec is None else ["-m", spec.name]
    return [sys.executable, *program, *sys.argv[1:]]


def _dismiss() -> None:
    while _waiting:
        _, waiting = _waiting.popitem()
        waiting.process.kill()
        waiting.process.wait()
        with suppress(BrokenPipeError):
            waiting.pipe.close()
