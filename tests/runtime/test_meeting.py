"""How ranks meet: whoever does not come, or comes to the wrong door, is named."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nemo_kto.errors import ConfigError, RankError
from nemo_kto.runtime import meeting
from tests.distributed_harness import free_port

NOT_LONG = timedelta(milliseconds=300)


@pytest.fixture(autouse=True)
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_store", None)


def rules(tmp_path: Path, **facts: str) -> meeting.RankRules:
    return meeting.RankRules(timeout=NOT_LONG, hang_folder=tmp_path, facts=facts)


def test_a_taken_port_is_said_at_once() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"MASTER_PORT={port} is taken by another process .* free port"):
            meeting.open_store(port, timeout=NOT_LONG)


def test_any_free_port_will_do() -> None:
    port = meeting.open_store(0, timeout=NOT_LONG)
    assert port > 0
    other = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=NOT_LONG)
    other.set("asked", "yes")
    assert meeting._store is not None and meeting._store.get("asked") == b"yes"


def test_rank_0_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with pytest.raises(RankError, match=rf"Rank 3 has not reached rank 0 at 127.0.0.1:{port} \(MASTER_ADDR"):
        meeting._reach_store("127.0.0.1", port, rank=3, timeout=NOT_LONG)
    assert capfd.readouterr().err == ""  # torch would print its stack for each try


def test_something_else_at_the_port_is_not_waited_for_for_ever() -> None:
    """It accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RankError, match=rf"What answers rank 1 at 127.0.0.1:{port} .* is not rank 0 of this run"):
            meeting._reach_store("127.0.0.1", port, rank=1, timeout=NOT_LONG)


def test_the_missing_ranks_are_named() -> None:
    store = dist.HashStore()
    store.set("here 2", "")
    store.add("here", 1)
    with pytest.raises(RankError, match=r"Of 4 ranks, ranks 1, 3 did not come within 0\.005 minutes"):
        meeting._await_everyone(store, rank=0, world_size=4, timeout=NOT_LONG)


def test_small_limits_do_not_hurry_the_start(tmp_path: Path) -> None:
    """How long imports and data take has nothing to do with how long an exchange does."""
    found = rules(tmp_path)
    assert found.start == timedelta(hours=1) / 6
    assert found.patience > found.timeout


def compare(*facts: dict[str, str]) -> str:
    try:
        meeting.check_alike(facts[dist.get_rank()])
    except ConfigError as error:
        return str(error)
    return "alike"


SAME = {"model.optim.lr": "1e-06", "the version of torch": "2.13.0", "the train data (a digest)": "ab12"}


def test_what_is_alike_passes(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(compare, 3, SAME, dict(reversed(SAME.items())), SAME) == ["alike"] * 3


@pytest.mark.parametrize("name", SAME)
def test_what_differs_is_named_on_all_ranks(run_ranks: Callable[..., Any], name: str) -> None:
    messages = run_ranks(compare, 3, SAME, {**SAME, name: "another"}, SAME)
    assert len(set(messages)) == 1
    host = re.escape(socket.gethostname())
    expected = rf"{re.escape(name)} is {SAME[name]} on ranks 0, 2 \({host}\), and another on rank 1 \({host}\)\."
    assert re.search(rf"not given the same\. {expected} Start all of them", messages[0])


def test_what_only_one_has_is_named(run_ranks: Callable[..., Any]) -> None:
    (message, _) = run_ranks(compare, 2, SAME, {**SAME, "the version of apex": "0.1"})
    assert "the version of apex is not there on rank 0" in message and "0.1 on rank 1" in message


def test_of_many_differences_some_are_named(run_ranks: Callable[..., Any]) -> None:
    ones, twos = ({f"key{number}": str(value) for number in range(9)} for value in (1, 2))
    (message, _) = run_ranks(compare, 2, ones, twos)
    assert message.count(" is 1 on rank 0 ") == 3 and "(6 more differ.)" in message


def make_groups(port: int, folder: str) -> list[float]:
    """Make a group twice in each of two processes, as a program does that trains and then evaluates."""
    import os

    import torch

    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    sums = []
    for _ in range(2):
        long = meeting.RankRules(timeout=timedelta(hours=1), hang_folder=Path(folder), facts={})
        meeting.join("gloo", address="127.0.0.1", port=port, rank=rank, world_size=world_size, rules=long)
        found = torch.tensor(float(rank + 1))
        dist.all_reduce(found)
        sums.append(float(found))
        dist.destroy_process_group()
    assert os.environ["MASTER_PORT"] == str(port)
    return sums


def test_a_program_can_meet_again(run_ranks: Callable[..., Any], tmp_path: Path) -> None:
    assert run_ranks(make_groups, 2, free_port(), str(tmp_path)) == [[3.0, 3.0]] * 2
