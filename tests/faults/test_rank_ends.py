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

from nemo_kto import errors, stopping
from nemo_kto.errors import DataError
from nemo_kto.runtime import watchdog
from nemo_kto.runtime.early_end import told_to_others
from nemo_kto.runtime.log_lock import FOLDER as LOCK
from tests.distributed_harness import free_port
from tests.faults.commands import TP2, Command, training
from tests.faults.forked_ranks import ForkedRanks, Place, said
from tests.waiting import wait_until

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


def fail_early(place: Place, failing: int, error: Exception, numbers: dict[str, str]) -> None:
    """Come to where the ranks meet, but for one; as ranks do that nobody ends with each other."""
    errors._PARENT = os.getppid()  # which is not that of the process that this one was forked from
    os.environ.update(NODE_RANK="0", MASTER_PORT=str(place.port), **numbers)
    with told_to_others(lambda: ("auto", 1)):
        if place.rank == failing:
            raise error
        place.meet()


COUNTED = {"WORLD_SIZE": "3"}


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_fails_before_all_have_met_is_not_waited_for(tmp_path: Path, failing: int) -> None:
    ranks = ForkedRanks(fail_early, 3, tmp_path, failing, DataError("/data/train.jsonl is not there."), COUNTED)
    process = rf"process {ranks.processes[failing].pid} on \S+"
    ended = ranks.ended()
    assert [code for code, _ in ended] == [1, 1, 1]
    own, others = r"error: /data/train\.jsonl is not there\.", ""
    if failing:
        others = (
            rf"error: Rank 2 \({process}\): /data/train\.jsonl is not there\. The others cannot begin without it\.\n"
        )
        own = rf"\[rank 2\] {own}"
    assert re.fullmatch(f"{own}\n", ended[failing][1])
    assert re.fullmatch(others, "".join(errors for rank, (_, errors) in enumerate(ended) if rank != failing))


def test_a_fault_of_the_program_before_all_have_met(tmp_path: Path) -> None:
    ended = ForkedRanks(fail_early, 2, tmp_path, 1, ZeroDivisionError("by hand"), {"WORLD_SIZE": "2"}).ended()
    assert ended[1][1].splitlines()[-1] == "ZeroDivisionError: by hand"
    (line,) = ended[0][1].splitlines()
    assert re.match(r"error: Rank 1 \(process \d+ on \S+\) failed: ZeroDivisionError: by hand\. The others", line)


def fail_everywhere_early(place: Place, numbers: dict[str, str]) -> None:
    fail_early(place, place.rank, DataError("/data/train.jsonl is not there."), numbers)


def test_what_all_find_before_they_meet_ends_all(tmp_path: Path) -> None:
    ended = ForkedRanks(fail_everywhere_early, 3, tmp_path, COUNTED).ended()
    assert [code for code, _ in ended] == [1, 1, 1]
    assert len(said(ended)) == 3


def end_first(folder: Path, what: str) -> None:
    """Have rank 1 of a command do something before it does anything else."""
    (folder / "sitecustomize.py").write_text(f"import os, sys\nif os.environ.get('LOCAL_RANK') == '1':\n    {what}\n")


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("os._exit(7)", r"Rank 1 \(process \d+ of this machine\) was ended with exit code 7\."),
        (
            "sys.modules['megatron'] = None",
            r"Rank 1 \(process \d+ on \S+\) failed: ModuleNotFoundError: No module named 'megatron\.core'.*",
        ),
    ],
)
def test_a_rank_of_this_machine_that_ends_before_all_have_met(
    root: Path, tmp_path: Path, what: str, sentence: str
) -> None:
    """The process that has started it does not wait for it for ten minutes."""
    end_first(tmp_path, what)
    arguments = training(root, tmp_path / "log", script=TRAINING, **TP2)
    code, _, errors = Command(tmp_path, arguments, PYTHONPATH=str(tmp_path)).end()
    assert code == 1
    (line,) = [line for line in errors.splitlines() if "error: " in line]
    assert re.fullmatch(f"error: {sentence}", line)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("model__data__data_prefix__train", "no such file"),
        ("pretrained_checkpoint__restore_from_path", "is not a folder"),  # found when keys are judged
    ],
)
def test_ranks_that_nobody_ends_with_each_other(root: Path, tmp_path: Path, key: str, what: str) -> None:
    """As under `srun` alone: one lacks the data, or the model."""
    by_hand = {"WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_PORT": str(free_port())}

    def start(rank: int, **changes: str) -> Command:
        arguments = training(root, tmp_path / "log", script=TRAINING, **TP2, **changes)
        return Command(tmp_path / str(rank), arguments, LOCAL_RANK=str(rank), **by_hand)

    first = start(0)
    wait_until((tmp_path / "log" / LOCK).exists, process=first.process)  # on a busy machine to get there takes long
    second = start(1, **{key: str(tmp_path / "none")})
    (code, _, waiting), (other_code, _, failing) = first.end(), second.end()
    assert (code, other_code) == (1, 1)
    (own,) = [line.removeprefix("[rank 1] error: ") for line in failing.splitlines() if "error: " in line]
    (line,) = [line for line in waiting.splitlines() if "error: " in line]
    assert str(tmp_path / "none") in own and what in own
    assert re.sub(r" \(process \d+ on \S+\)", "", line) == f"error: Rank 1: {own} The others cannot begin without it."
