"""What is impossible about adapters, as far as it is known without their model; see `checks.py`."""

from __future__ import annotations

import math
import re
from typing import Any

from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError

_PREFIX = "model.peft.lora_tuning."


def check_lora(config: KTOConfig) -> None:
    """Raise a ConfigError for adapters that cannot be."""
    lora = config.model.peft.lora_tuning
    if config.model.peft.peft_scheme != "lora":
        if config.export.merge_adapters:
            raise ConfigError("export.merge_adapters=true needs model.peft.peft_scheme=lora.")
        if lora.restore_from_path is not None:
            raise ConfigError(
                f"{_PREFIX}restore_from_path={lora.restore_from_path} needs model.peft.peft_scheme=lora."
            )
        for name in ("dora", "modules_to_save"):  # which ask for more than other ranks or scales would
            if getattr(lora, name):
                raise ConfigError(f"{_PREFIX}{name} needs model.peft.peft_scheme=lora.")
        return
    if config.pretrained_checkpoint.restore_from_path is None:
        raise ConfigError(
            "model.peft.peft_scheme=lora needs a trained model: set pretrained_checkpoint.restore_from_path to its "
            "Hugging Face folder."
        )
    if lora.alpha is not None and lora.alpha <= 0:
        raise ConfigError(f"{_PREFIX}alpha={lora.alpha} must be above 0.")
    if not 0 <= lora.adapter_dropout < 1:
        raise ConfigError(f"{_PREFIX}adapter_dropout={lora.adapter_dropout} must be at least 0 and below 1.")
    for name in ("rank_pattern", "alpha_pattern"):
        fault = fault_of_patterns(getattr(lora, name) or {}, ranks=name == "rank_pattern")
        if fault is not None:
            raise ConfigError(f"{_PREFIX}{name} {fault}. It takes a mapping such as {{q_proj: 16}}; see docs/lora.md.")


def check_vision(config: KTOConfig) -> None:
    """Raise a ConfigError for what sees images being trained where it cannot be, as far as the model is not needed."""
    key = f"model.vision.train={config.model.vision.train}"
    if config.model.vision.train == "none":
        return
    if config.model.peft.peft_scheme == "lora":
        raise ConfigError(
            f"{key} cannot be used with model.peft.peft_scheme=lora, which trains adapters of the language model. Use "
            "none, or peft_scheme=none."
        )
    if config.pretrained_checkpoint.restore_from_path is None:
        raise ConfigError(
            f"{key} needs a model that sees images: set pretrained_checkpoint.restore_from_path to its Hugging Face "
            "folder."
        )


def check_quantisation(config: KTOConfig) -> None:
    """Raise a ConfigError for a base in fewer bits that cannot be: only what is never changed is kept so."""
    peft, reference = config.model.peft, config.model.kto.reference
    if peft.double_quantization and peft.quantize_base != "nf4":
        raise ConfigError(
            "model.peft.double_quantization=true needs model.peft.quantize_base=nf4, whose scales it quantises."
        )
    if config.export.merge_into_original and not (peft.quantize_base and config.export.merge_adapters):
        raise ConfigError(
            "export.merge_into_original=true needs model.peft.quantize_base and export.merge_adapters=true: it says "
            "into which weights adapters are merged."
        )
    if peft.quantize_base is None:
        return
    key = f"model.peft.quantize_base={peft.quantize_base}"
    if peft.peft_scheme != "lora":
        raise ConfigError(
            f"{key} needs model.peft.peft_scheme=lora: weights in so few bits cannot be trained, only adapters beside "
            "them."
        )
    if reference.mode == "cpu_swap":
        raise ConfigError(
            f"{key} cannot be used with model.kto.reference.mode=cpu_swap, which is for weights that are exchanged. "
            "Use auto: the reference is the model without its adapters, or with others."
        )


def fault_of_patterns(patterns: Any, *, ranks: bool) -> str | None:
    """Return what is wrong with a `rank_pattern` or `alpha_pattern` of PEFT, to go on after its name.

    Args:
        patterns: What stands there.
        ranks: Whether its values are ranks rather than alphas.
    """
    if not isinstance(patterns, dict):
        return f"is {patterns!r}, no mapping"
    for pattern, value in patterns.items():
        try:
            re.compile(rf"(.*\.)?({pattern})$")  # as it is looked for, see `projections.fits_pattern`
        except (re.error, TypeError) as error:
            return f"has the key {pattern!r}, which is no regular expression ({error})"
        is_number = isinstance(value, int if ranks else int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            return f"has {value!r} for {pattern!r}, which is no {'whole number' if ranks else 'number'} above 0"
    return None
