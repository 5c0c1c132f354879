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
