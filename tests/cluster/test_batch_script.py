"""train.sbatch on two nodes of a real Slurm: what it makes of how a command ends. A stub stands for the command."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_kto.config.compose import load_config
from tests.cluster.conftest import QUICKSTART, program_for
from tests.cluster.two_nodes import Job, TwoNodes
from tests.waiting import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

Submit = Callable[..., Job]
TRAIN, VALIDATION = (QUICKSTART / "data" / f"{name}.jsonl" for name in ("train", "validation"))


@pytest.fixture
def stub(submit: Submit, tmp_path: Path) -> Submit:
    """Submit train.sbatch with a stub that does in each attempt what a line of the plan says."""

    def run(*plan: str, keys: tuple[str, ...] = (), **arguments: object) -> Job:
        (tmp_path / "plan").write_text("\n".join(plan))
        return submit(*keys, program=program_for("cluster/stub_python.py", tmp_path), **arguments)

    return run


def keys_of(folder: Path, *, task: int = 0, attempt: int = 0) -> list[str]:
    """Return the keys that the command was called with in an attempt, once it was."""
    file = folder / f"keys-{task}-{attempt}"
    wait_until(file.exists)
    return file.read_text().split("\n")


def test_values_need_no_quotes_but_the_shells(stub: Submit, tmp_path: Path) -> None:
    odd = tmp_path / "a=b, (c) #d 'e' ${f} [g]"
    odd.mkdir()
    (odd / "hf, too").symlink_to(QUICKSTART / "model")
    (odd / "{train}.jsonl").symlink_to(TRAIN)
    job = stub(
        "exit 0",
        LOG_DIR=str(odd / "log, dir"),
        MODEL=str(odd / "hf, too"),
        TRAIN=str(odd / "{train}.jsonl"),
        VALIDATION=str(VALIDATION),
        keys=("trainer.accelerator=cpu", "exp_manager.name=a b"),
    )
    job.wait_for("COMPLETED")
    config = load_config(keys_of(tmp_path))
    assert config.exp_manager.explicit_log_dir == str(odd / "log, dir")
    assert config.pretrained_checkpoint.restore_from_path == str(odd / "hf, too")
    assert config.model.data.data_prefix.train == [str(odd / "{train}.jsonl")]
    assert config.model.data.data_prefix.validation == [str(VALIDATION)]
    assert (config.trainer.devices, config.trainer.num_nodes, config.exp_manager.name) == ("auto", "auto", "a b")


def test_lists_and_names_on_the_hub_are_passed_on(stub: Submit, tmp_path: Path) -> None:
    files = [str(TRAIN), str(VALIDATION)]
    stub("exit 0", TRAIN=f"[{','.join(files)}]").wait_for("COMPLETED")
    data = load_config(keys_of(tmp_path)).model.data.data_prefix
    assert data.train == files and data.validation is None


def test_the_default_folder_has_no_job_in_its_name(stub: Submit, cluster: TwoNodes, tmp_path: Path) -> None:
    """So that the same script, submitted again, goes on."""
    for _ in range(2):
        stub("exit 0", LOG_DIR="", name="my_run").wait_for("COMPLETED")
        config = load_config(keys_of(tmp_path))
        assert config.exp_manager.explicit_log_dir == str(cluster.folder / "results" / "my_run")


@pytest.mark.parametrize("tasks", [(1, 1), (2, 2)])
def test_who_stops_early_is_queued_again(stub: Submit, tasks: tuple[int, int]) -> None:
    job = stub("exit 75", "exit 0", tasks=tasks)
    job.wait_for("COMPLETED")
    assert job.restarts() == 1
    assert "stopped early; queueing again (restart 1)" in job.log()


def test_term_is_answered_by_every_task(stub: Submit) -> None:
    job = stub("wait", "exit 0", tasks=(2, 2))
    wait_until(lambda: job.log().count("attempt 0") == 4)
    job.signal(signal.SIGTERM)
    job.wait_for("COMPLETED")
    assert job.restarts() == 1 and "Terminated" not in job.log()


def test_term_before_the_first_line_is_held_back(stub: Submit, tmp_path: Path) -> None:
    """The interpreter may take seconds to come to it, and would be ended."""
    slow = tmp_path / "slow_python"
    program = program_for("cluster/stub_python.py", tmp_path)
    wait = 'touch "$STUB_FOLDER/up-$SLURM_PROCID"\nread < "$STUB_FOLDER/go"'
    slow.write_text(f'#!/bin/bash\n{wait}\nexec "{program}" "$@"\n')
    slow.chmod(0o755)
    os.mkfifo(tmp_path / "go")
    job = stub("wait", "exit 0", tasks=(1, 1), PYTHON=str(slow))
    wait_until((tmp_path / "up-0").exists)
    job.signal(signal.SIGTERM)
    with (tmp_path / "go").open("w") as stream:
        stream.write("\n")
    wait_until(lambda: job.restarts() == 1)
    with (tmp_path / "go").open("w") as stream:
        stream.write("\n")
    job.wait_for("COMPLETED")


def test_there_is_a_limit_of_restarts(stub: Submit) -> None:
    job = stub("exit 75", "exit 75", "exit 0", MAX_RESTARTS="1")
    job.wait_for("FAILED")
    assert job.restarts() == 1 and "error: not finished after 1 restarts (MAX_RESTARTS)" in job.log()


@pytest.mark.parametrize(("plan", "code"), [("exit 1", 1), ("kill 9", 137)])
def test_a_failure_is_tried_again_so_often(stub: Submit, tmp_path: Path, plan: str, code: int) -> None:
    job = stub(plan, plan, "exit 0", MAX_RETRIES="1", NODE_CHECK="true")
    job.wait_for("FAILED")
    log = job.log()
    assert job.restarts() == 1 and job.facts()["ExitCode"] == f"{code}:0"
    assert log.count(f"failed with exit code {code}, retry 1 of 1; queueing again") == 1
    assert f"error: failed with exit code {code}, not tried again (MAX_RETRIES=1)" in log
    assert not list((tmp_path / "log").glob("failures*"))


def test_a_checkpoint_in_between_begins_the_count_anew(stub: Submit, tmp_path: Path) -> None:
    checkpoints = tmp_path / "log" / "checkpoints"
    checkpoints.mkdir(parents=True)
    program = program_for("cluster/stub_python.py", tmp_path)
    saving = tmp_path / "saving_python"
    saving.write_text(f'#!/bin/bash\nmkdir -p "{checkpoints}/$SLURM_RESTART_COUNT"\nexec "{program}" "$@"\n')
    saving.chmod(0o755)
    job = stub("exit 1", "exit 1", "exit 1", "exit 0", MAX_RETRIES="1", NODE_CHECK="true", PYTHON=str(saving))
    job.wait_for("COMPLETED")
    assert job.restarts() == 3 and job.log().count("retry 1 of 1") == 3


def test_a_bad_node_is_left_out(stub: Submit) -> None:
    job = stub("exit 1", "exit 0", NODE_CHECK="false")
    job.wait_for("COMPLETED")
    first, second = re.findall(r"attempt \d of task 0 on (n\d): exit \d", job.log())[::2]  # of two tasks each
    assert {first, second} == {"n0", "n1"} and job.facts()["ExcNodeList"] == first
    assert f"{first} did not pass NODE_CHECK and is left out" in job.log()


def test_a_task_of_an_array_is_queued_again_without_its_siblings(stub: Submit, tmp_path: Path) -> None:
    """Also the last one, whose job id is the array's. Each task has keys and a folder of its own."""
    (tmp_path / "keys").write_text("model.optim.lr=1e-6 exp_manager.name='a b'\nmodel.optim.lr=2e-6\n")
    job = stub("wait", "exit 0", tasks=(1, 1), options=("--array=0-1",), ARRAY_KEYS=str(tmp_path / "keys"), LOG_DIR="")
    tasks = [Job(job._cluster, f"{job.number}_{number}") for number in range(2)]
    found = [load_config(keys_of(tmp_path, task=number)) for number in range(2)]
    assert [config.model.optim.lr for config in found] == [1e-6, 2e-6]
    assert found[0].exp_manager.name == "a b"
    assert [Path(str(config.exp_manager.explicit_log_dir)).name for config in found] == [
        f"{tmp_path.name}-0",
        f"{tmp_path.name}-1",
    ]
    tasks[1].signal(signal.SIGTERM)
    tasks[1].wait_for("COMPLETED")
    assert tasks[1].restarts() == 1
    assert tasks[0].state() == "RUNNING" and tasks[0].restarts() == 0
    tasks[0].signal(signal.SIGTERM)
    tasks[0].wait_for("COMPLETED")


