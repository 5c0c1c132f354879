"""The configuration of a run: every key of conf/gpt_kto.yaml as a typed field, and nothing else.

Defaults live here (and, equal, in the YAML, which is what users read). `parse_config` turns what Hydra composed into
these classes and refuses what it does not know, naming the nearest key. Keys of NeMo-Aligner that no longer mean
anything are accepted with one warning; those whose feature does not exist yet are refused unless they are neutral.
docs/configuration.md explains every key.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_kto.config_legacy import take_legacy_keys
from nemo_kto.config_reader import build, flatten, leaf_values, unknown_key_message
from nemo_kto.errors import ConfigError
from nemo_kto.quiet import is_global_rank_zero

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainerKTOConfig:
    """`trainer.kto`: length of the run and what happens when."""

    max_epochs: int | None = 1
    max_steps: int | None = -1
    val_check_interval: int | float = 0.1
    save_interval: int | None = 100
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    gradient_clip_val: float | None = 1.0


@dataclass(kw_only=True)
class TrainerConfig:
    """`trainer`: processes and precision."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | Literal["auto"] = 1
    num_nodes: int = 1
    precision: int | str = 32
    log_every_n_steps: int = 1
    kto: TrainerKTOConfig = field(default_factory=TrainerKTOConfig)


@dataclass(kw_only=True)
class CheckpointCallbackConfig:
    """`exp_manager.checkpoint_callback_params`: which checkpoints are kept besides the last."""

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    save_top_k: int = 3
    async_save: bool = False


@dataclass(kw_only=True)
class ExpManagerConfig:
    """`exp_manager`: logs, checkpoints, resuming."""

    explicit_log_dir: str | None = None
    exp_dir: str | None = None
    name: str = "megatron_gpt"
    max_time_per_run: str | None = None
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] | None = None
    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True
    create_checkpoint_callback: bool = True
    checkpoint_callback_params: CheckpointCallbackConfig = field(default_factory=CheckpointCallbackConfig)


@dataclass(kw_only=True)
class PretrainedCheckpointConfig:
    """`pretrained_checkpoint`: where training starts."""

    restore_from_path: str | None = None


@dataclass(kw_only=True)
class ExportConfig:
    """`export`: the Hugging Face folder written at the end."""

    enabled: bool = True
    folder: str | None = None


@dataclass(kw_only=True)
class TokenizerConfig:
    """`model.tokenizer`."""

    path: str | None = None


@dataclass(kw_only=True)
class ReferenceConfig:
    """`model.kto.reference`: how the reference policy is held."""

    mode: Literal["auto", "cpu_swap", "resident"] = "auto"


@dataclass(kw_only=True)
class KTOLossConfig:
    """`model.kto`: the algorithm."""

    loss: Literal["kto"] = "kto"
    ref_policy_kl_penalty: float = 0.2
    desirable_loss_weight: float = 1.0
    undesirable_loss_weight: float = 1.0
    kl_scope: Literal["global_batch", "micro_batch"] = "global_batch"
    loss_reduction: Literal["sample_mean", "class_mean"] = "sample_mean"
    preference_average_log_probs: bool = False
    log_prob_forward_micro_batch_size: int | None = None
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)


@dataclass(kw_only=True)
class SchedConfig:
    """`model.optim.sched`: learning rate over time."""

    name: Literal["CosineAnnealing", "LinearAnnealing", "Constant"] = "CosineAnnealing"
    warmup_steps: int = 10
    constant_steps: int = 0
    min_lr: float = 1.0e-7


@dataclass(kw_only=True)
class OptimConfig:
    """`model.optim`: Adam with decoupled weight decay, its state divided among the data-parallel ranks."""

    name: Literal["adam", "adamw", "distributed_fused_adam"] = "adam"
    lr: float = 1.0e-6
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1.0e-8
    overlap_grad_sync: bool = False
    overlap_param_sync: bool = False
    sched: SchedConfig = field(default_factory=SchedConfig)


@dataclass(kw_only=True)
class DataPrefixConfig:
    """`model.data.data_prefix`: files by split; a single file may be given without a list."""

    train: list[str] | None = None
    validation: list[str] | None = None


@dataclass(kw_only=True)
class DataConfig:
    """`model.data`."""

    data_prefix: DataPrefixConfig = field(default_factory=DataPrefixConfig)
    format: Literal["auto", "nemo_aligner", "trl"] = "auto"
    seq_length: int = 4096
    overlong: Literal["drop"] = "drop"
    shuffle: bool = True
    append_eod: bool = True
    num_workers: int = 0


