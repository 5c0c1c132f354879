"""Whether the checkpoint that a run goes on from, or that is scored, is this run's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.batches.datamodule import KTODataModule
from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.kto.reference import ReferenceSettings
from nemo_kto.network.projections import LoRASettings
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runtime.checkpoint import IDENTITY_FILE, SOURCE_FOLDER
from nemo_kto.weights.checkpoint_model import TRAINED_OF_VISION
from nemo_kto.weights.folder import weights_digest

logger = logging.getLogger(__name__)

_IMAGES = "image processor"

_DIGESTED = (
    _IMAGES,
    "pretrained_checkpoint.restore_from_path",
    "model.data.data_prefix.train",
    "model.kto.reference.checkpoint",
    "model.peft.lora_tuning.restore_from_path",
)
"""Keys whose digests tell a reader nothing."""

_OBJECTIVE = (
    "loss",
    "ref_policy_kl_penalty",
    "desirable_loss_weight",
    "undesirable_loss_weight",
    "kl_scope",
    "kl_fraction",
    "loss_reduction",
    "preference_average_log_probs",
    "humanline_clamp",
    "sft_loss_weight",
    "sft_average_log_probs",
)
"""Keys of `model.kto` that say what is optimised."""


def run_identity(
    config: KTOConfig,
    hf_config: PretrainedConfig,
    data: KTODataModule,
    *,
    lora: LoRASettings | None,
    reference: ReferenceSettings,
) -> dict[str, Any]:
    """Return what has to stay the same for a resumed run to be the one that was stopped: key -> value or digest.

    The layout, the micro-batch size (unless the objective depends on it), how the reference is held, the length of the
    run and the optimizer's settings may change.
    """
    model, kto = config.model, config.model.kto
    depends_on_micro_batch = kto.kl_scope == "micro_batch" or model.moe_aux_loss_coeff > 0
    return {
        **_objective_identity(config),
        **_model_identity(config, hf_config, lora=lora, reference=reference),
        "model.moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "model.micro_batch_size": model.micro_batch_size if depends_on_micro_batch else None,
        "model.data.data_prefix.train": data.digest("train", weights=True),
        _IMAGES: data.images_digest,
        "model.data.shuffle": config.model.data.shuffle,
        "model.global_batch_size": config.model.global_batch_size,
        "model.seed": config.model.seed,  # of the data's order too
        "trainer.precision": config.trainer.precision,
        "trainer.kto.limit_train_batches": config.trainer.kto.limit_train_batches,
    }


def contents(identity: dict[str, Any]) -> dict[str, Any]:
    """Return of a run's identity what says which files it was given: what they are -> digest."""
    return {f"what {key} holds (a digest)": identity[key] for key in _DIGESTED}


def _objective_identity(config: KTOConfig) -> dict[str, Any]:
    return {f"model.kto.{name}": getattr(config.model.kto, name) for name in _OBJECTIVE}


def _model_identity(
    config: KTOConfig, hf_config: PretrainedConfig, *, lora: LoRASettings | None, reference: ReferenceSettings
) -> dict[str, Any]:
    """Return what says which model is trained and which reference it is compared with."""
    folder = config.pretrained_checkpoint.restore_from_path
    return {
        **_reference_identity(reference),
        **_lora_identity(config, lora),
        TRAINED_OF_VISION: None if config.model.vision.train == "none" else config.model.vision.train,
        "model.init_method_std": None if folder else config.model.init_method_std,
        "model.seed": None if folder else config.model.seed,
        "pretrained_checkpoint.restore_from_path": weights_digest(hf_config, Path(folder) if folder else None),
    }


def _reference_identity(reference: ReferenceSettings) -> dict[str, Any]:
    folder = reference.model_folder or reference.adapter_folder
    return {
        "model.kto.reference.checkpoint": None if folder is None else weights_digest(None, folder),
        "model.kto.reference.sync_every_n_steps": reference.sync_every,
        "model.kto.reference.sync_mixup_alpha": reference.sync_alpha if reference.sync_every else None,
    }


def _lora_identity(config: KTOConfig, lora: LoRASettings | None) -> dict[str, Any]:
    start = config.model.peft.lora_tuning.restore_from_path
    prefix = "model.peft.lora_tuning."
    return {
        "model.peft.peft_scheme": "none" if lora is None else "lora",
        f"{prefix}target_modules": None if lora is None else list(lora.projections),
        f"{prefix}adapter_dim": None if lora is None else lora.rank,
        f"{prefix}alpha": None if lora is None else lora.alpha,
        f"{prefix}adapter_dropout": None if lora is None else lora.dropout,
        f"{prefix}layer_selection": None if lora is None else [layer + 1 for layer in lora.layers],
        f"{prefix}rslora": None if lora is None else lora.rslora,
        "model.peft.quantize_base": None if lora is None else lora.base,
        f"{prefix}dora": True if lora is not None and lora.dora else None,
        f"{prefix}modules_to_save": None if lora is None else list(lora.whole) or None,
        f"{prefix}rank_pattern": None if lora is None else dict(lora.rank_pattern) or None,
        f"{prefix}alpha_pattern": None if lora is None else dict(lora.alpha_pattern) or None,
        f"{prefix}restore_from_path": None if lora is None or start is None else weights_digest(None, Path(start)),
    }


def write_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write `identity` into the folder that every checkpoint gets a copy of."""
    (folder / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def check_same_run(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raise when `checkpoint` was not written by the run of `identity`.

    Raises:
        CheckpointError: The checkpoint does not say which run it is of.
        ConfigError: It is of another run; the message names the key.
    """
    difference = _difference(_read_identity(checkpoint), identity)
    if difference is not None:
        raise ConfigError(
            f"{checkpoint} was written with another {difference}; what follows would not be the same run. Set it "
            "as it was, or name another folder in exp_manager.explicit_log_dir."
        )


def check_scored_like_trained(
    checkpoint: Path,
    config: KTOConfig,
    hf_config: PretrainedConfig,
    *,
    lora: LoRASettings | None,
    reference: ReferenceSettings,
) -> None:
    """Raise when `checkpoint` is of another model than the configuration, or was compared with another reference.

    Where only the objective is another, it is said.

    Raises:
        CheckpointError: The checkpoint does not say which run it is of.
        ConfigError: It is of another model or reference; the message names the key.
    """
    found = _read_identity(checkpoint)
    model = _model_identity(config, hf_config, lora=lora, reference=reference)
    if model["model.seed"] is None:  # weights come from a folder; the seed of the order of data tells nothing here
        del model["model.seed"]
    difference = _difference(found, model)
    if difference is not None:
        raise ConfigError(
            f"{checkpoint} was trained with another {difference}; its rewards would be wrong. Set it as it was."
        )
    objective = _objective_identity(config)
    if config.model.kto.kl_scope == "micro_batch":
        objective["model.micro_batch_size"] = config.model.micro_batch_size
    for key, value in objective.items():
        if found.get(key) != value and is_global_rank_zero():
            logger.warning("%s=%s, but the checkpoint was trained with %s.", key, value, found.get(key))


def _read_identity(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / SOURCE_FOLDER / IDENTITY_FILE
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} does not say which run it is of ({error}).") from error
    return found


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Return the first key whose value is another, with both values if they tell something; None if all are equal."""
    for key, value in wanted.items():
        if found.get(key) != value:
            return key if key in _DIGESTED else f"{key} ({found.get(key)}, now {value})"
    return None
