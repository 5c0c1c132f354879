"""Values of the configuration that are of the right type and still impossible, alone or together."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_kto.config.adapter_checks import check_lora, check_quantisation, check_vision
from nemo_kto.config.objective_checks import check_objective
from nemo_kto.config.reader import leaf_values
from nemo_kto.config.schema import DataConfig, ExpManagerConfig, KTOConfig, ModelConfig, OptimConfig, TrainerKTOConfig
from nemo_kto.errors import ConfigError

_LEAST = {
    "generation.num_prompts": 0,
    "generation.every_n_validations": 1,
    "generation.max_new_tokens": 1,
    "generation.temperature": 0,
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.kto.save_interval": 0,
    "trainer.kto.gradient_clip_val": 0,
    "trainer.kto.max_skipped_steps": 1,
    "exp_manager.checkpoint_callback_params.save_top_k": -1,
    "model.seed": 0,
    "model.micro_batch_size": 1,
    "model.micro_batch_tokens": 1,
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
    "model.kto.sft_loss_weight": 0,
    "model.kto.reference.sync_every_n_steps": 1,
    "model.peft.lora_tuning.adapter_dim": 1,
    "model.optim.lr": 0,
    "model.optim.weight_decay": 0,
    "model.optim.eps": 0,
    "model.optim.offload_fraction": 0,
    "model.optim.sched.min_lr": 0,
    "model.optim.sched.warmup_steps": 0,
    "model.optim.sched.constant_steps": 0,
    "model.data.seq_length": 2,  # one token of the prompt, one of the response
    "model.data.num_workers": 0,
    "model.data.tokenize_workers": 1,
    "model.data.validation_fraction": 0,
}
"""Key -> the least value it may have."""

_MOST = {
    "model.seed": 2**32 - 1,  # of numpy's generators
    "model.optim.offload_fraction": 1,
    "trainer.timeout_minutes": 366 * 24 * 60,
}
"""Key -> the greatest value it may have."""

_BFLOAT16_STEP = 2**-7
"""The distance between bfloat16 numbers, as a share of the number, where it is greatest."""

_SECRET = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSW(OR)?D|CREDENTIAL|ACCESS_?KEY|PRIVATE_?KEY)", re.IGNORECASE)
"""Names of environment variables whose values are nobody's business."""

_SHORTEST_SECRET = 8
"""Letters; shorter values are in harmless words too."""

_MONITORS = ("val_loss", "val_kl", "val_rewards_accuracies", "val_rewards_margins")
"""Validation metrics that a checkpoint can be chosen by, as the checkpoint callback knows them."""

_NEEDED_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
"""Sizes without which no model can be made."""


def check_bounds(values: Mapping[str, Any]) -> None:
    """Raise a ConfigError for a value that its key cannot have; only some keys need be there."""
    for key, least in _LEAST.items():
        value = values.get(key)
        if value is not None and not isinstance(value, str) and value < least:
            raise ConfigError(f"{key}={value} is too small. It must be at least {least}.")
    for key, most in _MOST.items():
        value = values.get(key)
        if value is not None and value > most:
            raise ConfigError(f"{key}={value} is too large. It must be at most {most}.")


def check_values(config: KTOConfig) -> None:
    """Raise a ConfigError for a value that is of the right type and still impossible."""
    values = leaf_values(config)
    check_bounds(values)
    for key, value in values.items():
        _check_text(key, value)
    if config.model.kto.ref_policy_kl_penalty <= 0:
        raise ConfigError(
            f"model.kto.ref_policy_kl_penalty={config.model.kto.ref_policy_kl_penalty} (beta) must be above 0."
        )
    if config.trainer.timeout_minutes <= 0:
        raise ConfigError(f"trainer.timeout_minutes={config.trainer.timeout_minutes} must be above 0.")
    _check_profile(config.trainer.profile_steps)
    _check_length(config.trainer.kto)
    _check_callbacks(config.trainer.callbacks)
    _check_exp_manager(config.exp_manager)
    _check_model_source(config)
    check_lora(config)
    check_quantisation(config)
    check_vision(config)
    if config.export.push_to_hub is not None and not config.export.enabled:
        raise ConfigError("export.push_to_hub needs export.enabled=true: it is the exported folder that is uploaded.")
    _check_reference(config)
    _check_recompute(config.model)
    _check_optimizer(config.model.optim)
    check_data(config.model.data)
    check_objective(config)
    if not 0 < config.generation.top_p <= 1:
        raise ConfigError(f"generation.top_p={config.generation.top_p} must be above 0 and at most 1.")


def _check_text(key: str, value: Any) -> None:
    """Raise a ConfigError for text that must not be, or cannot be, written into logs, cards and checkpoints.

    That is the value of an environment variable that looks like a secret, as by `${oc.env:...}`; and a name whose
    bytes are no UTF-8.
    """
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(
            f"{key}={ascii(value)} has bytes in it that are no text in UTF-8. Rename that file or folder."
        )
    if isinstance(value, str):
        for name, secret in os.environ.items():
            if _SECRET.search(name) and len(secret) >= _SHORTEST_SECRET and secret in value:
                raise ConfigError(
                    f"{key} holds the value of the environment variable {name}, which would be written to the log "
                    "folder. Leave it out: whoever needs it reads the variable."
                )
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        _check_text(key, inner)