@dataclass(kw_only=True)
class ModelConfig:
    """`model`: batch, layout, sizes, and the parts above."""

    seed: int = 1234
    micro_batch_size: int = 1
    global_batch_size: int = 64
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    activations_checkpoint_granularity: Literal["selective", "full"] | None = None
    activations_checkpoint_method: Literal["uniform", "block"] | None = None
    activations_checkpoint_num_layers: int | None = None
    moe_aux_loss_coeff: float = 0.0
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    make_vocab_size_divisible_by: int = 128
    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    max_position_embeddings: int | None = None
    rotary_base: float | None = None
    layernorm_epsilon: float | None = None
    share_embeddings_and_output_weights: bool | None = None
    init_method_std: float = 0.02
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    kto: KTOLossConfig = field(default_factory=KTOLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(kw_only=True)
class KTOConfig:
    """A whole run; attribute paths are the keys of conf/gpt_kto.yaml."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    pretrained_checkpoint: PretrainedCheckpointConfig = field(default_factory=PretrainedCheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


def config_dir() -> Path:
    """Return the folder of gpt_kto.yaml: of the clone, or of the installed package."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def parse_config(raw: DictConfig | Mapping[str, Any]) -> KTOConfig:
    """Return the typed configuration of a run.

    Args:
        raw: What Hydra composed from conf/gpt_kto.yaml and the command line, or the same as plain mappings; missing
            keys take their defaults.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type or is impossible.
    """
    try:
        plain = OmegaConf.to_container(OmegaConf.create(dict(raw)), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{error.full_key or 'The configuration'} cannot be resolved: {str(error).splitlines()[0]}"
        ) from error
    assert isinstance(plain, dict)
    defaults = leaf_values(KTOConfig())
    flat, ignored = take_legacy_keys(flatten(plain, defaults), defaults)
    for key in flat:
        if key not in defaults:
            raise ConfigError(unknown_key_message(key, defaults))
    if ignored and is_global_rank_zero():
        logger.warning("These keys change nothing here and are ignored: %s", ", ".join(ignored))
    config: KTOConfig = build(KTOConfig, flat)
    config.trainer.precision = _canonical_precision(config.trainer.precision)
    callback = config.exp_manager.checkpoint_callback_params
    callback.monitor = callback.monitor.replace("/", "_")  # val/loss in the logs, val_loss in file names
    _check_values(config)
    return config


_PRECISIONS: dict[int | str, tuple[str, ...]] = {
    32: ("32", "32-true", "fp32"),
    "bf16-mixed": ("bf16-mixed", "bf16"),
    "16-mixed": ("16-mixed", "16", "fp16"),
}
"""What `trainer.precision` becomes -> the ways NeMo and Lightning write it."""


def _canonical_precision(given: int | str) -> int | str:
    for canonical, spellings in _PRECISIONS.items():
        if str(given) in spellings:
            return canonical
    raise ConfigError(f"trainer.precision={given} is not available. Use one of {', '.join(map(str, _PRECISIONS))}.")


_LEAST = {
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.kto.save_interval": 0,
    "trainer.kto.gradient_clip_val": 0,
    "exp_manager.checkpoint_callback_params.save_top_k": -1,
    "model.seed": 0,
    "model.micro_batch_size": 1,
    "model.global_batch_size": 1,
    "model.tensor_model_parallel_size": 1,
    "model.pipeline_model_parallel_size": 1,
    "model.virtual_pipeline_model_parallel_size": 1,
    "model.context_parallel_size": 1,
    "model.expert_model_parallel_size": 1,
    "model.expert_tensor_parallel_size": 1,
    "model.moe_aux_loss_coeff": 0,
    "model.num_layers_in_first_pipeline_stage": 1,
    "model.num_layers_in_last_pipeline_stage": 1,
    "model.activations_checkpoint_num_layers": 1,
    "model.make_vocab_size_divisible_by": 1,
    "model.num_layers": 1,
    "model.hidden_size": 1,
    "model.ffn_hidden_size": 1,
    "model.num_attention_heads": 1,
    "model.num_query_groups": 1,
    "model.kv_channels": 1,
    "model.max_position_embeddings": 1,
    "model.init_method_std": 0,
    "model.kto.desirable_loss_weight": 0,
    "model.kto.undesirable_loss_weight": 0,
    "model.kto.log_prob_forward_micro_batch_size": 1,
    "model.optim.lr": 0,
    "model.optim.weight_decay": 0,
    "model.optim.eps": 0,
    "model.optim.sched.min_lr": 0,
    "model.optim.sched.warmup_steps": 0,
    "model.optim.sched.constant_steps": 0,
    "model.data.seq_length": 2,  # one token of the prompt, one of the response
    "model.data.num_workers": 0,
}
"""Key -> the least value it may have."""

_MONITORS = ("val_loss", "val_kl", "val_rewards_accuracies", "val_rewards_margins")
"""Validation metrics that every run has, as the checkpoint callback knows them."""

_NEEDED_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
"""Sizes without which no model can be made."""


def _check_values(config: KTOConfig) -> None:
    """Raise a ConfigError for a value that is of the right type and still impossible."""
    values = leaf_values(config)
    for key, least in _LEAST.items():
        value = values[key]
        if value is not None and not isinstance(value, str) and value < least:
            raise ConfigError(f"{key}={value} is too small. It must be at least {least}.")
    if config.model.kto.ref_policy_kl_penalty <= 0:
        raise ConfigError(
            f"model.kto.ref_policy_kl_penalty={config.model.kto.ref_policy_kl_penalty} (beta) must be above 0."
        )
    _check_length(config.trainer.kto)
    _check_exp_manager(config.exp_manager)
    _check_model_source(config)
    _check_recompute(config.model)
    _check_optimizer(config.model.optim)


def _check_length(kto: TrainerKTOConfig) -> None:
    for name in ("max_steps", "max_epochs"):
        limit = getattr(kto, name)
        if limit is not None and limit != -1 and limit < 1:
            raise ConfigError(f"trainer.kto.{name}={limit} must be at least 1, or -1 for no limit.")
    for name in ("val_check_interval", "limit_train_batches", "limit_val_batches"):
        value = getattr(kto, name)
        if value <= 0 or (isinstance(value, float) and value > 1):
            advice = " To train without validation, give no validation files." if value == 0 else ""
            raise ConfigError(
                f"trainer.kto.{name}={value} must be a positive integer (batches) or a fraction above 0 and up to 1.0."
                + advice
            )


def _check_exp_manager(manager: ExpManagerConfig) -> None:
    monitor = manager.checkpoint_callback_params.monitor
    if monitor not in _MONITORS:
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.monitor={monitor} is not a validation metric. "
            f"Use one of {', '.join(_MONITORS)}."
        )
    if manager.max_time_per_run and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", manager.max_time_per_run):
        raise ConfigError(
            f"exp_manager.max_time_per_run={manager.max_time_per_run} must be written DD:HH:MM:SS, like 00:03:50:00."
        )
    if manager.create_wandb_logger and not {"name", "project"} & set(manager.wandb_logger_kwargs or {}):
        raise ConfigError(
            "exp_manager.create_wandb_logger=true needs a project and a run name. "
            "Set exp_manager.wandb_logger_kwargs={project: ..., name: ...}."
        )