def test_the_same_script_twice_waits(stub: Submit) -> None:
    first, second = stub("wait", "exit 0"), stub("wait", "exit 0")
    wait_until(lambda: "attempt 0" in first.log())  # a signal to a job without ranks is lost
    wait_until(lambda: second.facts()["Reason"] == "Dependency")
    first.signal(signal.SIGTERM)
    first.wait_for("COMPLETED")
    wait_until(lambda: "attempt 0" in second.log())
    second.signal(signal.SIGTERM)
    second.wait_for("COMPLETED")


def test_a_job_of_a_higher_partition_takes_its_place(stub: Submit, cluster: TwoNodes, tmp_path: Path) -> None:
    job = stub("wait", "exit 0", tasks=(2, 4))
    wait_until(lambda: job.log().count("attempt 0") == 8)
    high = tmp_path / "high.sh"
    high.write_text("#!/bin/bash\ntrue\n")
    other = cluster.submit(high, options=("--partition=high", "--nodes=2", "--ntasks-per-node=4"))
    other.wait_for("COMPLETED")
    job.wait_for("COMPLETED")
    assert job.restarts() >= 1 and "stopped early" in job.log()


def test_a_node_that_goes_down(stub: Submit, cluster: TwoNodes) -> None:
    job = stub("wait", "exit 0", tasks=(1, 2), options=("--nodelist=n0",))
    wait_until(lambda: job.log().count("attempt 0") == 2)
    cluster.call("scontrol", "update", f"JobId={job.number}", "ReqNodeList=")
    cluster.call("scontrol", "update", "NodeName=n0", "State=DOWN", "Reason=test")
    try:
        job.wait_for("COMPLETED")
    finally:
        cluster.call("scontrol", "update", "NodeName=n0", "State=RESUME")
    assert job.restarts() == 1 and "on n1: exit 0" in job.log()


def test_the_plan_of_a_job_can_be_read(stub: Submit, tmp_path: Path) -> None:
    """What a user puts on sbatch's command line reaches the command."""
    keys = ("model.optim.lr=3e-6", f"exp_manager.wandb_logger_kwargs={json.dumps({'project': 'p', 'name': 'n'})}")
    stub("exit 0", keys=keys).wait_for("COMPLETED")
    config = load_config(keys_of(tmp_path))
    assert config.model.optim.lr == 3e-6 and config.exp_manager.wandb_logger_kwargs == {"project": "p", "name": "n"}
