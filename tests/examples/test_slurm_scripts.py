"""The scripts for Slurm, as far as they can be looked at without one; the rest: tests/cluster."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[2] / "examples" / "nlp" / "kto" / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script(script: Path) -> None:
    """It is bash, takes the number of processes from who starts them, and queues itself again only when it says so."""
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert re.search(r"trainer\.devices=auto\s", text) and re.search(r"trainer\.num_nodes=auto\s", text)
    assert "scontrol requeue $SLURM_JOB_ID" not in text  # of the last task of an array, that is the whole array
    assert text.count("#SBATCH --account") == text.count("##SBATCH --account") == 1


def test_they_are_all_there() -> None:
    assert {path.name for path in SCRIPTS} == {"train.sbatch", "cache_reference.sbatch", "torchrun.sbatch"}


def test_a_container_sees_what_links_point_to(tmp_path: Path) -> None:
    """A model in a hub cache is a folder of links to files in another; srun is a stub that prints its arguments."""
    hub = tmp_path / "hub" / "models--one"
    snapshot, blobs = hub / "snapshots" / "4c2b", hub / "blobs"
    for folder in (snapshot, blobs, tmp_path / "stubs", tmp_path / "clone"):
        folder.mkdir(parents=True)
    (blobs / "93af").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/93af")
    (tmp_path / "model").symlink_to(snapshot)
    (tmp_path / "train.jsonl").touch()
    for name, text in (("srun", "printf '%s\\n' \"$@\""), ("scontrol", "echo node1")):
        (tmp_path / "stubs" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "stubs" / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path / 'stubs'}:/usr/bin:/bin",
        "SLURM_JOB_NAME": "gpt_kto",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_SUBMIT_DIR": str(tmp_path / "clone"),
        "CONTAINER": "image.sqsh",
        "MODEL": str(tmp_path / "model"),
        "TRAIN": str(tmp_path / "train.jsonl"),
        "LOG_DIR": str(tmp_path / "log"),
    }
    script = ["bash", str(SLURM / "train.sbatch")]
    done = subprocess.run(script, env=variables, cwd=tmp_path, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("--container-mounts=")]
    mounted = line.partition("=")[2].split(",")
    places = [tmp_path / "clone", tmp_path / "log", tmp_path / "model", snapshot, blobs, tmp_path]
    assert sorted(mounted) == sorted(f"{place}:{place}" for place in places)
