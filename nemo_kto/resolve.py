"""What a configuration means: model, layout, schedule and folders, checked before any process is started."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemo_kto.algorithms.losses import LOSSES
from nemo_kto.config import KTOConfig, KTOLossConfig
from nemo_kto.data.datamodule import KTODataModule
from nemo_kto.data.sampling import epoch_length, kl_set_size
from nemo_kto.errors import ConfigError
from nemo_kto.models import moe
from nemo_kto.models.gpt import (
    Recompute,
    hf_config_from_sizes,
    load_hf_config,
    padded_vocabulary,
)
from nemo_kto.models.hf_config import model_sizes
from nemo_kto.models.hf_weights import SafetensorsFolder
from nemo_kto.models.layer_specs import check_transformer_impl
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runtime import parallel
from nemo_kto.runtime.layout import Layout, check_batch, check_layout, check_recompute_groups

logger = logging.getLogger(__name__)

_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "rotary_base",
    "layernorm_epsilon",
    "share_embeddings_and_output_weights",
)
"""Keys of `model` that describe a randomly initialised model, with the names `hf_config_from_sizes` takes."""


PARAMS_DTYPES = {32: torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Value of `trainer.precision` -> dtype of parameters and activations."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The length of a run in steps, one global batch each.

    Attributes:
        total: Steps of the whole run.
        per_epoch: Steps of one pass over the training data.
        val_interval: Steps between validations; 0 without validation data.
        val_batches: Batches of one validation.
    """

    total: int
    per_epoch: int
    val_interval: int
    val_batches: int


def accelerator(config: KTOConfig) -> str:
    """Return "cpu" or "gpu" for `trainer.accelerator`."""
    wanted = config.trainer.accelerator
    if wanted == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    if wanted == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu, but no CUDA device is visible. Use cpu or auto.")
    return wanted


def params_dtype(config: KTOConfig) -> torch.dtype:
    """Return the dtype of parameters and activations for `trainer.precision`; the optimizer's is always float32."""
    return PARAMS_DTYPES[config.trainer.precision]


