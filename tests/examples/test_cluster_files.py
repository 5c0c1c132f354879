"""The files for Kubernetes and SkyPilot, which were not run: their fields are the published ones, their keys are ours.

The published fields are those of Kubeflow Trainer 2.3 (manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml,
pkg/apis/trainer/v1alpha1/trainjob_types.go) and of SkyPilot (sky/utils/schemas.py), as far as the files use them.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_kto.config.compose import load_config
from nemo_kto.config.folders import log_directory

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "nlp" / "kto"
IMAGE_FOLDER = "/opt/nemo_kto/"  # where the Dockerfile puts the clone
SCRIPT = f"{IMAGE_FOLDER}examples/nlp/kto/train_gpt_kto.py"

ENVIRONMENT = {"name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str, "optional": bool}}}
POD = {
    "terminationGracePeriodSeconds": int,
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}, "emptyDir": {"medium": str}}],
    "containers": [{"name": str, "volumeMounts": [{"name": str, "mountPath": str}]}],
}
JOB = {"template": {"spec": {"template": {"spec": POD}}}}
TRAIN_JOB: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "runtimeRef": {"apiGroup": str, "kind": str, "name": str},
        "trainer": {
            "image": str,
            "command": [str],
            "args": [str],
            "env": [ENVIRONMENT],
            "numNodes": int,
            "numProcPerNode": int,
            "resourcesPerNode": {"requests": {"cpu": str, "memory": str}, "limits": {"nvidia.com/gpu": int}},
        },
        "runtimePatches": [
            {"manager": str, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [{"name": str, **JOB}]}}}}
        ],
    },
}
SKY_TASK: dict[str, Any] = {
    "name": str,
    "num_nodes": int,
    "resources": {
        "infra": str,
        "accelerators": str,
        "image_id": str,
        "job_recovery": {"strategy": str, "max_restarts_on_errors": int},
    },
    "volumes": {"/shared": str},
    "envs": {"MODEL": str, "TRAIN": str, "LOG_DIR": str, "HF_HOME": str, "CUDA_DEVICE_MAX_CONNECTIONS": str},
    "secrets": {"HF_TOKEN": (str, type(None))},
    "run": str,
}


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((EXAMPLES / name / "train.yaml").read_text())
    return content


def check(value: Any, published: Any, place: str = "") -> None:
    """Compare a part of a file with the published fields and their types."""
    if isinstance(published, dict):
        assert isinstance(value, dict), place
        for key, part in value.items():
            assert key in published, f"{place}.{key} is not published"
            check(part, published[key], f"{place}.{key}")
    elif isinstance(published, list):
        assert isinstance(value, list) and value, place
        for number, part in enumerate(value):
            check(part, published[0], f"{place}[{number}]")
    else:
        assert isinstance(value, published) and not (published is int and isinstance(value, bool)), place


@pytest.mark.parametrize(("name", "published"), [("kubernetes", TRAIN_JOB), ("skypilot", SKY_TASK)])
def test_fields_are_the_published_ones(name: str, published: dict[str, Any]) -> None:
    check(read(name), published, name)


def keys_of(command: list[str]) -> list[str]:
    """Return the keys of a command that starts the script by torchrun, in the image."""
    assert command[:3] == ["/opt/venv/bin/python", "-m", "torch.distributed.run"]
    assert SCRIPT in command and (ROOT / SCRIPT.removeprefix(IMAGE_FOLDER)).is_file()
    return command[command.index(SCRIPT) + 1 :]


def check_keys(keys: list[str], shared: Path) -> None:
    """Compose the keys as the command does, with a folder in the place of /shared."""
    (shared / "models" / "model").mkdir(parents=True)
    config = load_config([key.replace("=/shared/", f"={shared}/") for key in keys])
    assert config.trainer.accelerator == "gpu"
    assert (config.trainer.devices, config.trainer.num_nodes) == ("auto", "auto")
    assert config.pretrained_checkpoint.restore_from_path == str(shared / "models" / "model")
    assert config.model.data.data_prefix.train == [str(shared / "data" / "train.jsonl")]
    assert log_directory(config) == shared / "results" / "gpt-kto"
    assert config.model.tensor_model_parallel_size == 8


def test_the_train_job(tmp_path: Path) -> None:
    job = read("kubernetes")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])  # a rule of the published schema
    trainer = job["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    names = [variable["name"] for variable in trainer["env"]]
    assert len(set(names)) == len(names) and not [name for name in names if name.startswith("PET_")]  # reserved
    for variable in trainer["env"]:
        assert ("value" in variable) != ("valueFrom" in variable)
        assert "value" in variable or variable["name"] in ("HF_TOKEN", "WANDB_API_KEY")
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert node["name"] == container["name"] == "node"  # as the runtime torch-distributed has them
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"shared": "/shared", "shm": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
    check_keys(keys_of([*trainer["command"], *trainer["args"]]), tmp_path)


def test_the_task_of_skypilot(tmp_path: Path) -> None:
    """Its script is run, with an echo in the place of Python."""
    task = read("skypilot")
    assert task["resources"]["image_id"].startswith("docker:")
    assert task["secrets"] == {"HF_TOKEN": None}  # of whoever launches it
    printing = tmp_path / "python"
    printing.write_text("#!/bin/bash\nprintf '%q ' \"$@\"\n")
    printing.chmod(0o755)
    told = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    variables = {**task["envs"], **told, "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "PATH": "/usr/bin:/bin"}
    bash = shutil.which("bash")
    assert bash is not None
    script = task["run"].replace("/opt/venv/bin/python", str(printing))
    done = subprocess.run([bash, "-ec", script], env=variables, capture_output=True, text=True, check=True)
    command = ["/opt/venv/bin/python", *shlex.split(done.stdout)]
    options = command[3 : command.index(SCRIPT)]
    named = dict(zip(options[::2], options[1::2], strict=True))
    assert named == {
        "--nnodes": "2",
        "--node-rank": "1",
        "--nproc-per-node": "8",
        "--master-addr": "10.0.0.4",
        "--master-port": "29500",
    }
    check_keys(keys_of(command), tmp_path)


def test_the_published_fields_catch_what_is_not_there() -> None:
    job = read("kubernetes")
    job["spec"]["trainer"]["numNode"] = job["spec"]["trainer"].pop("numNodes")
    with pytest.raises(AssertionError, match="numNode is not published"):
        check(job, TRAIN_JOB)
    task = read("skypilot")
    task["num_nodes"] = "2"
    with pytest.raises(AssertionError, match="num_nodes"):
        check(task, SKY_TASK)
