"""Training on two nodes of a real Slurm: stopped in every way there is, it ends as if it had never been."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import TRAINING, keys, program_for
from tests.cluster.two_nodes import Job, TwoNodes
from tests.integration.assets import read_series, settings
from tests.waiting import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def start(submit: Callable[..., Job], root: Path, tmp_path: Path) -> Callable[..., Job]:
    """Submit training that waits at a moment of its first attempt, see `paused_run.py`; return once it does."""

    def start(pause: str = "", changes: dict[str, Any] | None = None, **arguments: Any) -> Job:
        files = {"MODEL": str(root / "hf"), "TRAIN": str(root / "train.jsonl")}
        job = submit(
            *keys(root, tmp_path / "log", **(changes or {})),
            **{"program": program_for("faults/paused_run.py", tmp_path), **files, **arguments},
            PAUSE=pause,
            PAUSE_FOLDER=str(tmp_path),
        )
        if pause:
            wait_until(lambda: (tmp_path / "paused").exists() or job.state() not in ("RUNNING", "PENDING"))
            assert (tmp_path / "paused").exists(), job.log()
        return job

    return start


def test_nodes_and_ranks(
    submit: Callable[..., Job], root: Path, tmp_path: Path, never_stopped: dict[str, dict[int, float]]
) -> None:
    """Two ranks on each node. The same script submitted again finds the run at its end."""
    files = {"MODEL": str(root / "hf"), "TRAIN": str(root / "train.jsonl")}
    for _ in range(2):
        job = submit(*keys(root, tmp_path / "log"), tasks=(2, 2), **files)
        job.wait_for("COMPLETED")
        log = job.log()
        assert "\r" not in log and "[NeMo" not in log and "Traceback" not in log
    assert "0: The run has taken its 10 steps already" in log
    first = next(
        path for path in job._cluster.folder.glob(f"log/{tmp_path.name}-*.txt") if "Step 10 of 10" in path.read_text()
    )
    assert "4 processes: tensor 1 x pipeline 1 x data 4, started by Slurm in Slurm's job" in first.read_text()
    series = read_series(tmp_path / "log")
    for name in ("train/loss", "train/grad_norm"):
        assert series[name] == pytest.approx(never_stopped[name], rel=1e-5), name


@pytest.mark.parametrize(("moment", "step"), [("import", None), ("step 4", 5), ("save", 4)])
def test_term(
    start: Callable[..., Job],
    tmp_path: Path,
    never_stopped: dict[str, dict[int, float]],
    moment: str,
    step: int | None,
) -> None:
    """While it starts, in a step, and while a checkpoint is written (after step 3)."""
    job = start(moment)
    job.signal(signal.SIGTERM)
    if step is not None:
        job.wait_for_line("SIGTERM received: the run stops after this step")
    (tmp_path / "go").touch()
    job.wait_for("COMPLETED")
    log = job.log()
    assert job.restarts() == 1 and "stopped early; queueing again (restart 1)" in log
    if step is None:
        assert "Stopped by SIGTERM; run the same command to continue." in log and "Resuming" not in log
    else:
        assert f"Stopped at step {step} of 10 (SIGTERM)" in log and f"Resuming from step {step} of 10" in log
        assert "started by Slurm in Slurm's job" in log and ", restart 1" in log
    assert read_series(tmp_path / "log")["train/loss"] == never_stopped["train/loss"]


def test_the_time_limit(
    start: Callable[..., Job], cluster: TwoNodes, tmp_path: Path, never_stopped: dict[str, dict[int, float]]
) -> None:
    """It is shortened once the run waits in its step: how long a busy machine takes to come there is not known."""
    job = start("step 4", options=("--signal=TERM@60",))
    cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")
    job.wait_for_line("SIGTERM received")
    cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=600")  # of what is to come
    (tmp_path / "go").touch()
    job.wait_for("COMPLETED")
    assert job.restarts() == 1 and "Stopped at step 5 of 10 (SIGTERM)" in job.log()
    assert read_series(tmp_path / "log")["train/loss"] == never_stopped["train/loss"]


def test_preemption(
    start: Callable[..., Job], cluster: TwoNodes, tmp_path: Path, never_stopped: dict[str, dict[int, float]]
) -> None:
    job = start("step 4")
    high = tmp_path / "high.sh"
    high.write_text("#!/bin/bash\ntrue\n")
    other = cluster.submit(high, options=("--partition=high", "--nodes=2", "--ntasks-per-node=4"))
    job.wait_for_line("SIGTERM received")
    (tmp_path / "go").touch()
    other.wait_for("COMPLETED")
    job.wait_for("COMPLETED")
    assert "Resuming from step 5 of 10" in job.log()
    assert read_series(tmp_path / "log")["train/loss"] == never_stopped["train/loss"]


def test_a_node_that_goes_down(
    start: Callable[..., Job], cluster: TwoNodes, tmp_path: Path, never_stopped: dict[str, dict[int, float]]
) -> None:
    """What came after the last checkpoint is done once more, on the other node."""
    job = start("step 4")
    with cluster.without(job) as node:
        job.wait_for("COMPLETED")
        assert {job.facts()["NodeList"], node} == {"n0", "n1"}
    assert "Resuming from step 3 of 10" in job.log()
    assert read_series(tmp_path / "log")["train/loss"] == never_stopped["train/loss"]


def test_a_rank_that_is_killed(
    start: Callable[..., Job], tmp_path: Path, never_stopped: dict[str, dict[int, float]]
) -> None:
    job = start("step 4", NODE_CHECK="true")
    os.kill(int((tmp_path / "paused").read_text()), signal.SIGKILL)
    job.wait_for("COMPLETED")
    assert "failed with exit code 137, retry 1 of 2; queueing again" in job.log()
    assert read_series(tmp_path / "log")["train/loss"] == never_stopped["train/loss"]


def test_two_jobs_in_one_folder(start: Callable[..., Job], tmp_path: Path) -> None:
    """Of the same name, the second would wait; of another, it is refused, and the first goes on."""
    first = start("step 4")
    second = start(name="another", MAX_RETRIES="0", FAILURE_GRACE="5", program=sys.executable)
    second.wait_for("FAILED")
    assert "error: " in second.log() and str(tmp_path / "log") in second.log()
    (tmp_path / "go").touch()
    first.wait_for("COMPLETED")


def test_one_task_starts_the_others(cluster: TwoNodes, root: Path, tmp_path: Path) -> None:
    """`sbatch --ntasks=1 --wrap "python ... trainer.devices=2"` trains with two; three tasks are refused."""
    log_dir = tmp_path / "log"
    values = settings(root, log_dir, trainer__kto__max_steps=1, trainer__devices=2, trainer__num_nodes="auto")
    batch = tmp_path / "wrapped.sh"
    words = " ".join(f"'{key}={json.dumps(value)}'" for key, value in values.items())
    batch.write_text(f"#!/bin/bash\n{sys.executable} {TRAINING} {words}\n")
    job = cluster.submit(batch, options=("--ntasks=1", "--cpus-per-task=2"))
    job.wait_for("COMPLETED")
    assert "2 processes: tensor 1 x pipeline 1 x data 2, started by this command in Slurm's job" in job.log()
    batch.write_text(f"#!/bin/bash\nsrun --ntasks=3 {sys.executable} {TRAINING} {words}\n")
    job = cluster.submit(batch, options=("--ntasks=3",))
    job.wait_for("FAILED")
    assert "error: Slurm started 3 processes, but trainer.devices x trainer.num_nodes is 2 x 1." in job.log()
