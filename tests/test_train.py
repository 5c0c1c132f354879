"""What is decided before any process is started: schedule, export folder, overrides."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_kto.config import KTOConfig, TrainerKTOConfig
from nemo_kto.errors import ConfigError
from nemo_kto.train import Schedule, _forced, _time_limit, log_directory, plan_schedule, resolve_export_folder


def plan(*, samples: int = 100, validation: bool = True, **changes: Any) -> Schedule:
    config = KTOConfig()
    config.model.global_batch_size = 10
    config.trainer.kto = TrainerKTOConfig(**changes)
    splits = {"train": SimpleNamespace(samples=range(samples))}
    if validation:
        splits["validation"] = splits["train"]
    return plan_schedule(config, SimpleNamespace(splits=splits))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "total", "per_epoch", "val_interval", "val_batches"),
    [
        ({}, 10, 10, 1, 10),  # one epoch, validation every tenth of it
        ({"samples": 109}, 10, 10, 1, 11),  # what is left over belongs to no training batch, but is validated
        ({"max_epochs": 3}, 30, 10, 1, 10),
        ({"max_epochs": 3, "max_steps": 7}, 7, 10, 1, 10),
        ({"max_epochs": -1, "max_steps": 25}, 25, 10, 1, 10),
        ({"limit_train_batches": 0.5}, 5, 5, 1, 10),  # the interval is at least one step
        ({"limit_train_batches": 4, "max_epochs": 2}, 8, 4, 1, 10),
        ({"val_check_interval": 0.5}, 10, 10, 5, 10),
        ({"val_check_interval": 3}, 10, 10, 3, 10),
        ({"val_check_interval": 25, "max_epochs": 3}, 30, 10, 25, 10),
        ({"limit_val_batches": 1}, 10, 10, 1, 1),
        ({"limit_val_batches": 0.01}, 10, 10, 1, 1),
        ({"validation": False}, 10, 10, 0, 0),
    ],
)
def test_schedule(changes: dict[str, Any], total: int, per_epoch: int, val_interval: int, val_batches: int) -> None:
    assert plan(**changes) == Schedule(
        total=total, per_epoch=per_epoch, val_interval=val_interval, val_batches=val_batches
    )


def test_something_must_end_the_run() -> None:
    with pytest.raises(ConfigError, match="max_steps or trainer.kto.max_epochs"):
        plan(max_epochs=-1, max_steps=-1)


def make_config(tmp_path: Path, folder: Path | None = None) -> KTOConfig:
    config = KTOConfig()
    config.exp_manager.explicit_log_dir = str(tmp_path / "log")
    config.export.folder = str(folder) if folder else None
    config.pretrained_checkpoint.restore_from_path = str(tmp_path / "start")
    return config


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    return folder


def test_the_log_folder(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert log_directory(config) == tmp_path / "log"
    config.exp_manager.explicit_log_dir = None
    config.exp_manager.exp_dir, config.exp_manager.name = str(tmp_path / "all"), "one"
    assert log_directory(config) == tmp_path / "all" / "one"


def test_the_export_folder_by_default_and_by_name(tmp_path: Path) -> None:
    assert resolve_export_folder(make_config(tmp_path), resumes=False) == tmp_path / "log" / "hf"
    assert resolve_export_folder(make_config(tmp_path, tmp_path / "mine"), resumes=True) == tmp_path / "mine"
    config = make_config(tmp_path)
    config.export.enabled = False
    assert resolve_export_folder(config, resumes=False) is None


def test_only_a_resumed_run_replaces_its_own_export(tmp_path: Path) -> None:
    own = fill(tmp_path / "log" / "hf")
    assert resolve_export_folder(make_config(tmp_path), resumes=True) == own
    with pytest.raises(ConfigError, match="not empty"):
        resolve_export_folder(make_config(tmp_path), resumes=False)
    foreign = fill(tmp_path / "foreign")
    with pytest.raises(ConfigError, match="not empty"):
        resolve_export_folder(make_config(tmp_path, foreign), resumes=True)


def test_the_model_training_starts_from_is_never_replaced(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.pretrained_checkpoint.restore_from_path = str(fill(tmp_path / "log" / "hf"))
    with pytest.raises(ConfigError, match="not empty"):
        resolve_export_folder(config, resumes=True)


@pytest.mark.parametrize(
    ("argument", "forced"),
    [
        ("model.seed=1", "++model.seed=1"),
        ("+model.seed=1", "++model.seed=1"),
        ("++model.micro_batch_size=2", "++model.micro_batch_size=2"),
        ("~model.optim", "~model.optim"),
        ("hydra.job.name=x", "hydra.job.name=x"),
        ("--help", "--help"),
    ],
)
def test_overrides_are_forced_past_hydra(argument: str, forced: str) -> None:
    assert _forced(argument) == forced


def test_a_time_limit_in_days_hours_minutes_and_seconds() -> None:
    assert _time_limit("01:02:03:04") == timedelta(days=1, hours=2, minutes=3, seconds=4)
    assert _time_limit(None) is None