def _check_profile(steps: Sequence[int] | None) -> None:
    if steps is not None and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise ConfigError(
            f"trainer.profile_steps={steps} must be the number of the first step to profile and of the last one, "
            "counted from 1, like [10, 12]."
        )


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


def _check_callbacks(callbacks: Sequence[Mapping[str, Any]] | None) -> None:
    for callback in callbacks or ():
        if not isinstance(callback.get("_target_"), str):
            raise ConfigError(
                f"trainer.callbacks: {dict(callback)} does not say what it is. Write {{_target_: "
                "my_package.MyCallback}, with the arguments of its constructor beside it."
            )


def _check_exp_manager(manager: ExpManagerConfig) -> None:
    monitor = manager.checkpoint_callback_params.monitor
    if monitor not in _MONITORS:
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.monitor={monitor} is not a validation metric. "
            f"Use one of {', '.join(_MONITORS)}."
        )
    if re.search(r"[{}/\\\x00-\x1f]", manager.name):
        raise ConfigError(
            f"exp_manager.name={manager.name!r}: checkpoints' names begin with it, so it cannot have braces, slashes, "
            "backslashes or line breaks in it."
        )
    if manager.max_time_per_run and not re.fullmatch(r"\d{1,5}:\d\d:\d\d:\d\d", manager.max_time_per_run):
        raise ConfigError(
            f"exp_manager.max_time_per_run={manager.max_time_per_run} must be written DD:HH:MM:SS, like 00:03:50:00."
        )
    if manager.create_wandb_logger and not {"name", "project"} & set(manager.wandb_logger_kwargs or {}):
        raise ConfigError(
            "exp_manager.create_wandb_logger=true needs a project and a run name. "
            "Set exp_manager.wandb_logger_kwargs={project: ..., name: ...}."
        )
    # mlflow-skinny has the same module
    if manager.create_mlflow_logger and importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            "exp_manager.create_mlflow_logger=true needs MLflow. Install it: pip install 'nemo-kto[mlflow]'."
        )
    for name in ("wandb_logger_kwargs", "mlflow_logger_kwargs"):
        _refuse_secrets(f"exp_manager.{name}", getattr(manager, name))


def _refuse_secrets(key: str, value: Any) -> None:
    """Raise a ConfigError for a password or key, which would end up in logs, checkpoints and the command's history."""
    if isinstance(value, Mapping):
        for name, below in value.items():
            _refuse_secrets(f"{key}.{name}", below)
        return
    named = key.rsplit(".", 1)[-1].lower() in ("api_key", "password", "token") and value is not None
    if named or (isinstance(value, str) and re.search(r"://[^/@]*:[^/@]*@", value)):
        raise ConfigError(
            f"{key} holds a secret, which would be written to the log folder. Leave it out and set the environment "
            "variables WANDB_API_KEY, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
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


def _check_reference(config: KTOConfig) -> None:
    reference, prefix = config.model.kto.reference, "model.kto.reference."
    adapters = config.model.peft.peft_scheme == "lora"
    if reference.mode == "adapter_off" and not adapters:
        raise ConfigError(f"{prefix}mode=adapter_off needs model.peft.peft_scheme=lora. Use auto.")
    if reference.mode == "adapter_off" and reference.checkpoint is not None:
        raise ConfigError(
            f"{prefix}mode=adapter_off means the base model, {prefix}checkpoint={reference.checkpoint} another. "
            f"Use {prefix}mode=auto."
        )
    if reference.cache_dir is not None and reference.mode != "cached":
        raise ConfigError(f"{prefix}cache_dir={reference.cache_dir} needs {prefix}mode=cached.")
    if reference.sync_every_n_steps is None:
        return
    if not 0 < reference.sync_mixup_alpha <= 1:
        raise ConfigError(f"{prefix}sync_mixup_alpha={reference.sync_mixup_alpha} must be above 0 and at most 1.")
    sync = f"{prefix}sync_every_n_steps={reference.sync_every_n_steps}"
    if adapters:
        raise ConfigError(
            f"{sync} cannot be used with model.peft.peft_scheme=lora: what lies between two adapters is in general no "
            "adapter of their rank. Leave it out."
        )
    if reference.mode == "cached":
        raise ConfigError(f"{sync} cannot be used with {prefix}mode=cached, which never changes. Use auto.")


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
    if optim.states == "bfloat16" and max(optim.betas) > 1 - _BFLOAT16_STEP:
        raise ConfigError(
            f"model.optim.betas={optim.betas} has a mean of which a step changes less than bfloat16 can tell "
            f"apart (1 in {1 / _BFLOAT16_STEP:.0f}): it would stand still. With model.optim.states=bfloat16 both must "
            f"be at most {1 - _BFLOAT16_STEP:.3f}, like 0.9 and 0.98."
        )


def check_data(data: DataConfig) -> None:
    """Raise a ConfigError for values of `model.data` that are impossible together."""
    prefix = "model.data."
    if data.validation_fraction >= 1:
        raise ConfigError(f"{prefix}validation_fraction={data.validation_fraction} must be below 1.")
    if data.validation_fraction and data.data_prefix.validation:
        raise ConfigError(
            f"{prefix}validation_fraction={data.validation_fraction} takes validation data from the training data, "
            f"and {prefix}data_prefix.validation names some. Leave one of them out."
        )
    template = data.prompt_template
    if template is not None and template != "chat" and "{prompt}" not in template:
        raise ConfigError(f"{prefix}prompt_template={template!r} must have {{prompt}} in it, or be chat.")
