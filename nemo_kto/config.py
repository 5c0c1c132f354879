"""The configuration of a run: every key of conf/gpt_kto.yaml as a typed field, and nothing else.

Defaults live here (and, equal, in the YAML, which is what users read). `parse_config` turns what Hydra composed into these
classes and refuses what it does not know, naming the nearest key. Keys of NeMo-Aligner that no longer mean anything are
accepted with one warning; those whose feature does not exist yet are refused unless they are neutral.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_kto.config_legacy import take_legacy_keys
from nemo_kto.errors import ConfigError

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
    """`model.optim`: Adam with decoupled weight decay."""

    name: Literal["adam", "adamw"] = "adam"
    lr: float = 1.0e-6
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1.0e-8
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
    sequence_parallel: bool = False
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
        raise ConfigError(f"The configuration cannot be resolved: {str(error).splitlines()[0]}") from error
    known = _fields(KTOConfig)
    flat, ignored = take_legacy_keys(_flatten(plain, known), is_known=known.__contains__)
    if ignored:
        logger.warning("These keys change nothing here and are ignored: %s", ", ".join(sorted(ignored)))
    for key in flat:
        if key not in known:
            raise ConfigError(unknown_key_message(key, known))
    config: KTOConfig = _build(KTOConfig, flat, "")
    callback = config.exp_manager.checkpoint_callback_params
    callback.monitor = callback.monitor.replace("/", "_")  # val/loss in the logs, val_loss in file names
    _check_values(config)
    return config


def unknown_key_message(key: str, known: Mapping[str, Any] | None = None) -> str:
    """Return the message for an unknown key, naming the nearest known one."""
    names = list(known if known is not None else _fields(KTOConfig))
    last = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6) or [
        name for name in names if difflib.get_close_matches(last, [name.rsplit(".", 1)[-1]], cutoff=0.75)
    ]
    hint = f" Did you mean {near[0]}?" if near else " docs/configuration.md lists all keys."
    return f"Unknown configuration key {key}.{hint}"


def _fields(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> type of every leaf of a configuration class."""
    hints = typing.get_type_hints(cls)
    leaves: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            leaves |= _fields(typing.cast(type, kind), f"{prefix}{item.name}.")
        else:
            leaves[prefix + item.name] = kind
    return leaves


