"""NeMo-Aligner's keys: renamed, meaningless today, or of features that do not exist yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_kto.errors import ConfigError

RENAMED = {
    "model.encoder_seq_length": "model.data.seq_length",
    "model.kto.preference_loss": "model.kto.loss",
    "model.peft.restore_from_path": "model.peft.lora_tuning.restore_from_path",
    "precision": "trainer.precision",
    "trainer.gradient_clip_val": "trainer.kto.gradient_clip_val",
    "trainer.limit_train_batches": "trainer.kto.limit_train_batches",
    "trainer.limit_val_batches": "trainer.kto.limit_val_batches",
    "trainer.max_epochs": "trainer.kto.max_epochs",
    "trainer.max_steps": "trainer.kto.max_steps",
    "trainer.max_time": "exp_manager.max_time_per_run",
    "trainer.val_check_interval": "trainer.kto.val_check_interval",
}
"""Old key -> the key that takes its value."""

IGNORED = (
    "trainer.logger",
    "trainer.enable_checkpointing",
    "trainer.use_distributed_sampler",
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
    "model.optim.bucket_cap_mb",
    "model.optim.contiguous_grad_buffer",
    "model.optim.contiguous_param_buffer",
    "model.optim.grad_sync_dtype",
    "model.data.data_prefix.test",
    "model.data.skip_warmup",
    "model.data.dataloader_type",
    "model.data.index_mapping_dir",
    "model.overwrite_base_config",
    "model.ub_tp_comm_overlap_cfg",
    "model.peft.lora_tuning.column_init_method",
    "model.peft.lora_tuning.position_embedding_strategy",
    "model.peft.lora_tuning.row_init_method",
    "name",
)
"""Keys, with everything below them, that change nothing today: Megatron decides about buffers, checkpoints are named
and the model is exported by this package, training reads no test split."""

IGNORED_VALUES = {"model.optim.name": ("fused_adam", "megatron_fused_adam")}
"""Known keys -> old values that mean today's default."""

ABSENT = {
    "model.optim.name": {
        "muon": "Megatron's Muon works with whole matrices, and refuses the optimizer whose state is divided among "
        "processes and read under every layout. Take adam."
    },
    "model.optim.states": {
        "int8": "Eight bits need a scale for each block of numbers, and which numbers share a block would depend on "
        "the layout, and with it the result. Take bfloat16, or model.optim.offload_fraction."
    },
}
"""Known keys -> values that others have there -> why they are not here, and what is."""

_ADAPTER_FOLDER = "Name a folder with a PEFT adapter in model.peft.lora_tuning.restore_from_path."
_ONE_DOCUMENT = "Every sample is a document of its own here; leave it out."
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "model.peft.restore_from_ckpt.checkpoint_dir": ((None,), _ADAPTER_FOLDER),
    "model.peft.restore_from_ckpt.checkpoint_name": ((None,), _ADAPTER_FOLDER),
    "model.peft.lora_tuning.weight_tying": ((False,), "Every layer has adapters of its own; leave it out."),
    "model.kto.preference_loss_weight": ((1,), "The KTO loss is all there is, with weight 1; scale model.optim.lr."),
    "model.kto.gt_reward_scale": ((1,), "Ground-truth rewards are not part of KTO; leave it out."),
    "model.data.data_impl": ((None, "json", "jsonl"), "How a file is read follows from its name."),
    "model.data.splits_string": (
        (None,),
        "Name the files of each split in model.data.data_prefix, or set model.data.validation_fraction.",
    ),
    "model.data.reset_position_ids": ((False,), _ONE_DOCUMENT),
    "model.data.reset_attention_mask": ((False,), _ONE_DOCUMENT),
    "model.data.eod_mask_loss": ((False,), "The end of a response is part of it; leave it out."),
    "exp_manager.resume_from_checkpoint": ((None,), "A run resumes from its own newest checkpoint; leave it out."),
}
"""Keys of features that are not there -> the values that are accepted, and what to write instead of others."""


def take_legacy_keys(flat: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return `flat` without NeMo-Aligner's keys, renamed ones under their new name, and the keys that were ignored.

    Args:
        flat: Dotted key -> value.
        defaults: Dotted key -> default of every key of today.

    Raises:
        ConfigError: A value needs a feature that does not exist yet, or an old key contradicts its new name.
    """
    kept = _take_renamed(flat, defaults)
    ignored: dict[str, None] = {}  # a set in order of appearance
    for key, value in list(kept.items()):
        prefix = next((name for name in IGNORED if key == name or key.startswith(name + ".")), None)
        if key in NEUTRAL:
            accepted, advice = NEUTRAL[key]
            if value not in accepted:
                raise ConfigError(f"{key}={value} is not available in this version. {advice}")
            del kept[key]
        elif isinstance(value, str) and value in ABSENT.get(key, ()):
            raise ConfigError(f"{key}={value} is not available in this version. {ABSENT[key][value]}")
        elif prefix is not None:
            ignored[prefix] = None
            del kept[key]
        elif value in IGNORED_VALUES.get(key, ()):
            ignored[f"{key}={value}"] = None
            del kept[key]
    return kept, list(ignored)


def _same(one: Any, other: Any) -> bool:
    """Whether two values mean the same; of a limit, 1 is one batch and 1.0 all of them."""
    return bool(type(one) is type(other) and one == other)


def _take_renamed(flat: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return `flat` with the values of renamed keys under their new names, where those are not set themselves."""
    kept = {key: value for key, value in flat.items() if key not in RENAMED}
    for old, new in RENAMED.items():
        value, default = flat.get(old), defaults[new]
        current = kept.get(new, default)
        if value is None or _same(value, current):
            continue
        if new in kept and not _same(current, default):
            raise ConfigError(f"{old}={value} and {new}={current} contradict each other. Set {new} only.")
        kept[new] = value
    return kept
