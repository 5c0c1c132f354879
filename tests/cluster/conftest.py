"""The cluster that tests run jobs on, and the script they submit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.two_nodes import Job, TwoNodes, install, missing
from tests.integration.assets import make_model_folder, read_series, settings, write_feedback
from tests.waiting import HANG

INSTALL = "NEMO_KTO_INSTALL_SLURM"
"""Environment variable: 1 lets Debian's packages be installed."""

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "examples" / "nlp" / "kto" / "slurm"
TRAINING = SCRIPTS.with_name("train_gpt_kto.py")
QUICKSTART = SCRIPTS.with_name("quickstart")

CHANGES = {"exp_manager__create_checkpoint_callback": True, "trainer__kto__save_interval": 3}

OURS = ("pretrained_checkpoint.restore_from_path", "exp_manager.explicit_log_dir", "model.data.data_prefix.train")
"""What train.sbatch takes from variables."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[TwoNodes]:
    """Start two nodes for all tests."""
    if missing() and os.environ.get(INSTALL) == "1":
        install()
    if missing():
        pytest.skip(f"there is no {', '.join(missing())}; {INSTALL}=1 installs Debian's slurm-wlm and munge")
    folder = Path(tempfile.mkdtemp(prefix="kto-slurm-"))
    nodes = TwoNodes(folder)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(folder)


def without_gpus(script: str, folder: Path) -> Path:
    """Return a batch script of examples/, edited as it says for nodes without GPUs."""
    kept = [line for line in (SCRIPTS / script).read_text().splitlines() if not line.startswith("#SBATCH --gpus")]
    edited = folder / script
    edited.write_text("\n".join(kept) + "\n")
    return edited


def program_for(script: str, folder: Path) -> str:
    """Return a program that is called as Python would be, with a script of its own, and runs one of this folder."""
    program = folder / f"python for {Path(script).name}"
    file = REPOSITORY / "tests" / script
    program.write_text(f'#!/bin/bash\nshift\nexec "{sys.executable}" "{file}" "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def submit(cluster: TwoNodes, tmp_path: Path) -> Callable[..., Job]:
    """Submit train.sbatch: `submit(*keys, tasks=(nodes, on each), program=..., options=..., **variables)`."""

    def submit(
        *keys: str,
        tasks: tuple[int, int] = (1, 2),
        program: str = sys.executable,
        options: tuple[str, ...] = (),
        **variables: str,
    ) -> Job:
        nodes, each = tasks
        size = (f"--nodes={nodes}", f"--ntasks-per-node={each}", "--cpus-per-task=1", "--mem=100M", "--time=60")
        name = variables.pop("name", tmp_path.name)
        values: dict[str, Any] = {
            "MODEL": str(QUICKSTART / "model"),
            "TRAIN": str(QUICKSTART / "data" / "train.jsonl"),
            "LOG_DIR": str(tmp_path / "log"),
            "REPOSITORY": str(REPOSITORY),
            "PYTHON": program,
            "STUB_FOLDER": str(tmp_path),
            **variables,
        }
        script = without_gpus("train.sbatch", tmp_path)
        return cluster.submit(script, *keys, options=(*size, f"--job-name={name}", *options), **values)

    return submit


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and feedback for it."""
    folder = tmp_path_factory.mktemp("assets")
    make_model_folder(folder / "hf")
    write_feedback(folder / "train.jsonl", number=40, seed=1)
    return folder


def keys(root: Path, log_dir: Path, **changes: Any) -> list[str]:
    """Return the keys of a short run, those that the script sets left out."""
    values = settings(root, log_dir, **{**CHANGES, **changes})
    return [
        "model.tensor_model_parallel_size=1",
        *(f"{key}={json.dumps(value)}" for key, value in values.items() if key not in OURS),
    ]


def places(root: Path, log_dir: Path) -> list[str]:
    """Return those that `keys` leaves out."""
    files = {"restore_from_path": root / "hf", "explicit_log_dir": log_dir, "train": root / "train.jsonl"}
    return [f"{key}={files[key.rpartition('.')[2]]}" for key in OURS]


@pytest.fixture(scope="session")
def never_stopped(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    """Return the series of the run, on two processes that it has started itself."""
    log_dir = tmp_path_factory.mktemp("whole") / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
    command = [sys.executable, str(TRAINING), *keys(root, log_dir), *places(root, log_dir), "trainer.devices=2"]
    subprocess.run(command, check=True, timeout=HANG, env={**environment, "OMP_NUM_THREADS": "1"})
    return read_series(log_dir)
