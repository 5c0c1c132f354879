"""Several runs from one command, each in a job of its own: Hydra's launcher for submitit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import CHANGES, SCRIPTS, TRAINING
from tests.cluster.two_nodes import TwoNodes
from tests.integration.assets import make_model_folder, read_series, settings, write_feedback
from tests.waiting import HANG

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

LAUNCHER = ["gpus_per_node=null", "tasks_per_node=2", "cpus_per_task=1", "partition=low", "additional_parameters={}"]


def test_the_example(cluster: TwoNodes, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="nemo-kto[submitit] is not installed")
    make_model_folder(tmp_path / "hf")
    write_feedback(tmp_path / "train.jsonl", number=40, seed=1)
    values = settings(tmp_path, tmp_path / "sweep", trainer__kto__max_steps=2, **CHANGES)
    keys = [f"{key}={json.dumps(value)}" for key, value in values.items() if key != "model.optim.lr"]
    command = [sys.executable, str(TRAINING), "-m"]
    command += [f"--config-dir={SCRIPTS}", "--config-name=sweep", "hydra.sweeper.params=null"]
    command += [*(f"hydra.launcher.{setting}" for setting in LAUNCHER), *keys, "model.optim.lr=1e-3,2e-3"]
    for _ in range(2):  # the second time there is nothing left to do
        done = subprocess.run(
            command, env=cluster.environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=HANG
        )
        assert done.returncode == 0, done.stdout + done.stderr
    for rate in ("0.001", "0.002"):
        series = read_series(tmp_path / "sweep" / f"lr={rate}")
        assert set(series["train/loss"]) == {0, 1}
    logs = [file.read_text() for file in (tmp_path / "sweep" / ".submitit").rglob("*_0_log.out")]
    assert sum("data 2, started by Slurm in Slurm's job" in log for log in logs) == 2
    assert sum("The run has taken its 2 steps already" in log for log in logs) == 2
    errors = [file.read_text() for file in (tmp_path / "sweep" / ".submitit").rglob("*_log.err")]
    assert not any("Megatron-FSDP" in log or "OneLogger" in log for log in logs) and not any(errors)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "train.jsonl", "sweep"}