def _flatten(node: Any, known: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value; a mapping that is itself a value (wandb_logger_kwargs) stays whole."""
    leaves: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known:
            leaves |= _flatten(value, known, key + ".")
        elif value is None and any(name.startswith(key + ".") for name in known):
            continue  # a whole group set to null keeps its defaults
        else:
            leaves[key] = value
    return leaves


def _build(cls: type, flat: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for item in dataclasses.fields(cls):
        key, kind = prefix + item.name, hints[item.name]
        if dataclasses.is_dataclass(kind):
            values[item.name] = _build(typing.cast(type, kind), flat, key + ".")
        elif key in flat:
            values[item.name] = _convert(key, flat[key], kind)
    return cls(**values)


def _convert(key: str, value: Any, kind: Any) -> Any:
    """Return `value` as `kind`, or raise a ConfigError that says what the key takes."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) or _is_union(kind) else (kind,)
    for option in options:
        converted, fits = _as_type(value, option)
        if fits:
            return converted
    raise ConfigError(f"{key} is {value!r}. It takes {' or '.join(_describe(option) for option in options)}.")


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Union


def _as_type(value: Any, kind: Any) -> tuple[Any, bool]:
    """Return (the converted value, whether it fits); numbers widen, nothing else is converted silently."""
    origin = typing.get_origin(kind)
    if kind is type(None):
        return None, value is None
    if origin is Literal:
        return value, any(value == choice and type(value) is type(choice) for choice in typing.get_args(kind))
    if origin is list:
        items = value if isinstance(value, list | tuple) else [value]
        converted = [_as_type(item, typing.get_args(kind)[0]) for item in items]
        return [item for item, _ in converted], value is not None and all(fits for _, fits in converted)
    if origin is dict:
        return value, isinstance(value, dict)
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return (float(value), True) if is_number else (value, False)
    if kind is int:
        return value, isinstance(value, int) and not isinstance(value, bool)
    return value, isinstance(value, kind)


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if kind is type(None):
        return "null"
    if origin is Literal:
        return ", ".join(repr(choice) if not isinstance(choice, str) else choice for choice in typing.get_args(kind))
    if origin is list:
        return f"a list of {_describe(typing.get_args(kind)[0])}s"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    return names.get(origin or kind, str(kind)).removeprefix("a " if origin is list else "")


def _check_values(config: KTOConfig) -> None:
    """Raise a ConfigError for a value that is of the right type and still impossible."""
    model, kto, trainer = config.model, config.model.kto, config.trainer
    at_least_one = {
        "model.micro_batch_size": model.micro_batch_size,
        "model.global_batch_size": model.global_batch_size,
        "model.tensor_model_parallel_size": model.tensor_model_parallel_size,
        "model.pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "model.make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "model.kto.log_prob_forward_micro_batch_size": kto.log_prob_forward_micro_batch_size or 1,
        "model.data.seq_length": model.data.seq_length - 1,  # one prompt and one response token
        "trainer.num_nodes": trainer.num_nodes,
        "trainer.devices": 1 if trainer.devices == "auto" else trainer.devices,
        "trainer.log_every_n_steps": trainer.log_every_n_steps,
    }
    for key, number in at_least_one.items():
        if int(number) < 1:
            raise ConfigError(f"{key} is too small: it must be at least {2 if key.endswith('seq_length') else 1}.")
    not_negative = {
        "model.seed": model.seed,
        "model.optim.lr": model.optim.lr,
        "model.optim.weight_decay": model.optim.weight_decay,
        "model.optim.sched.min_lr": model.optim.sched.min_lr,
        "model.optim.sched.warmup_steps": model.optim.sched.warmup_steps,
        "model.optim.sched.constant_steps": model.optim.sched.constant_steps,
        "model.kto.desirable_loss_weight": kto.desirable_loss_weight,
        "model.kto.undesirable_loss_weight": kto.undesirable_loss_weight,
        "model.data.num_workers": model.data.num_workers,
        "trainer.kto.save_interval": trainer.kto.save_interval or 0,
        "trainer.kto.gradient_clip_val": trainer.kto.gradient_clip_val or 0,
    }
    for key, quantity in not_negative.items():
        if quantity < 0:
            raise ConfigError(f"{key}={quantity} must not be negative.")
    if kto.ref_policy_kl_penalty <= 0:
        raise ConfigError(f"model.kto.ref_policy_kl_penalty={kto.ref_policy_kl_penalty} (beta) must be positive.")
    if model.optim.sched.min_lr > model.optim.lr:
        raise ConfigError(
            f"model.optim.sched.min_lr={model.optim.sched.min_lr} is above model.optim.lr={model.optim.lr}. Lower min_lr."
        )
    if len(model.optim.betas) != 2 or not all(0 <= beta < 1 for beta in model.optim.betas):
        raise ConfigError(f"model.optim.betas={model.optim.betas} must be two numbers in [0, 1).")
    _check_monitor(config.exp_manager.checkpoint_callback_params.monitor)
    _check_fractions(trainer.kto)
    _check_pretrained(config.pretrained_checkpoint.restore_from_path)


_MONITORS = ("val_loss", "val_kl", "val_rewards_accuracies", "val_rewards_margins")
"""Validation metrics that every run has, as the checkpoint callback knows them."""


def _check_monitor(monitor: str) -> None:
    if monitor not in _MONITORS:
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.monitor={monitor} is not a validation metric. "
            f"Use one of {', '.join(_MONITORS)}."
        )


def _check_fractions(kto: TrainerKTOConfig) -> None:
    for name in ("val_check_interval", "limit_train_batches", "limit_val_batches"):
        value = getattr(kto, name)
        if value <= 0 or (isinstance(value, float) and value > 1):
            raise ConfigError(
                f"trainer.kto.{name}={value} must be a positive integer (batches) or a fraction above 0 and up to 1.0."
            )


def _check_pretrained(path: str | None) -> None:
    if path is None:
        return
    if path.endswith(".nemo"):
        raise ConfigError(
            f"pretrained_checkpoint.restore_from_path={path}: .nemo files cannot be read. Convert the model to a Hugging "
            "Face folder (NeMo's scripts/checkpoint_converters) and name that folder."
        )
    if not Path(path).is_dir():
        raise ConfigError(f"pretrained_checkpoint.restore_from_path={path} is not a folder.")
