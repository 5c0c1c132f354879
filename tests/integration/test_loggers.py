"""Weights & Biases and MLflow get what TensorBoard gets, of a run on two ranks and of its continuation."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_kto.config.compose import parse_config
from nemo_kto.errors import ConfigError
from tests.distributed_harness import free_port
from tests.integration.assets import read_series, settings, train_on_rank

Series = dict[str, dict[int, float]]
WANDB = {
    "exp_manager__create_wandb_logger": True,
    "exp_manager__wandb_logger_kwargs": {"project": "kto", "name": "tiny", "offline": True},
}
MLFLOW = {"exp_manager__create_mlflow_logger": True}
RUN = {
    "model__data__data_prefix__validation": "validation.jsonl",
    "trainer__kto__val_check_interval": 2,
    "trainer__kto__save_interval": 2,
    "trainer__kto__max_steps": 4,
    "exp_manager__create_checkpoint_callback": True,
    "model__optim__sched__name": "Constant",
}


def logged_run(port: int, overrides: dict[str, Any], folder: str) -> None:
    """Train with `folder` as the current one, and close the run of Weights & Biases as the end of a process does."""
    os.chdir(folder)
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", WANDB_ERROR_REPORTING="false")
    train_on_rank(port, overrides)
    if overrides.get("exp_manager.create_wandb_logger"):
        import wandb

        wandb.finish()


def trained(root: Path, folder: Path, run_ranks: Callable[..., Any], **changes: Any) -> Path:
    """Train on two ranks in an empty current folder, which has to stay empty; return the log folder."""
    current, log_dir = folder / "current", folder / "log"
    current.mkdir(exist_ok=True)
    values = settings(root, log_dir, **{**RUN, **changes})
    values["model.data.data_prefix.validation"] = str(root / "validation.jsonl")
    run_ranks(logged_run, 2, free_port(), values, str(current))
    assert list(current.iterdir()) == []
    return log_dir


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: 7 bytes, then LevelDB's log format in blocks of 32 KiB.

    In a block: checksum (4 bytes), length (2), kind (1: a whole record, 2 to 4: first, middle, last part), data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, b""
    while place < len(data):
        left_in_block = 32768 - place % 32768
        if left_in_block < 7:
            place += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def wandb_series(log_dir: Path) -> tuple[Series, list[str]]:
    """Return metric -> step -> value of all offline runs, and the id of each, in order of their start."""
    series: Series = {}
    runs = []
    for file in sorted((log_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run" and record.run.run_id not in runs[-1:]:
                runs.append(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                step = items.pop("trainer/global_step")
                for name, value in items.items():
                    series.setdefault(name, {})[step] = value
    return {name: values for name, values in series.items() if not name.startswith("_")}, runs


def mlflow_series(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Series, list[Any]]:
    """Return metric -> step -> value and the runs of the experiment, read with MLflow's own client."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    client = MlflowClient((log_dir / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("megatron_gpt")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    series: Series = {}
    for run in runs:
        for name in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, name)
            if name != "epoch":  # training and validation both log it
                assert len({point.step for point in history}) == len(history), f"a step of {name} was logged twice"
            series[name] = {point.step: point.value for point in history}
    return series, runs


def assert_same(actual: Series, expected: Series) -> None:
    assert set(actual) == set(expected)
    for name, values in expected.items():
        assert actual[name] == pytest.approx(values, rel=1e-6), name  # TensorBoard keeps float32


def expected_series(log_dir: Path, *, steps: int) -> Series:
    """Return TensorBoard's numbers after checking that they are those of a run of so many steps."""
    series = read_series(log_dir)
    assert set(series["train/loss"]) == set(range(steps)) and series["train/loss"][0] == 0.5
    assert set(series["val/loss"]) == set(range(1, steps, 2))
    assert {"train/loss/chosen", "train/kl", "train/lr", "val/rewards/margins", "epoch"} <= set(series)
    return series


def test_both_get_what_tensorboard_gets_and_a_resumed_run_goes_on(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'nemo-kto[mlflow]'")
    for steps in (2, 4):
        changes = {**WANDB, **MLFLOW, "trainer__kto__max_steps": steps}
        log_dir = trained(root, tmp_path, run_ranks, **changes)
        expected = expected_series(log_dir, steps=steps)
        actual, ids = wandb_series(log_dir)
        assert_same(actual, expected)
        assert ids == [ids[0]] and len(list((log_dir / "wandb").glob("offline-run-*"))) == steps // 2

        actual, runs = mlflow_series(log_dir, monkeypatch)
        assert_same(actual, {name.replace("/loss/", "/loss_"): values for name, values in expected.items()})
        assert len(runs) == 1 and runs[0].info.status == "FINISHED" and runs[0].info.run_name == "log"


def test_a_run_needs_no_logger(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    log_dir = trained(root, tmp_path, run_ranks, exp_manager__create_tensorboard_logger=False)
    names = {path.name for path in log_dir.iterdir()}
    assert "checkpoints" in names and not names & {"wandb", "mlruns", "logger_runs.json"}
    assert not list(log_dir.glob("events.out.tfevents.*"))


def test_mlflow_settings_that_cannot_work_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'nemo-kto[mlflow]'")
    from nemo_kto.runtime.loggers import open_mlflow

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for given in ({"experiment": "x"}, {"run_id": "0" * 32}):
        with pytest.raises(ConfigError, match="exp_manager.mlflow_logger_kwargs") as caught:
            open_mlflow(given, name="n", log_dir=tmp_path, run_id=None)
        assert "\n" not in str(caught.value) and (*given, *given.values())[-1][:1] in str(caught.value)


def test_a_remembered_mlflow_run_that_is_gone_makes_room_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'nemo-kto[mlflow]'")
    from nemo_kto.runtime.loggers import open_mlflow

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    gone = "0" * 32
    new = open_mlflow({}, name="n", log_dir=tmp_path, run_id=gone).run_id
    assert new not in (None, gone)
    assert open_mlflow({}, name="n", log_dir=tmp_path, run_id=new).run_id == new


def test_mlflow_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"pip install 'nemo-kto\[mlflow\]'"):
        parse_config({"exp_manager": {"create_mlflow_logger": True}})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"mlflow_logger_kwargs": {"tracking_uri": "https://me:hunter2@mlflow.example.org"}},
        {"wandb_logger_kwargs": {"project": "p", "settings": {"api_key": "hunter2"}}},
    ],
)
def test_secrets_are_not_taken_from_the_configuration(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="holds a secret") as caught:
        parse_config({"exp_manager": kwargs})
    assert "hunter2" not in str(caught.value)