def model(config: KTOConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Return the Hugging Face configuration of the model: of the folder, or from the sizes in `model`.

    Raises:
        ConfigError: Sizes contradict the folder, are incomplete, or the tokenizer has more tokens than the model.
        CheckpointError: The folder is no usable model.
    """
    sizes = {name: getattr(config.model, name) for name in _SIZES}
    given = {name: value for name, value in sizes.items() if value is not None}
    folder = config.pretrained_checkpoint.restore_from_path
    if folder is None:
        return hf_config_from_sizes(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **given,
        )
    if given:
        raise ConfigError(
            f"{', '.join('model.' + name for name in given)}: the sizes come from "
            f"pretrained_checkpoint.restore_from_path={folder}. Leave these keys out, or restore_from_path."
        )
    hf_config = load_hf_config(folder)
    with SafetensorsFolder(Path(folder)):
        pass  # raises for a folder without weights, before any process is started
    if len(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens, the model in {folder} only {hf_config.vocab_size}. "
            "Use the tokenizer that belongs to the model."
        )
    return hf_config


def layout(config: KTOConfig, hf_config: PretrainedConfig, accelerator: str) -> Layout:
    """Return the checked layout of the run.

    Raises:
        ConfigError: It does not fit the processes, the model or the batch.
    """
    settings = config.model
    result = Layout(
        world_size=parallel.device_count(config.trainer.devices, accelerator) * config.trainer.num_nodes,
        tensor=settings.tensor_model_parallel_size,
        sequence=settings.sequence_parallel and settings.tensor_model_parallel_size > 1,
        pipeline=settings.pipeline_model_parallel_size,
        context=settings.context_parallel_size,
        virtual=settings.virtual_pipeline_model_parallel_size or 1,
        first_stage_layers=settings.num_layers_in_first_pipeline_stage,
        last_stage_layers=settings.num_layers_in_last_pipeline_stage,
        expert=settings.expert_model_parallel_size,
        expert_tensor=settings.expert_tensor_parallel_size,
    )
    parallel.check_launched(result)
    check_layout(result, model_sizes(hf_config))
    if settings.moe_aux_loss_coeff and not moe.num_experts(hf_config):
        raise ConfigError(
            f"model.moe_aux_loss_coeff={settings.moe_aux_loss_coeff} needs a mixture of experts; this model is dense. "
            "Set it to 0."
        )
    if params_dtype(config) == torch.float16 and moe.num_experts(hf_config):
        # Megatron gives the experts' optimizer a loss scale of its own, and scales the loss with the other's
        raise ConfigError(
            f"trainer.precision={config.trainer.precision} cannot be used with a mixture of experts. Use bf16-mixed."
        )
    if settings.activations_checkpoint_method == "uniform":
        group = settings.activations_checkpoint_num_layers
        assert group is not None, "parse_config has checked this"
        check_recompute_groups(result, hf_config.num_hidden_layers, group)
    check_transformer_impl(settings.transformer_impl)
    padded_vocabulary(
        hf_config.vocab_size, multiple=settings.make_vocab_size_divisible_by, tensor_model_parallel_size=result.tensor
    )
    check_batch(
        result,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        kl_set_size=kl_set_size(settings.global_batch_size, kl_fraction(settings.kto)),
        kl_micro_batch_size=settings.kto.log_prob_forward_micro_batch_size or settings.micro_batch_size,
        micro_batch_tokens=settings.micro_batch_tokens,
    )
    return result


def kl_fraction(kto: KTOLossConfig) -> float:
    """Return which share of a training batch's prompts has a KL response; 0 for losses without a KL set."""
    return kto.kl_fraction if LOSSES[kto.loss].baseline == "kl" else 0.0


def recompute(config: KTOConfig) -> Recompute | None:
    """Return what the backward pass computes again; `parse_config` has checked that the keys fit together."""
    settings = config.model
    if settings.activations_checkpoint_granularity is None:
        return None
    return Recompute(
        granularity=settings.activations_checkpoint_granularity,
        method=settings.activations_checkpoint_method,
        num_layers=settings.activations_checkpoint_num_layers,
    )


def plan_schedule(config: KTOConfig, data: KTODataModule) -> Schedule:
    """Return the steps of the run from the size of the data and `trainer.kto`.

    Raises:
        ConfigError: Neither `max_steps` nor `max_epochs` limits the run.
    """
    kto = config.trainer.kto
    batches = epoch_length(len(data.splits["train"]), config.model.global_batch_size)
    per_epoch = _count(kto.limit_train_batches, batches)
    limits = []
    if kto.max_steps is not None and kto.max_steps >= 0:
        limits.append(kto.max_steps)
    if kto.max_epochs is not None and kto.max_epochs >= 0:
        limits.append(kto.max_epochs * per_epoch)
    if not limits:
        raise ConfigError("Nothing ends the run. Set trainer.kto.max_steps or trainer.kto.max_epochs.")
    interval = kto.val_check_interval
    if isinstance(interval, float):
        interval = _count(interval, per_epoch)
    val_batches = _val_batches(config, data) if "validation" in data.splits else 0
    return Schedule(
        total=min(limits),
        per_epoch=per_epoch,
        val_interval=interval if val_batches else 0,
        val_batches=val_batches,
    )


def plan_validation(config: KTOConfig, data: KTODataModule) -> Schedule:
    """Return the schedule of a validation on its own."""
    return Schedule(total=1, per_epoch=1, val_interval=0, val_batches=_val_batches(config, data))


def _val_batches(config: KTOConfig, data: KTODataModule) -> int:
    available = -(-len(data.splits["validation"]) // config.model.global_batch_size)
    return _count(config.trainer.kto.limit_val_batches, available)


def warn_about_rates(config: KTOConfig, schedule: Schedule) -> None:
    """Log a warning when the run is too short for its learning-rate schedule, as NeMo-Aligner's defaults often are."""
    sched = config.model.optim.sched
    flat = sched.warmup_steps + (0 if sched.name == "Constant" else sched.constant_steps)
    if flat >= schedule.total and is_global_rank_zero():
        logger.warning(
            "The run of %d steps is no longer than model.optim.sched.warmup_steps=%d and constant_steps=%d together: "
            "the learning rate does not follow its schedule. Lower them.",
            schedule.total,
            sched.warmup_steps,
            sched.constant_steps,
        )


def log_directory(config: KTOConfig) -> Path:
    """Return the folder of the run's logs, checkpoints and export."""
    manager = config.exp_manager
    return Path(manager.explicit_log_dir or Path(manager.exp_dir or "results") / manager.name).absolute()


def export_directory(config: KTOConfig) -> Path:
    """Return the folder the aligned model is written to."""
    return Path(config.export.folder or log_directory(config) / "hf").absolute()


def export_folder(config: KTOConfig, *, resumes: bool) -> Path | None:
    """Return the folder the aligned model will be written to; None if the run writes none.

    Only a resumed run may replace a folder, and only the one in its own log folder.

    Raises:
        ConfigError: The folder holds something else.
    """
    if not config.export.enabled:
        return None
    folder = export_directory(config)
    sources = {path.resolve() for path in (tokenizer_folder(config), model_folder(config)) if path is not None}
    ours = resumes and config.export.folder is None and folder.resolve() not in sources
    if not ours and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"The aligned model would be written to {folder}, which is not empty. Name another folder with "
            "export.folder or exp_manager.explicit_log_dir, or remove it."
        )
    return folder


def _count(limit: int | float, whole: int) -> int:
    """Return the batches meant by a count (int) or by a fraction (float) of `whole`: at least 1, at most `whole`."""
    number = int(limit * whole) if isinstance(limit, float) else limit
    return min(max(number, 1), whole)


def tokenizer_folder(config: KTOConfig) -> Path:
    """Return the folder of the tokenizer; a ConfigError if there is none."""
    folder = config.model.tokenizer.path or config.pretrained_checkpoint.restore_from_path
    if folder is None:
        raise ConfigError(
            "There is no tokenizer. Set pretrained_checkpoint.restore_from_path to a Hugging Face folder, or, for a "
            "model with random weights, model.tokenizer.path."
        )
    return Path(folder)


def model_folder(config: KTOConfig) -> Path | None:
    """Return the Hugging Face folder training starts from; None for random weights."""
    folder = config.pretrained_checkpoint.restore_from_path
    return Path(folder) if folder else None
