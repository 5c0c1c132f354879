"""Who has started a run's processes, by what their environment says of it; Slurm itself: tests/cluster."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
import torch

from nemo_kto.errors import ConfigError
from nemo_kto.runtime import launch as launching
from nemo_kto.runtime.launch import (
    check_environment,
    check_launched,
    check_reaches,
    known_device_count,
    launch,
    meeting_place,
    node_count,
)
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.parallel import device_count

LAUNCHERS = re.compile("RANK|WORLD_SIZE|MASTER_|TORCHELASTIC|SLURM")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set variables of launchers, and no others; there is no terminal."""
    monkeypatch.setattr(launching, "_has_terminal", lambda: False)

    def set_only(**variables: str) -> None:
        for name in [name for name in os.environ if LAUNCHERS.search(name)]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_only


# copied from jobs of Slurm 22.05
BATCH = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NAME": "kto",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
"""In the batch script of a job of two nodes with two tasks each."""

TASK = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
"""In the last task that `srun` has started there."""

ONE = {**BATCH, "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}
"""In the batch script of `sbatch --ntasks=1`."""

ONE_TASK = {**ONE, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}
"""In the one task of `srun --ntasks=1`."""

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
"""In the last process of torchrun on two nodes."""


@pytest.mark.parametrize(
    ("variables", "starter", "rank", "auto"),
    [
        ({}, None, 0, (None, 1)),
        (TORCHRUN, "torchrun", 3, (2, 2)),
        ({**TORCHRUN, "GROUP_WORLD_SIZE": "2"}, "torchrun", 3, (2, 2)),
        ({**TASK, **TORCHRUN, "RANK": "2"}, "torchrun", 2, (2, 2)),  # srun has started torchrun
        (TASK, "Slurm", 3, (2, 2)),
        ({**TASK, "SLURM_JOB_NAME": "interactive"}, "Slurm", 3, (2, 2)),  # salloc calls its jobs so
        ({**TASK, "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, "Slurm", 3, (2, 2)),
        # fewer tasks than the job has been given
        ({**TASK, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, "Slurm", 3, (1, 2)),
        (ONE, None, 0, (None, 1)),
        (ONE_TASK, None, 0, (None, 1)),
        ({**BATCH, "SLURM_JOB_NUM_NODES": "1"}, None, 0, (None, 1)),  # srun was forgotten
        ({**BATCH, "SLURM_STEP_ID": str(0xFFFFFFFB), "SLURM_JOB_NUM_NODES": "1"}, None, 0, (None, 1)),
        ({**ONE_TASK, "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "something else", 1, (None, 1)),  # by its first process
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "something else", 1, (4, 2)),
    ],
)
def test_who_has_started_it(
    environment: Callable[..., None],
    variables: dict[str, str],
    starter: str | None,
    rank: int,
    auto: tuple[int | None, int],
) -> None:
    environment(**variables)
    found = launch()
    assert (found.starter, found.rank) == (starter, rank)
    assert (known_device_count("auto"), node_count("auto")) == auto
    assert (known_device_count(3), node_count(5)) == (3, 5)


def test_a_shell_that_srun_has_opened_is_no_task(
    environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`srun --ntasks=4 --pty bash`: what is typed there has the variables of a task, and no other tasks beside it."""
    monkeypatch.setattr(launching, "_has_terminal", lambda: True)
    environment(**TASK, SLURM_TASK_PID="1")
    assert launch().starter is None
    environment(**TASK, SLURM_TASK_PID=str(os.getpid()))  # `srun --ntasks=4 --pty python`
    assert launch().starter == "Slurm"


def test_devices_of_a_node(environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    environment()
    assert device_count(4, "cpu") == 4
    assert device_count("auto", "cpu") == 1
    environment(**TASK)
    assert device_count("auto", "cpu") == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_count("auto", "gpu") == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="Slurm started 2 processes, but this process sees 1 GPUs"):
        device_count("auto", "gpu")
    with pytest.raises(ConfigError, match="trainer.devices=8, but this process sees 1 GPUs"):
        device_count(8, "gpu")


@pytest.mark.parametrize(
    ("variables", "processes", "nodes", "message"),
    [
        (TORCHRUN, 2, 1, r"torchrun started 4 processes on 2 nodes, but .* is 2 x 1\. Set both to auto to take what"),
        (TORCHRUN, 4, 1, r"torchrun started 4 processes on 2 nodes, but .* is 4 x 1\."),
        (TASK, 2, 2, r"Slurm started 4 processes on 2 nodes, but .* is 1 x 2\. .* what srun was given"),
        (TASK, 4, 1, r"Slurm started 4 processes on 2 nodes, but .* is 4 x 1\."),
        (
            {**TASK, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "4"},
            4,
            2,
            r"Slurm started 4 processes on one node, but .* is 2 x 2\.",
        ),
        ({**TASK, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, 4, 2, "Slurm started 3, 1 processes on its nodes"),
        (
            {**TORCHRUN, "GROUP_WORLD_SIZE": "3"},
            4,
            2,
            "torchrun started 4 processes on 3 nodes, 2 of them on this one",
        ),
        ({**TASK, "RANK": "0"}, 4, 2, "RANK=0 contradicts SLURM_PROCID=3"),
        ({**TASK, "LOCAL_RANK": "0"}, 4, 2, "LOCAL_RANK=0 contradicts SLURM_LOCALID=1"),
        ({**TASK, "SLURM_PROCID": "4"}, 4, 2, r"rank 4 of 4 \(SLURM_PROCID\)"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "1"}, 2, 1, "What started this process started 4"),
        ({**ONE, "RANK": "0", "WORLD_SIZE": "1"}, 2, 1, "says RANK=0 WORLD_SIZE=1, but neither torchrun nor Slurm"),
    ],
)
def test_what_was_started_must_be_what_is_configured(
    environment: Callable[..., None], variables: dict[str, str], processes: int, nodes: int, message: str
) -> None:
    environment(**variables)
    with pytest.raises(ConfigError, match=message):
        check_launched(Layout(world_size=processes), nodes)


@pytest.mark.parametrize("variables", [TASK, TORCHRUN])
def test_what_agrees_is_accepted(environment: Callable[..., None], variables: dict[str, str]) -> None:
    environment(**variables)
    check_environment()
    check_launched(Layout(world_size=4), 2)
    check_reaches(2)


@pytest.mark.parametrize("variables", [{}, ONE, ONE_TASK, {**BATCH, "SLURM_JOB_NUM_NODES": "1"}])
def test_one_process_starts_the_others_itself(environment: Callable[..., None], variables: dict[str, str]) -> None:
    """`sbatch --ntasks=1 --wrap "python ... trainer.devices=2"`: two processes are asked for, and two there are."""
    environment(**variables)
    check_environment()
    check_launched(Layout(world_size=2), 1)
    check_reaches(1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "trainer.num_nodes is 2, but nobody has started this process on several nodes"),
        (BATCH, "trainer.num_nodes is 2, but in job 12 Slurm has started this one process only: put srun before"),
        ({**ONE_TASK, "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1"}, "but in job 9_1 Slurm has"),
    ],
)
def test_one_process_cannot_reach_other_nodes(
    environment: Callable[..., None], variables: dict[str, str], message: str
) -> None:
    environment(**variables)
    with pytest.raises(ConfigError, match=message):
        check_reaches(2)


def test_processes_by_hand_on_each_node(environment: Callable[..., None]) -> None:
    environment(NODE_RANK="1", MASTER_ADDR="n0", MASTER_PORT="29500")
    check_environment()
    check_reaches(2)
    with pytest.raises(ConfigError, match="NODE_RANK=1 says that there are several nodes, but not how many"):
        node_count("auto")


def test_nodes_of_a_job_are_not_left_idle_unsaid(environment: Callable[..., None]) -> None:
    environment(**BATCH)
    with pytest.raises(ConfigError, match="Slurm's job has 2 nodes, but this process was started on one of them"):
        node_count("auto")
    assert node_count(1) == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n[0-1]", "n0"), ("gpu[01-04,07],cpu1", "gpu01"), ("a7", "a7"), ("a7,b2", "a7"), ("h-[9,12].x", "h-9.x")],
)
def test_where_tasks_meet(environment: Callable[..., None], nodes: str, first: str) -> None:
    environment(**{**TASK, "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "1234567"})
    assert meeting_place() == (first, 15000 + 4567)
    environment(**TASK, MASTER_ADDR="10.0.0.7", MASTER_PORT="29500")
    assert meeting_place() == ("10.0.0.7", 29500)


def test_what_is_said_of_a_run(environment: Callable[..., None]) -> None:
    environment()
    assert str(launch()) == "started by this command"
    environment(**ONE)
    assert str(launch()) == "started by this command in Slurm's job 12"
    environment(**TASK, SLURM_RESTART_COUNT="2")
    assert str(launch()) == "started by Slurm in Slurm's job 12, restart 2"
    environment(**TASK, SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID="1")
    assert str(launch()) == "started by Slurm in Slurm's job 9_1"
    environment(**TORCHRUN)
    assert str(launch()) == "started by torchrun"


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"},
        {"LOCAL_RANK": "1", "NODE_RANK": "1", "RANK": "5", "WORLD_SIZE": "2", "MASTER_PORT": "29500"},
    ],
)
def test_what_else_is_accepted(environment: Callable[..., None], variables: dict[str, str]) -> None:
    environment(**variables)
    check_environment()
    if variables != {"RANK": "0", "WORLD_SIZE": "1"}:
        check_launched(Layout(world_size=2))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "says RANK=1 WORLD_SIZE=2, but neither torchrun nor Slurm has started"),
        ({"RANK": "3"}, "says RANK=3, but neither"),
        ({"WORLD_SIZE": "8"}, "says WORLD_SIZE=8, but neither"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "says RANK=0 WORLD_SIZE=1, but neither"),  # its ranks would inherit it
        ({"RANK": "one"}, "RANK=one is no number"),
        ({"LOCAL_RANK": "5", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, r"rank 5 of 2 \(LOCAL_RANK\)"),
        ({"LOCAL_RANK": "-1", "MASTER_PORT": "29500"}, r"rank -1 of 2 \(LOCAL_RANK\)"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 says .* MASTER_PORT does not say where they meet"),
        ({"LOCAL_RANK": "0", "RANK": "1", "MASTER_PORT": "1"}, "RANK=1 and LOCAL_RANK=0 contradict each other"),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "5"}, r"rank 5 of 2 \(RANK\)"),
    ],
)
def test_what_is_left_over_is_named(environment: Callable[..., None], variables: dict[str, str], message: str) -> None:
    """A process that believed it would wait for others for ever, or say and write nothing."""
    environment(**variables)
    with pytest.raises(ConfigError, match=message):
        check_launched(Layout(world_size=2))
