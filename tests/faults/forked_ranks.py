"""Ranks as processes of their own that meet, and may be killed: forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from tests.distributed_harness import free_port
from tests.waiting import HANG, wait_until

PATIENT = 60.0
"""Minutes after which a rank hangs, where that is not what is tested."""


QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
"""What `silence_startup_noise` sets too."""


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.everything", "tests.faults.forked_ranks"])
    return context


@dataclass(frozen=True)
class Place:
    """What a rank has to know.

    Attributes:
        rank: Which one it is.
        world_size: How many there are.
        port: Where they meet.
        folder: Theirs.
    """

    rank: int
    world_size: int
    port: int
    folder: Path

    def meet(self, *, minutes: float = PATIENT, facts: dict[str, str] | None = None) -> Any:
        """Make the default group, compare the facts and return the watchdog; each rank has taken 7 steps."""
        from nemo_kto.runtime import meeting, watchdog

        watchdog._TICK = 0.2
        rules = meeting.RankRules(
            timeout=timedelta(minutes=minutes), hang_folder=self.folder / "hang", facts=facts or {}
        )
        store = meeting.join(
            "gloo",
            address="127.0.0.1",
            port=self.port,
            rank=self.rank,
            world_size=self.world_size,
            rules=rules,
        )
        guard = watchdog.watch_over(store, step=lambda: 7, exit_codes=dict, rules=rules)
        meeting.check_alike(rules.facts)
        return guard

    def note(self, name: str) -> None:
        """Tell the test that this rank has come to a place."""
        (self.folder / f"{name} {self.rank}").touch()

    def wait_for(self, name: str) -> None:
        """Wait for what the test says."""
        wait_until((self.folder / name).exists)


class ForkedRanks:
    """Ranks that run `function(place, *arguments)` as a command would; what they print is in files of the folder."""

    def __init__(self, function: Callable[..., None], world_size: int, folder: Path, *arguments: Any) -> None:
        self.folder = folder
        self.processes: list[Any] = []
        port = free_port()
        for rank in range(world_size):
            place = Place(rank, world_size, port, folder)
            self.processes.append(_context().Process(target=_run, args=(function, place, arguments)))
            with mock.patch.dict(os.environ, QUIET):  # of the process that forks them, which is started now
                self.processes[-1].start()

    def wait_for(self, name: str, rank: int) -> None:
        """Return once a rank has noted that it has come to a place."""
        wait_until((self.folder / f"{name} {rank}").exists)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a rank a signal."""
        os.kill(self.processes[rank].pid, number)

    def ended(self) -> list[tuple[int, str]]:
        """Return exit code and errors of each rank, once all have ended."""
        try:
            for process in self.processes:
                process.join(HANG)
            return [
                (process.exitcode, (self.folder / f"errors {rank}.txt").read_text())
                for rank, process in enumerate(self.processes)
            ]
        finally:
            for process in self.processes:
                process.kill()


def said(ended: list[tuple[int, str]]) -> list[str]:
    """Return the lines that all ranks have printed."""
    lines = [line for _, errors in ended for line in errors.splitlines()]
    print(*lines, sep="\n")
    return lines


def _run(function: Callable[..., None], place: Place, arguments: tuple[Any, ...]) -> None:
    from nemo_kto import stopping
    from nemo_kto.errors import run_guarded

    errors = os.open(place.folder / f"errors {place.rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    os.environ["LOCAL_RANK"] = str(place.rank)
    stopping.take_signals()
    run_guarded(lambda: function(place, *arguments))
    os._exit(0)  # what hangs in the interpreter's shutdown is not what is tested
