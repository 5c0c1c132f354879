"""A few rounds of `random_kills.py`, and a short `soak.py`; both are run for long by hand, see docs/reliability.md."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import soak
from tests.faults.random_kills import VARIANTS, Kills, make_assets


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(
    ("variant", "rounds"),
    [(name, 1) if name == "DP2" else pytest.param(name, 3, marks=pytest.mark.slow) for name in VARIANTS],
)
def test_a_run_that_is_killed_ends_as_one_that_is_not(assets: Path, tmp_path: Path, variant: str, rounds: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    trial, generator = Kills(variant, assets, tmp_path), random.Random(seed)
    for number in range(rounds):
        trial.round(number, generator)


def test_a_process_that_writes_in_the_background_is_killed(assets: Path, tmp_path: Path) -> None:
    """The run says so and goes on, as the next save may succeed; it does not wait for what is gone."""
    trial, said = Kills("async", assets, tmp_path), []
    for number in range(5):  # one that has written all it had to is missed by nobody
        trial.round(number, random.Random(number + 1), kinds=["helper"])
        assert trial.notes["killed: helper"] >= 1
        said = [
            note for note in trial.notes if "was ended by SIGKILL, as the system does when memory runs out" in note
        ]
        if said:
            break
    assert said and all("training goes on: the next save comes as planned" in note for note in said)


def train_and_look(port: int, root: Path, folder: Path) -> list[dict[str, int]]:
    import torch.distributed as dist

    dist.destroy_process_group()
    soak.run(root, folder / "log", folder / "soak.jsonl", trainer__kto__max_steps=35)
    return soak.read(folder / "soak.jsonl")


def test_nothing_is_left_open(assets: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    """Over 35 steps with validations, checkpoints and answers; memory is for longer runs to tell."""
    (looks,) = run_ranks(train_and_look, 1, 0, assets, tmp_path)
    assert [one["step"] for one in looks] == list(range(5, 35, 5))
    for name in ("files", "threads", "processes"):
        assert max(one[name] for one in looks[3:]) <= max(one[name] for one in looks[:3]), (name, looks)


def test_what_grows_is_seen() -> None:
    flat = [{"step": n, "memory": 10**9 + n % 7 * 1000, "files": 50, "threads": 9, "processes": 1} for n in range(100)]
    assert soak.grows(flat) == []
    leaking = [{**one, "memory": one["memory"] + one["step"] * 10**6, "files": 50 + one["step"]} for one in flat]
    assert soak.grows(leaking) == ["memory", "files"]
