"""What becomes of a run that hangs: an exchange that never ends, a rank that was stopped or is lost in a library."""

from __future__ import annotations

import ctypes
import itertools
import select
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_kto.runtime import watchdog
from tests.faults.forked_ranks import ForkedRanks, Place, said

SOON = 1 / 60
"""Minutes; what is not to hang here takes no time at all."""


def exchange_for_ever(place: Place, minutes: float) -> None:
    guard = place.meet(minutes=minutes)
    place.note("met")
    try:
        while True:
            dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        raise guard.ranks.settle(error) from error


def test_a_rank_that_was_stopped_is_named_with_its_stack(tmp_path: Path) -> None:
    ranks = ForkedRanks(exchange_for_ever, 3, tmp_path, SOON)
    for rank in range(3):
        ranks.wait_for("met", rank)
    ranks.send(1, signal.SIGSTOP)
    ended = ranks.ended()
    assert [code for code, _ in ended] == [1, 1, 1]
    (line,) = said(ended)
    assert line.startswith(
        "error: The run hangs: nothing has happened for 0.0167 minutes (trainer.timeout_minutes), after step 7. "
        f"Rank 1 (process {ranks.processes[1].pid} on "
    )
    assert "was stopped. Ranks 0, 2 are in all_reduce (tests/faults/test_rank_hangs.py:" in line
    assert str(tmp_path / "hang") in line
    stacks = [(tmp_path / "hang" / f"rank{rank}.txt").read_text() for rank in range(3)]
    for rank, stack in enumerate(stacks):
        assert stack.startswith(f"rank {rank} of 3, after step 7: process {ranks.processes[rank].pid} on ")
        assert "exchange_for_ever" in stack
    assert "When it was woken:" in stacks[1]
    assert "gloo:all_reduce" in stacks[0] and "begun" in stacks[0]


def test_rank_0_can_be_the_one(tmp_path: Path) -> None:
    """With it the store is silent, that the others tell each other by."""
    ranks = ForkedRanks(exchange_for_ever, 2, tmp_path, SOON)
    for rank in range(2):
        ranks.wait_for("met", rank)
    ranks.send(0, signal.SIGSTOP)
    ended = ranks.ended()
    assert [code for code, _ in ended] == [1, 1]
    (line,) = said(ended)
    assert f"Rank 0 (process {ranks.processes[0].pid} on " in line and "was stopped." in line
    assert "exchange_for_ever" in (tmp_path / "hang" / "rank0.txt").read_text()


def leave_one_waiting(place: Place) -> None:
    guard = place.meet(minutes=SOON)
    if place.rank == 0:
        place.wait_for("never")
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        raise guard.ranks.settle(error) from error


def test_ranks_that_run_are_named_by_where_they_are(tmp_path: Path) -> None:
    ended = ForkedRanks(leave_one_waiting, 2, tmp_path).ended()
    assert [code for code, _ in ended] == [1, 1]
    (line,) = said(ended)
    assert " is in all_reduce (tests/faults/test_rank_hangs.py:" in line
    assert "/tests/waiting.py:" in line


def hold_pythons_lock(place: Place) -> None:
    watchdog._FOR_STACKS = 4.0  # that are waited for in vain
    place.meet(minutes=SOON)
    if place.rank == 1:
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)  # PyDLL: no thread runs meanwhile
    dist.all_reduce(torch.ones(1))


def test_a_rank_that_cannot_run_python_is_named_with_its_stack(tmp_path: Path) -> None:
    ranks = ForkedRanks(hold_pythons_lock, 2, tmp_path)
    ended = ranks.ended()
    assert [code for code, _ in ended] == [1, -signal.SIGKILL]
    (line,) = said(ended)
    assert f"Rank 1 (process {ranks.processes[1].pid} on " in line and "does not answer" in line
    assert "hold_pythons_lock" in (tmp_path / "hang" / "rank1.txt").read_text()


def be_suspended(place: Place) -> None:
    """Between two looks an hour passes, again and again."""
    clock = itertools.count(step=3600)
    ticks = itertools.count()

    def hours() -> int:
        if next(ticks) == 5:
            (place.folder / "go").touch()
        return next(clock)

    watchdog.time = SimpleNamespace(monotonic=hours)  # type: ignore[assignment]
    guard = place.meet(minutes=1)
    place.wait_for("go")
    guard.end()


def test_time_in_which_nothing_ran_does_not_count(tmp_path: Path) -> None:
    """After Ctrl-Z, or when the system has suspended the job."""
    assert ForkedRanks(be_suspended, 1, tmp_path).ended() == [(0, "")]


def work(place: Place, kind: str) -> None:
    """Do something for longer than one may do nothing, and only that."""
    looks, place_of = itertools.count(), watchdog.place_of

    def look(frame: Any) -> int:
        if next(looks) == 12:
            (place.folder / "go").touch()
        return place_of(frame) if kind == "moves" else 0

    watchdog.place_of = look  # type: ignore[attr-defined]
    watchdog._BUSY = 0.01  # of a processor that others want as well
    guard = place.meet(minutes=SOON)
    while not (place.folder / "go").exists():
        if kind == "computes":
            sum(range(10**6))
        elif kind == "reads":
            select.select([], [], [], 0.1)
            Path(__file__).read_bytes()
        else:
            for depth in range(20):
                rest(depth)
    guard.end()


def rest(depth: int) -> None:
    """Wait at one of many places."""
    if depth:
        rest(depth - 1)
    else:
        select.select([], [], [], 0.03)


@pytest.mark.parametrize("kind", ["computes", "reads", "moves"])
def test_who_works_does_not_hang(tmp_path: Path, kind: str) -> None:
    assert ForkedRanks(work, 1, tmp_path, kind).ended() == [(0, "")]
