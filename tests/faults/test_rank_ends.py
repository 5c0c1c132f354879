"""What the others say when a rank of a run ends."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_kto import stopping
from nemo_kto.errors import DataError
from nemo_kto.runtime import watchdog
from tests.faults.commands import TP2, Command, training
from tests.faults.forked_ranks import ForkedRanks, Place, said

TRAINING = Path(__file__).resolve().parents[2] / "examples" / "nlp" / "kto" / "train_gpt_kto.py"


def exchange() -> None:
    dist.all_reduce(torch.ones(1))


def settled(place: Place, act: Any) -> None:
    """Meet, then act as a command that trains does."""
    guard = place.meet()
    guard.ranks.stop_together = True
    try:
        act()
    except BaseException as error:
        guard.ranks.note(error)
        dist.destroy_process_group()
        raise guard.ranks.settle(error) from error


def exchange_for_ever(place: Place) -> None:
    def act() -> None:
        exchange()
        place.note("exchanging")
        while True:
            exchange()

    settled(place, act)


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_one_of_those_left_names_the_rank_that_was_killed(tmp_path: Path, killed: int) -> None:
    ranks = ForkedRanks(exchange_for_ever, 3, tmp_path)
    for rank in range(3):
        ranks.wait_for("exchanging", rank)
    ranks.send(killed, signal.SIGKILL)
    ended = ranks.ended()
    assert [code for code, _ in ended] == [-signal.SIGKILL if rank == killed else 1 for rank in range(3)]
    (line,) = said(ended)
    process = rf"process {ranks.processes[killed].pid} on \S+"
    assert re.fullmatch(
        rf"error: Rank {killed} \({process}\) ended without a word, as when it is killed, after step 7\. "
        r"The others cannot go on without it\. Run the same command again\.",
        line,
    )


def fail_on(place: Place, failing: int, error: Exception) -> None:
    def act() -> None:
        exchange()
        if place.rank == failing:
            raise error
        exchange()

    settled(place, act)


@pytest.mark.parametrize("failing", [0, 1])
def test_what_one_rank_finds_is_said_once(tmp_path: Path, failing: int) -> None:
    ended = ForkedRanks(fail_on, 2, tmp_path, failing, DataError("train.jsonl:7 is broken.")).ended()
    assert [code for code, _ in ended] == [1, 1]
    (line,) = said(ended)
    assert re.fullmatch(rf"(\[rank {failing}\] )?error: (Rank {failing}: )?train.jsonl:7 is broken\..*", line)


def fail_everywhere(place: Place) -> None:
    def act() -> None:
        exchange()
        raise DataError("train.jsonl:7 is broken.")

    settled(place, act)


def test_what_all_ranks_find_is_said_once(tmp_path: Path) -> None:
    ended = ForkedRanks(fail_everywhere, 3, tmp_path).ended()
    assert [code for code, _ in ended] == [1, 1, 1]
    assert len(said(ended)) == 1


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path: Path) -> None:
    ended = ForkedRanks(fail_on, 2, tmp_path, 1, ZeroDivisionError("by hand")).ended()
    assert "Traceback" in ended[1][1] and "ZeroDivisionError: by hand" in ended[1][1]
    (line,) = ended[0][1].splitlines()
    assert re.match(r"error: Rank 1 \(process \d+ on \S+\) failed: ZeroDivisionError: by hand\. The others", line)


def stop_before_training(place: Place) -> None:
    """One rank is told to stop while it loads, the other one waits for it."""
    guard = place.meet()
    place.note("met")
    if place.rank == 1:
        place.wait_for("never")
    try:
        exchange()
    except BaseException as error:
        raise guard.ranks.settle(error) from error


def test_a_rank_that_leaves_as_it_was_told_to_takes_the_others_along(tmp_path: Path) -> None:
    ranks = ForkedRanks(stop_before_training, 2, tmp_path)
    for rank in range(2):
        ranks.wait_for("met", rank)
    for rank in range(2):
        ranks.send(rank, signal.SIGTERM)
    ended = ranks.ended()
    assert [code for code, _ in ended] == [75, 75]
    assert said(ended) == ["Stopped by SIGTERM; run the same command to continue."]


def wait_outside(place: Place) -> None:
    """As a rank does whose library does not notice that another one is gone."""
    watchdog._FOR_THE_MAIN_THREAD = 0.5  # type: ignore[assignment]
    guard = place.meet()
    guard.ranks.stop_together = True
    place.note("met")
    place.wait_for("never")


def test_a_main_thread_that_does_not_notice_is_not_waited_for(tmp_path: Path) -> None:
    ranks = ForkedRanks(wait_outside, 2, tmp_path)
    for rank in range(2):
        ranks.wait_for("met", rank)
    ranks.send(1, signal.SIGKILL)
    ended = ranks.ended()
    assert [code for code, _ in ended] == [1, -signal.SIGKILL]
    (line,) = said(ended)
    assert line.startswith("error: Rank 1 (") and "after step 7" in line


def goodbye(place: Place) -> None:
    """Rank 0 still has something to do when the others are done, and must not be ended by their end."""
    guard = place.meet()
    if place.rank == 0:
        place.wait_for("leaving 1")
        for _ in range(1000):  # by then the other one would be gone
            guard.ranks._store.add("anything", 1)
        assert not (place.folder / "left 1").exists()
    place.note("leaving")
    guard.ranks.leave_together()
    place.note("left")
    os._exit(stopping.STOPPED_EARLY)


def test_no_rank_leaves_before_rank_0(tmp_path: Path) -> None:
    assert [code for code, _ in ForkedRanks(goodbye, 2, tmp_path).ended()] == [75, 75]


def test_a_rank_that_ends_before_all_have_met(root: Path, tmp_path: Path) -> None:
    """The process that has started it does not wait for it for ten minutes."""
    without = "import os, sys\nif os.environ.get('LOCAL_RANK') == '1':\n    sys.modules['megatron'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(without)
    arguments = training(root, tmp_path / "log", script=TRAINING, **TP2)
    code, _, errors = Command(tmp_path, arguments, PYTHONPATH=str(tmp_path)).end()
    assert code == 1 and "ModuleNotFoundError: No module named 'megatron.core'" in errors
    (line,) = [line for line in errors.splitlines() if "error: " in line]
    assert re.fullmatch(r"error: Rank 1 \(process \d+ of this machine\) was ended with exit code 1\.", line)
