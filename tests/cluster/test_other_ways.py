"""Other ways to start a run: torchrun, by hand, for the reference's log-probs. And nodes that lack something."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_kto.runtime.log_lock import FOLDER as LOCK
from tests.cluster.conftest import REPOSITORY, SCRIPTS, TRAINING, keys, places, without_gpus
from tests.cluster.two_nodes import Job, TwoNodes
from tests.integration.assets import read_series
from tests.waiting import HANG, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

Series = dict[str, dict[int, float]]
AUTO = ["trainer.devices=auto", "trainer.num_nodes=auto"]


def check_series(log_dir: Path, expected: Series) -> None:
    series = read_series(log_dir)
    for name in ("train/loss", "train/grad_norm"):
        assert series[name] == pytest.approx(expected[name], rel=1e-5), name


def program_without(what: str, folder: Path, *, waits: bool = True) -> str:
    """Return a Python that is not on the second node what it is on the first: it lacks a package, or the model.

    Where it `waits` it begins there when rank 0 holds the log folder, to which it comes late on a busy machine.
    """
    wait = f"until [ -e {shlex.quote(str(folder / 'log' / LOCK))} ]; do sleep 0.1; done" if waits else ":"
    there = 'set -- "$@" pretrained_checkpoint.restore_from_path=/not/on/this/node'
    if what != "model":
        broken = folder / "broken"
        (broken / what).mkdir(parents=True)
        (broken / what / "__init__.py").write_text('raise ImportError("libcudart.so.13: cannot open")\n')
        there = f'export PYTHONPATH="{broken}:$PYTHONPATH"'
    program = folder / "python"
    program.write_text(
        f'#!/bin/bash\nif [ "$SLURM_NODEID" = 1 ]; then {wait}; {there}; fi\nexec "{sys.executable}" "$@"\n'
    )
    program.chmod(0o755)
    return str(program)


MISSING = "ImportError: libcudart.so.13: cannot open"
LACKS = {"megatron": f"failed: {MISSING}", "model": ".*/not/on/this/node"}


@pytest.mark.parametrize("what", LACKS)
def test_a_node_that_lacks_something(submit: Callable[..., Job], root: Path, tmp_path: Path, what: str) -> None:
    """Rank 0, on the other one, would wait for its ranks for ten minutes."""
    files = {"MODEL": str(root / "hf"), "TRAIN": str(root / "train.jsonl")}
    program = program_without(what, tmp_path)
    job = submit(*keys(root, tmp_path / "log"), tasks=(2, 1), program=program, MAX_RETRIES="0", **files)
    job.wait_for("FAILED")
    check_told(job.log(), what)
    assert job.facts()["ExitCode"] == "1:0"


def check_told(log: str, what: str) -> None:
    """Check that rank 0 has ended as the other one said why it could not come."""
    told = rf"^0: error: Rank 1 \(process \d+ on \S+\):? {LACKS[what]}.* The others cannot begin without it\.$"
    assert re.search(told, log, re.MULTILINE), log
    assert "did not come within" not in log and "are killed" not in log


def test_srun_alone(cluster: TwoNodes, root: Path, tmp_path: Path) -> None:
    """Nothing ends rank 0 there but what rank 1 says."""
    words = [*keys(root, tmp_path / "log"), *places(root, tmp_path / "log"), *AUTO]
    place = ("salloc", "--nodes=2", "--ntasks-per-node=1", "--mem=100M")
    srun = ("srun", "--label", "--kill-on-bad-exit=0", "--wait=0", program_without("model", tmp_path), TRAINING)
    done = subprocess.run(
        [*map(str, (*place, *srun)), *words],
        env=cluster.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 1
    check_told(done.stderr, "model")


def test_a_node_that_cannot_say_what_it_lacks(submit: Callable[..., Job], root: Path, tmp_path: Path) -> None:
    """Without torch it cannot reach the others, which srun.sh ends."""
    files = {"MODEL": str(root / "hf"), "TRAIN": str(root / "train.jsonl")}
    limits = {"FAILURE_GRACE": "5", "MAX_RETRIES": "0"}
    program = program_without("torch", tmp_path)
    job = submit(*keys(root, tmp_path / "log"), tasks=(2, 1), program=program, **files, **limits)
    job.wait_for("FAILED")
    log = job.log()
    assert job.facts()["ExitCode"] == "1:0"
    assert re.search(rf"^1: .*{MISSING}", log, re.MULTILINE), log
    cause = "task 1: Exited with exit code 1"
    assert f"error: the others have not ended within 5 s of a failure ({cause}) and are killed" in log
    assert "did not come within" not in log


def torchrun(cluster: TwoNodes, root: Path, folder: Path, **variables: str) -> Job:
    """Submit torchrun.sbatch with two ranks on each of two nodes."""
    size = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=100M", f"--job-name={folder.name}")
    script = without_gpus("torchrun.sbatch", folder)
    arguments = [*keys(root, folder / "log"), *places(root, folder / "log")]
    return cluster.submit(script, *arguments, options=size, GPUS="2", REPOSITORY=str(REPOSITORY), **variables)


def test_torchrun(cluster: TwoNodes, root: Path, tmp_path: Path, never_stopped: Series) -> None:
    job = torchrun(cluster, root, tmp_path, PYTHON=sys.executable)
    job.wait_for("COMPLETED")
    assert "4 processes: tensor 1 x pipeline 1 x data 4, started by torchrun in Slurm's job" in job.log()
    check_series(tmp_path / "log", never_stopped)


def test_torchrun_on_a_node_that_lacks_something(cluster: TwoNodes, root: Path, tmp_path: Path) -> None:
    job = torchrun(cluster, root, tmp_path, PYTHON=program_without("megatron", tmp_path, waits=False))
    job.wait_for("FAILED")
    assert re.search(rf"^1: .*{MISSING}", job.log(), re.MULTILINE), job.log()
    assert "did not come within" not in job.log()


def test_the_reference_is_cached_by_a_job_of_its_own(
    cluster: TwoNodes, submit: Callable[..., Job], root: Path, tmp_path: Path, never_stopped: Series
) -> None:
    """On one node; the run on two then looks its log-probs up."""
    size = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem=100M", "--time=60")
    cache = {"model__kto__reference__cache_dir": str(tmp_path / "cache")}
    script = without_gpus("cache_reference.sbatch", tmp_path)
    words = [*keys(root, tmp_path / "log", **cache), *places(root, tmp_path / "log")]
    job = cluster.submit(script, *words, options=size, PYTHON=sys.executable, REPOSITORY=str(REPOSITORY))
    job.wait_for("COMPLETED")
    assert f"0: Reference log-probs: {tmp_path / 'cache'}" in job.log()
    written = sorted((tmp_path / "cache").rglob("*"))
    files = {"MODEL": str(root / "hf"), "TRAIN": str(root / "train.jsonl")}
    cached = keys(root, tmp_path / "log", **cache, model__kto__reference__mode="cached")
    job = submit(*cached, tasks=(2, 1), **files)
    job.wait_for("COMPLETED")
    check_series(tmp_path / "log", never_stopped)
    assert sorted((tmp_path / "cache").rglob("*")) == written


def test_salloc_and_srun(cluster: TwoNodes, root: Path, tmp_path: Path, never_stopped: Series) -> None:
    words = [*keys(root, tmp_path / "log"), *places(root, tmp_path / "log"), *AUTO]
    place = ("--nodes=2", "--ntasks-per-node=2", "--mem=100M")
    output = cluster.call(
        *("salloc", *place, "bash", SCRIPTS / "srun.sh", "--label", sys.executable, TRAINING), *words
    )
    assert "0: 10 steps" in output and "data 4, started by Slurm in Slurm's job" in output
    check_series(tmp_path / "log", never_stopped)


class Terminal:
    """A terminal in which `srun --pty bash` runs.

    Args:
        cluster: Where.
    """

    def __init__(self, cluster: TwoNodes) -> None:
        self._end, end = pty.openpty()
        command = ["srun", "--nodes=1", "--ntasks=1", "--cpus-per-task=2", "--mem=100M", "--pty", "bash", "--norc"]
        self.process = subprocess.Popen(
            command, env=cluster.environment, stdin=end, stdout=end, stderr=end, start_new_session=True
        )
        os.close(end)
        self._shown = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._end, 65536):
                self._shown += part
        except OSError:  # that is how a terminal ends
            return

    def shown(self) -> str:
        """Return all that it has shown."""
        return self._shown.decode(errors="replace")

    def type(self, text: str) -> None:
        """Type something."""
        os.write(self._end, text.encode())

    def exit(self) -> None:
        """Leave the shell."""
        self.type("exit\n")
        assert self.process.wait(HANG) == 0, self.shown()
        self._reader.join(HANG)
        os.close(self._end)


def test_a_shell_on_a_node(cluster: TwoNodes, root: Path, tmp_path: Path, never_stopped: Series) -> None:
    """The command starts its ranks itself there; Ctrl-C stops it with a checkpoint, and typed again it goes on."""
    words = [*keys(root, tmp_path / "log"), *places(root, tmp_path / "log"), "trainer.devices=2"]
    paused = REPOSITORY / "tests" / "faults" / "paused_run.py"
    file = tmp_path / "command"
    command = shlex.join([sys.executable, str(paused), *words])
    file.write_text(f"export PAUSE='step 4' PAUSE_FOLDER={shlex.quote(str(tmp_path))}\n{command}\necho ended: $?\n")
    terminal = Terminal(cluster)
    terminal.type(f"source {shlex.quote(str(file))}\n")
    wait_until(lambda: (tmp_path / "paused").exists() or terminal.process.poll() is not None)
    terminal.type("\x03")
    wait_until(lambda: "Ctrl-C received" in terminal.shown())
    (tmp_path / "go").touch()
    wait_until(lambda: "ended: 75" in terminal.shown())
    terminal.type(f"source {shlex.quote(str(file))}\n")
    wait_until(lambda: "ended: 0" in terminal.shown())
    terminal.exit()
    shown = terminal.shown()
    assert "data 2, started by this command in Slurm's job" in shown
    assert "Stopped at step 5 of 10 (Ctrl-C)" in shown and "Resuming from step 5 of 10" in shown
    assert read_series(tmp_path / "log")["train/loss"] == never_stopped["train/loss"]
