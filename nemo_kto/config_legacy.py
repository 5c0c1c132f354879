"""NeMo-Aligner's keys: renamed, meaningless today, or of features that do not exist yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_kto.errors import ConfigError

RENAMED = {
    "model.encoder_seq_length": "model.data.seq_length",
    "model.kto.preference_loss": "model.kto.loss",
    "trainer.max_time": "exp_manager.max_time_per_run",
}
"""Old key -> the key that takes its value."""

IGNORED_PREFIXES = (
    "trainer.gradient_clip_val",
    "trainer.logger",
    "trainer.enable_checkpointing",
    "trainer.use_distributed_sampler",
    "trainer.max_epochs",
    "trainer.max_steps",
    "exp_manager.create_preemption_callback",
    "exp_manager.seconds_to_sleep",
    "exp_manager.log_step_timing",
    "exp_manager.step_timing_kwargs",
    "exp_manager.checkpoint_callback_params.always_save_nemo",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end",
    "exp_manager.checkpoint_callback_params.save_best_model",
    "exp_manager.checkpoint_callback_params.save_last",
    "exp_manager.checkpoint_callback_params.filename",
    "exp_manager.checkpoint_callback_params.model_parallel_size",
    "model.mcore_gpt",
    "model.megatron_amp_O2",
    "model.kto.sft_average_log_probs",
    "model.optim.bucket_cap_mb",
    "model.optim.overlap_grad_sync",
    "model.optim.overlap_param_sync",
    "model.optim.contiguous_grad_buffer",
    "model.optim.contiguous_param_buffer",
    "model.optim.grad_sync_dtype",
    "model.data.data_impl",
    "model.data.splits_string",
    "model.data.skip_warmup",
    "model.data.dataloader_type",
    "model.data.reset_position_ids",
    "model.data.reset_attention_mask",
    "model.data.eod_mask_loss",
    "model.data.index_mapping_dir",
    "model.overwrite_base_config",
    "model.ub_tp_comm_overlap_cfg",
    "model.peft.restore_from_ckpt",
    "model.peft.lora_tuning",
    "precision",
    "name",
)
"""Keys, and everything below them, that change nothing today: documents are packed without padding, Megatron decides
about buffers, checkpoints are named and exported by this package."""

NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "trainer.precision": ((32, "32", "32-true", "fp32"), "Use 32; bf16 comes with a later version."),
    "model.sequence_parallel": ((False,), "Sequence parallelism comes with a later version."),
    "model.virtual_pipeline_model_parallel_size": ((None, 1), "The interleaved pipeline comes with a later version."),
    "model.context_parallel_size": ((1,), "Context parallelism comes with a later version."),
    "model.expert_model_parallel_size": ((1,), "Expert parallelism comes with a later version."),
    "model.peft.peft_scheme": ((None, "none"), "LoRA comes with a later version; set it to none."),
    "model.peft.restore_from_path": ((None,), "LoRA comes with a later version."),
    "model.kto.sft_loss_weight": ((0, 0.0), "An SFT term comes with a later version; set it to 0."),
    "model.kto.preference_loss_weight": ((1, 1.0), "Only the KTO loss exists, with weight 1; scale model.optim.lr."),
    "model.kto.gt_reward_scale": ((1, 1.0), "Ground-truth rewards are not part of KTO; leave it out."),
    "model.data.data_prefix.test": ((None, []), "Nothing is evaluated on a test split yet; leave it out."),
    "exp_manager.resume_from_checkpoint": ((None,), "A run resumes from its own newest checkpoint; leave it out."),
}
"""Keys of later features -> the values that are accepted, and what to write instead of others."""


def take_legacy_keys(
    flat: dict[str, Any], *, is_known: Callable[[str], bool]
) -> tuple[dict[str, Any], list[str]]:
    """Return `flat` without NeMo-Aligner's keys, renamed ones under their new name, and the keys that were ignored.

    Args:
        flat: Dotted key -> value.
        is_known: Whether a dotted key is one of today's.

    Raises:
        ConfigError: A key of a feature that does not exist yet has a value that would need it.
    """
    kept: dict[str, Any] = {}
    ignored = []
    for key, value in flat.items():
        if key in NEUTRAL:
            accepted, advice = NEUTRAL[key]
            if value not in accepted:
                raise ConfigError(f"{key}={value} is not available in this version. {advice}")
            if is_known(key):
                kept[key] = value
        elif key in RENAMED:
            if value is not None:
                kept[RENAMED[key]] = value
        elif any(key == prefix or key.startswith(prefix + ".") for prefix in IGNORED_PREFIXES):
            ignored.append(key)
        elif key == "model.optim.name" and value == "distributed_fused_adam":
            ignored.append(key)
        else:
            kept[key] = value
    return kept, ignored
