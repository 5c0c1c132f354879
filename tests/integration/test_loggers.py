"""Weights & Biases and MLflow get what TensorBoard gets, of a run on two ranks and of its continuation.

Each gets what a step has produced, and nothing that an earlier one had.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from nemo_kto.config.compose import parse_config
from nemo_kto.errors import ConfigError
from tests.distributed_harness import free_port
from tests.integration.assets import read_series, settings, train_on_rank, write_feedback

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
    values["model.data.data_prefix.validation"] = str(root / values["model.data.data_prefix.validation"])
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


UP, DOWN, BOTH = [True] * 4, [False] * 4, [True, False, False, True]
ONE_CLASS = {
    "model__global_batch_size": 4,
    "model__data__shuffle": False,
    "trainer__kto__max_steps": 6,
    "trainer__kto__val_check_interval": 3,
}
HAD = {"chosen": {0, 1, 3, 5}, "rejected": {0, 2, 3, 4}, "margins": {0, 3}}
"""What is counted -> the steps whose batches have it, of those in `some_classes`."""


@pytest.fixture
def some_classes(tmp_path: Path) -> dict[str, Any]:
    """Return settings of six steps whose batches have both classes, thumbs up only, or down; validation has ups."""
    labels = [label for batch in (BOTH, UP, DOWN, BOTH, DOWN, UP) for label in batch]
    train = write_feedback(tmp_path / "train.jsonl", number=24, seed=1, labels=labels)
    validation = write_feedback(tmp_path / "validation.jsonl", number=5, seed=2, labels=[True])
    return {
        **ONE_CLASS,
        "model__data__data_prefix__train": str(train),
        "model__data__data_prefix__validation": str(validation),
    }


def assert_steps(series: Series, steps: set[int], validations: set[int]) -> None:
    """Compare the steps of everything that is logged with what the batches had."""
    assert not [name for name in series if name.startswith("val/") and name.split("/")[-1] in ("rejected", "margins")]
    for name, values in series.items():
        stage, _, rest = name.partition("/")
        expected = HAD.get(rest.split("/")[-1], set(range(6))) & steps
        if name == "epoch":
            expected = steps | validations
        assert set(values) == (validations if stage == "val" else expected), name
    assert {"train/loss/rejected", "train/logps/chosen", "train/rewards/margins", "val/loss/chosen"} <= set(series)


def test_both_get_what_tensorboard_gets_and_a_resumed_run_goes_on(
    root: Path,
    tmp_path: Path,
    run_ranks: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    some_classes: dict[str, Any],
) -> None:
    """Three steps on two ranks, and three more; then the page, the card and the checkpoints."""
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'nemo-kto[mlflow]'")
    for steps in (3, 6):
        changes = {**some_classes, **WANDB, **MLFLOW, "trainer__kto__max_steps": steps}
        if steps == 6:
            changes |= {"export__enabled": True, "report__enabled": True}
        log_dir = trained(root, tmp_path, run_ranks, **changes)
        expected = read_series(log_dir)
        assert_steps(expected, set(range(steps)), set(range(2, steps, 3)))
        assert expected["train/loss"][0] == 0.5
        actual, ids = wandb_series(log_dir)
        assert_same(actual, expected)
        assert ids == [ids[0]] and len(list((log_dir / "wandb").glob("offline-run-*"))) == steps // 3

        actual, runs = mlflow_series(log_dir, monkeypatch)
        assert_same(actual, {name.replace("/loss/", "/loss_"): values for name, values in expected.items()})
        assert len(runs) == 1 and runs[0].info.status == "FINISHED" and runs[0].info.run_name == "log"
    compare_what_is_read_of_a_run(log_dir, expected)


def compare_what_is_read_of_a_run(log_dir: Path, series: Series) -> None:
    """Compare card, page and checkpoints of a run whose last batch and validation have thumbs up only."""
    card = (log_dir / "hf" / "README.md").read_text(encoding="utf-8")
    assert "`train/loss`" in card and "`train/rewards/accuracies`" in card and "`val/rewards/chosen`" in card
    assert "rewards/rejected" not in card and "rewards/margins" not in card
    page = (log_dir / "report" / "report.html").read_text(encoding="utf-8")
    row = re.search(r'<th scope="row">Rewards, undesirable</th>(.*?)</tr>', page, re.DOTALL)
    assert row is not None
    last, mean, validation = re.findall(r"<td[^>]*>(.*?)</td>", row[1])
    assert (last, validation) == ("–", "–")
    values = series["train/rewards/rejected"].values()
    assert float(mean) == pytest.approx(sum(values) / len(values), rel=1e-3)
    # named, and chosen, by what the last validation found
    names = {path.name for path in (log_dir / "checkpoints").iterdir() if "val_loss" in path.name}
    assert names == {f"megatron_gpt-step={step}-val_loss={series['val/loss'][step - 1]:.4f}" for step in (3, 6)}


class Watcher(Callback):
    """Logs values of its own, and keeps what is there to be shown and to be chosen by after each step."""

    def __init__(self) -> None:
        self.bar: list[set[str]] = []
        self.logged: list[set[str]] = []
        self.latest: list[set[str]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 3 == 0:
            self.log("own/rare", float(batch_idx), on_step=True, on_epoch=False)
        self.log("own/both", float(batch_idx), on_step=True, on_epoch=True, batch_size=1)
        self.bar.append(set(trainer.progress_bar_metrics))
        self.logged.append(set(trainer.logged_metrics))
        self.latest.append(set(trainer.callback_metrics))


def watched_run(port: int, overrides: dict[str, Any]) -> tuple[list[set[str]], list[set[str]], list[set[str]]]:
    watcher = Watcher()
    train_on_rank(port, overrides, callbacks=[watcher])
    return watcher.bar, watcher.logged, watcher.latest


def test_every_second_step_is_logged_with_its_own_metrics(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], some_classes: dict[str, Any]
) -> None:
    values = settings(root, tmp_path / "log", **some_classes, trainer__log_every_n_steps=2)
    ((bar, logged, latest),) = run_ranks(watched_run, 1, free_port(), values)
    series = read_series(tmp_path / "log")
    own = {name: series.pop(name) for name in list(series) if name.startswith("own/")}
    assert_steps(series, {1, 3, 5}, {2, 5})
    # 0 and 3, of which one is logged; a mean over the epoch is of all its steps
    assert own["own/rare"] == {3: 3.0} and own["own/both_step"] == {1: 1.0, 3: 3.0, 5: 5.0}
    assert list(own["own/both_epoch"].values()) == [2.5]

    assert [step for step, names in enumerate(bar) if "margins" in names] == [0, 3]
    assert all({"loss", "kl"} <= names for names in bar)
    assert [step for step, names in enumerate(logged) if "train/logps/rejected" in names] == [0, 2, 3, 4]
    assert not any("val/loss" in names for names in logged)
    # whoever stops early by a metric, or keeps checkpoints by it, finds the latest value
    assert all({"train/rewards/margins", "loss"} <= names for names in latest)
    assert [step for step, names in enumerate(latest) if "val_loss" in names] == [3, 4, 5]


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
