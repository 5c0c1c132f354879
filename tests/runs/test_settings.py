"""What a configuration means before any process is started: schedule and folders."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from nemo_kto.config.folders import export_folder, log_directory
from nemo_kto.config.schema import KTOConfig, SchedConfig, TrainerKTOConfig
from nemo_kto.errors import ConfigError
from nemo_kto.network.projections import LoRASettings
from nemo_kto.runs import reference
from nemo_kto.runs.layout import layout_of
from nemo_kto.runs.model import hf_config_of
from nemo_kto.runs.schedule import Schedule, plan_schedule, warn_about_rates


def plan(*, samples: int = 100, validation: bool = True, **changes: Any) -> Schedule:
    config = KTOConfig()
    config.model.global_batch_size = 10
    config.trainer.kto = TrainerKTOConfig(**changes)
    splits = {"train": range(samples)}
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


@pytest.mark.parametrize(
    ("monitor", "labels", "refused"),
    [
        ("val_rewards_margins", [True] * 30, True),
        ("val_rewards_margins", [False] * 30, True),
        ("val_rewards_margins", [True] * 20 + [False] * 10, True),  # 20 of them are validated
        ("val_rewards_margins", [True] * 19 + [False] * 11, False),
        ("val_loss", [True] * 30, False),
    ],
)
def test_checkpoints_are_chosen_by_what_a_validation_has(monitor: str, labels: list[bool], refused: bool) -> None:
    config = KTOConfig()
    config.model.global_batch_size = 10
    config.trainer.kto.limit_val_batches = 2
    config.exp_manager.checkpoint_callback_params.monitor = monitor
    data = SimpleNamespace(
        splits={"train": labels, "validation": labels}, validated=lambda batches: np.array(labels[: batches * 10])
    )
    message = "monitor=val_rewards_margins .* all 20 samples .* thumbs (up|down). Use val_loss"
    with pytest.raises(ConfigError, match=message) if refused else nullcontext():
        plan_schedule(config, data)  # type: ignore[arg-type]
    config.exp_manager.checkpoint_callback_params.save_top_k = 0
    plan_schedule(config, data)  # type: ignore[arg-type]


def test_something_must_end_the_run() -> None:
    with pytest.raises(ConfigError, match="max_steps or trainer.kto.max_epochs"):
        plan(max_epochs=-1, max_steps=-1)


def test_balancing_loads_needs_experts() -> None:
    config = KTOConfig()
    config.model.moe_aux_loss_coeff = 0.1
    dense = LlamaConfig(num_hidden_layers=2, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    with pytest.raises(ConfigError, match="model.moe_aux_loss_coeff=0.1 needs a mixture of experts"):
        layout_of(config, dense, "cpu")
    config.model.tensor_model_parallel_size = config.trainer.devices = 2
    with pytest.raises(ConfigError, match="model.sequence_parallel=true"):
        layout_of(config, MixtralConfig(), "cpu")


@pytest.mark.parametrize(
    ("accelerator", "adapters", "model", "adapter", "mode"),
    [
        ("gpu", False, None, None, "cpu_swap"),
        ("cpu", False, None, None, "resident"),
        ("gpu", True, None, None, "adapter_off"),
        ("cpu", True, None, None, "adapter_off"),
        ("gpu", True, Path("model"), None, "cpu_swap"),
        ("cpu", True, Path("model"), None, "resident"),
        ("gpu", True, None, Path("adapter"), "resident"),
    ],
)
def test_how_the_reference_is_held_by_default(
    accelerator: str, adapters: bool, model: Path | None, adapter: Path | None, mode: str
) -> None:
    assert reference._choose(accelerator, adapters=adapters, model=model, adapter=adapter)[0] == mode
    if model is None and adapter is None:
        lora = LoRASettings(projections=("q_proj",), layers=(0,), rank=1, alpha=1) if adapters else None
        settings = reference.reference_settings(KTOConfig(), LlamaConfig(), lora, accelerator=accelerator)
        assert settings.mode == mode


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
    assert export_folder(make_config(tmp_path), resumes=False) == tmp_path / "log" / "hf"
    assert export_folder(make_config(tmp_path, tmp_path / "mine"), resumes=True) == tmp_path / "mine"
    config = make_config(tmp_path)
    config.export.enabled = False
    assert export_folder(config, resumes=False) is None


def test_only_a_resumed_run_replaces_its_own_export(tmp_path: Path) -> None:
    own = fill(tmp_path / "log" / "hf")
    assert export_folder(make_config(tmp_path), resumes=True) == own
    with pytest.raises(ConfigError, match="not empty"):
        export_folder(make_config(tmp_path), resumes=False)
    foreign = fill(tmp_path / "foreign")
    with pytest.raises(ConfigError, match="not empty"):
        export_folder(make_config(tmp_path, foreign), resumes=True)


def test_the_model_training_starts_from_is_never_replaced(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.pretrained_checkpoint.restore_from_path = str(fill(tmp_path / "log" / "hf"))
    with pytest.raises(ConfigError, match="not empty"):
        export_folder(config, resumes=True)


@pytest.mark.parametrize(
    ("name", "warmup", "constant", "warned"),
    [
        ("CosineAnnealing", 10, 0, False),
        ("CosineAnnealing", 10, 1000, True),  # NeMo-Aligner's default
        ("Constant", 10, 1000, False),
        ("LinearAnnealing", 20, 0, True),
    ],
)
def test_a_run_shorter_than_its_schedule_is_warned_about(
    caplog: pytest.LogCaptureFixture, name: Any, warmup: int, constant: int, warned: bool
) -> None:
    config = KTOConfig()
    config.model.optim.sched = SchedConfig(name=name, warmup_steps=warmup, constant_steps=constant)
    warn_about_rates(config, Schedule(total=20, per_epoch=20, val_interval=0, val_batches=0))
    assert ("does not follow its schedule" in caplog.text) is warned


def test_a_model_from_sizes_has_room_for_the_tokenizers_last_token() -> None:
    """The numbers of tokens may leave out some; the dtype is written down for exports of checkpoints."""
    config = KTOConfig()
    for name, size in {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}.items():
        setattr(config.model, name, size)
    config.model.max_position_embeddings = 16
    config.trainer.precision = "bf16-mixed"
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "<pad>": 7}, bos_token_id=None, eos_token_id=0)
    found = hf_config_of(config, tokenizer)  # type: ignore[arg-type]
    assert found.vocab_size == 8
    assert found.dtype == torch.bfloat16