def _check_model_source(config: KTOConfig) -> None:
    path = config.pretrained_checkpoint.restore_from_path
    if path is None:
        given = [name for name in _NEEDED_SIZES if getattr(config.model, name) is not None]
        if (given or config.model.tokenizer.path) and len(given) < len(_NEEDED_SIZES):
            missing = ", ".join(f"model.{name}" for name in _NEEDED_SIZES if name not in given)
            raise ConfigError(
                f"A model with random weights also needs {missing}. To start from a trained model, set "
                "pretrained_checkpoint.restore_from_path to its Hugging Face folder."
            )
    elif path.endswith(".nemo"):
        raise ConfigError(
            f"pretrained_checkpoint.restore_from_path={path}: .nemo files cannot be read. Convert the model to a "
            "Hugging Face folder (NeMo's scripts/checkpoint_converters) and name that folder."
        )
    elif not Path(path).is_dir():
        raise ConfigError(f"pretrained_checkpoint.restore_from_path={path} is not a folder.")


def _check_recompute(model: ModelConfig) -> None:
    prefix = "model.activations_checkpoint_"
    details = {
        "method": model.activations_checkpoint_method,
        "num_layers": model.activations_checkpoint_num_layers,
    }
    if model.activations_checkpoint_granularity == "full":
        missing = [prefix + name for name, value in details.items() if value is None]
        if missing:
            raise ConfigError(f"{prefix}granularity=full also needs {' and '.join(missing)}, like uniform and 1.")
        return
    for name, value in details.items():
        if value is not None:
            raise ConfigError(f"{prefix}{name}={value} needs {prefix}granularity=full.")


def _check_optimizer(optim: OptimConfig) -> None:
    if optim.sched.min_lr > optim.lr:
        raise ConfigError(
            f"model.optim.sched.min_lr={optim.sched.min_lr} is above model.optim.lr={optim.lr}. Lower min_lr."
        )
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"model.optim.betas={optim.betas} must be two numbers of at least 0 and below 1.")
