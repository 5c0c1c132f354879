"""The scripts for Slurm, as far as they can be looked at without one; the rest: tests/cluster."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.waiting import HANG

REPOSITORY = Path(__file__).resolve().parents[2]
SLURM = REPOSITORY / "examples" / "nlp" / "kto" / "slurm"
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


def run_with_stub(folder: Path, stub: str, *, grace: float = HANG) -> subprocess.CompletedProcess[str]:
    """Run srun.sh with what stands for Slurm's srun: bash, after a line that names its arguments."""
    program = folder / "srun"
    program.write_text(f'#!/bin/bash\necho "0: called with $*"\n{stub}\n')
    program.chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "FAILURE_GRACE": str(grace)}
    return subprocess.run(
        ["bash", SLURM / "srun.sh", "--label", "python", "a b"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )


@pytest.mark.parametrize(
    ("line", "code"),
    [("n1: task 3: Exited with exit code 1", 1), ("n[0-1]: tasks 0-2,5: Killed", 137)],
)
def test_those_that_wait_for_a_failed_rank_are_ended(tmp_path: Path, line: str, code: int) -> None:
    """Nothing else would end this stub: its ranks wait."""
    done = run_with_stub(tmp_path, f"echo 'srun: error: {line}' >&2\nexec sleep infinity", grace=0)
    assert done.stdout == "0: called with --kill-on-bad-exit=0 --wait=0 --label python a b\n"
    who = line.partition(": ")[2]
    assert done.stderr.splitlines() == [
        f"srun: error: {line}",
        f"error: the others have not ended within 0 s of a failure ({who}) and are killed",
    ]
    assert done.returncode == code


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("", 0),
        ("srun: error: n0: task 1: Exited with exit code 75", 75),  # the others are about to end so too
        ("srun: error: n0: task 1: Exited with exit code 1", 1),
        ("srun: error: n0: task 1: Killed", 137),  # and the others with 1
        ("1: srun: error: n0: task 1: Killed", 0),  # what a rank prints
    ],
)
def test_those_that_end_by_themselves_are_left_alone(tmp_path: Path, said: str, code: int) -> None:
    """Whatever srun ends with is kept, and nothing stays that would wait for more."""
    done = run_with_stub(tmp_path, f"printf '%s' '{said}' >&2\nexit {code}")
    assert (done.returncode, done.stderr.rstrip("\n")) == (code, said)


def test_a_stop_has_all_the_time_it_needs(tmp_path: Path) -> None:
    """Rank 0 may still end its loggers when the others have left."""
    line = "srun: error: n0: task 1: Exited with exit code 75"
    done = run_with_stub(tmp_path, f"echo '{line}' >&2\nsleep 0.5\necho 0: done\nexit 75", grace=0)
    assert done.returncode == 75 and done.stdout.endswith("0: done\n") and done.stderr == f"{line}\n"


def test_a_container_sees_what_links_point_to(tmp_path: Path) -> None:
    """A model in a hub cache is a folder of links to files in another; srun is a stub that prints its arguments."""
    hub = tmp_path / "hub" / "models--one"
    snapshot, blobs = hub / "snapshots" / "4c2b", hub / "blobs"
    for folder in (snapshot, blobs, tmp_path / "stubs"):
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
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "CONTAINER": "image.sqsh",
        "MODEL": str(tmp_path / "model"),
        "TRAIN": str(tmp_path / "train.jsonl"),
        "LOG_DIR": str(tmp_path / "log"),
    }
    script = ["bash", str(SLURM / "train.sbatch")]
    done = subprocess.run(script, env=variables, cwd=tmp_path, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("--container-mounts=")]
    mounted = line.partition("=")[2].split(",")
    places = [REPOSITORY, tmp_path / "log", tmp_path / "model", snapshot, blobs, tmp_path]
    assert sorted(mounted) == sorted(f"{place}:{place}" for place in places)
