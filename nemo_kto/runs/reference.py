"""What a configuration means for adapters and for the reference policy, checked before any process is started."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemo_kto.config.folders import log_directory, model_folder
from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.batches.datamodule import KTODataModule
from nemo_kto.data.batches.reference_cache import ReferenceCache
from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.kto.reference import CacheSettings, ReferenceSettings
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.family import own_fields
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.projections import (
    WHOLE,
    LoRASettings,
    adapted_modules,
    fits_pattern,
    layers_with,
    projections_of,
)
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runs.model import base_format_of
from nemo_kto.weights.adapter_config import is_adapter, read_adapter_settings
from nemo_kto.weights.folder import listed, weights_digest
from nemo_kto.weights.import_hf import check_weights
from nemo_kto.weights.peft_adapter import check_adapter, check_projections

logger = logging.getLogger(__name__)

_IRRELEVANT = (
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "dtype",
    "initializer_range",
    "output_router_logits",
    "router_aux_loss_coef",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Fields of a Hugging Face configuration that do not change what is computed from the weights here."""


def lora_settings(config: KTOConfig, hf_config: PretrainedConfig) -> LoRASettings | None:
    """Return the adapters of the run; None if the whole model is trained.

    Raises:
        ConfigError: The model cannot have them, or the adapter to go on from is of another kind.
        CheckpointError: The adapter to go on from cannot be used.
    """
    if config.model.peft.peft_scheme != "lora":
        return None
    lora, num_layers = config.model.peft.lora_tuning, hf_config.num_hidden_layers
    chosen = range(1, num_layers + 1) if lora.layer_selection is None else lora.layer_selection
    strange = [layer for layer in chosen if not 1 <= layer <= num_layers]
    if strange or not chosen:
        raise ConfigError(
            f"model.peft.lora_tuning.layer_selection={lora.layer_selection} must name layers from 1 to {num_layers}."
        )
    projections = projections_of(lora.target_modules, hf_config)
    layers = layers_with(projections, hf_config)
    without = [str(layer) for layer in chosen if layer - 1 not in layers]
    if without and lora.layer_selection is not None:
        raise ConfigError(
            f"model.peft.lora_tuning.layer_selection={lora.layer_selection}: {listed(without, 'layers')} have linear "
            f"attention, and so none of {listed(projections)}. Leave them out."
        )
    settings = LoRASettings(
        projections=projections,
        layers=tuple(layer for layer in layers if layer + 1 in chosen),
        rank=lora.adapter_dim,
        alpha=lora.adapter_dim if lora.alpha is None else lora.alpha,
        rslora=lora.rslora,
        dora=lora.dora,
        whole=tuple(name for name in WHOLE if name in (lora.modules_to_save or ())),
        dropout=lora.adapter_dropout,
        base=base_format_of(config),
        rank_pattern=lora.rank_pattern or {},
        alpha_pattern=lora.alpha_pattern or {},
    )
    check_projections(settings, hf_config)
    _check_patterns(settings, hf_config)
    if settings.whole and dimensions_of(hf_config).tied:
        raise ConfigError(
            f"model.peft.lora_tuning.modules_to_save=[{', '.join(settings.whole)}]: the output layer of this model is "
            "its embedding (tie_word_embeddings), of which PEFT would make two. Leave it out, or train the whole "
            "model."
        )
    if lora.restore_from_path is not None:
        check_adapter(Path(lora.restore_from_path), settings, hf_config)
    return settings


def _check_patterns(settings: LoRASettings, hf_config: PretrainedConfig) -> None:
    """Raise a ConfigError for a pattern that no module with adapters has a name for."""
    modules = list(adapted_modules(settings, hf_config).values())
    for key, patterns in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        for pattern in patterns:
            if not any(fits_pattern(pattern, module) for module in modules):
                raise ConfigError(
                    f"model.peft.lora_tuning.{key}: no module that gets adapters is called {pattern}. They are called "
                    f"{modules[0]} and the like."
                )


def reference_settings(
    config: KTOConfig, hf_config: PretrainedConfig, lora: LoRASettings | None, *, accelerator: str
) -> ReferenceSettings:
    """Return which reference the run has and how it is held, and log why; for `cached`, `cache_settings` has the rest.

    Args:
        config: The configuration.
        hf_config: The model's configuration.
        lora: The adapters of the run.
        accelerator: "cpu" or "gpu".

    Raises:
        ConfigError: The reference is another architecture, or an adapter without there being adapters.
        CheckpointError: Its folder cannot be used.
    """
    keys = config.model.kto.reference
    folder = Path(keys.checkpoint) if keys.checkpoint else None
    other_model = other_adapter = None
    if folder is not None and is_adapter(folder):
        if lora is None:
            raise ConfigError(
                f"model.kto.reference.checkpoint={folder} is an adapter, which needs model.peft.peft_scheme=lora. "
                "Name a Hugging Face model."
            )
        check_adapter(folder, lora, hf_config)
        other_adapter = folder
    elif folder is not None:
        _check_same_architecture(folder, hf_config)
        other_model = folder
    mode, reason = keys.mode, "as configured"
    if mode == "auto":
        mode, reason = _choose(accelerator, adapters=lora is not None, model=other_model, adapter=other_adapter)
    if other_model is not None and mode != "cached" and lora is not None and lora.base is not None:
        raise ConfigError(
            f"model.kto.reference.checkpoint={folder} is another model, which cannot be exchanged for weights kept in "
            f"{config.model.peft.quantize_base}. Set model.kto.reference.mode=cached: it is scored before training."
        )
    if is_global_rank_zero():
        logger.info("Reference: %s, %s", mode, reason)
    return ReferenceSettings(
        mode=mode,
        model_folder=other_model,
        adapter_folder=other_adapter,
        sync_every=keys.sync_every_n_steps,
        sync_alpha=keys.sync_mixup_alpha,
    )


def _choose(accelerator: str, *, adapters: bool, model: Path | None, adapter: Path | None) -> tuple[str, str]:
    """Return (mode, reason) for `auto`; `model` and `adapter` are folders of a reference of its own."""
    if adapters and model is None and adapter is None:
        return "adapter_off", "as the base model is there once the adapters are off"
    if adapter is not None:
        return "resident", "as only adapters have to be kept"
    if accelerator == "cpu":
        return "resident", "as on a CPU all weights are in the same memory"
    return "cpu_swap", "to leave the GPU's memory to training"


def cache_settings(
    config: KTOConfig,
    hf_config: PretrainedConfig,
    reference: ReferenceSettings,
    data: KTODataModule,
    tokenizer: PreTrainedTokenizerBase,
) -> CacheSettings:
    """Return where the log-probs of a cached reference are kept and what they are computed from.

    Args:
        config: The configuration.
        hf_config: The model's configuration.
        reference: What `reference_settings` returned.
        data: The data, prepared.
        tokenizer: Its tokenizer.

    Raises:
        ConfigError: The folder holds log-probs that were computed from something else.
        CheckpointError: The folder holds something else.
    """
    folder = reference.model_folder or model_folder(config)
    adapter, model, seed = reference.adapter_folder, config.model, config.model.seed
    random_weights = None if folder is not None else f"{seed} {model.init_method_std}"
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    key = {
        "reference model": weights_digest(hf_config, folder),
        "reference adapter": None if adapter is None else weights_digest(None, adapter),
        "scale of the reference adapter": None if adapter is None else _scale(read_adapter_settings(adapter)),
        "model.seed and init_method_std": random_weights,
        "trainer.precision": config.trainer.precision,
        # only where there is one, so that older caches keep their key
        **({} if (base := base_format_of(config)) is None else {"model.peft.quantize_base": base}),
        **({} if (images := data.images_digest) is None else {"image processor": images}),
        "model.kto.preference_average_log_probs": model.kto.preference_average_log_probs,
        "tokenizer": hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest(),
        "model.data.append_eod": model.data.append_eod,
        "model.data.seq_length": model.data.seq_length,
        **{f"{split} data": data.digest(split) if split in data.splits else None for split in ("train", "validation")},
    }
    log_dir = log_directory(config)
    result = CacheSettings(folder=Path(model.kto.reference.cache_dir or log_dir / "reference").absolute(), key=key)
    ReferenceCache(result.folder, key=key, num_samples={}).check()
    return result


def _scale(settings: LoRASettings) -> Any:
    """Return all that the scales of adapters come from, as JSON."""
    whole = settings.scale_of("")
    patterns = [dict(settings.rank_pattern), dict(settings.alpha_pattern)]
    if not any(patterns):
        return whole
    return [settings.rank, settings.alpha, settings.rslora, *patterns]


def _check_same_architecture(folder: Path, hf_config: PretrainedConfig) -> None:
    """Raise unless `folder` is a model that differs from the one that is trained by its weights only."""
    try:
        theirs, ours = load_hf_config(folder).to_dict(), hf_config.to_dict()
    except CheckpointError as error:
        raise CheckpointError(f"model.kto.reference.checkpoint: {error}") from error
    different = [
        f"{name} ({theirs.get(name)}, not {ours.get(name)})"
        for name in sorted(own_fields(hf_config) - set(_IRRELEVANT))
        if not name.endswith("_token_id") and theirs.get(name) != ours.get(name)
    ]
    if different:
        raise ConfigError(
            f"model.kto.reference.checkpoint={folder} has another architecture than the model that is trained: "
            f"{', '.join(different)}."
        )
    check_weights(folder, hf_config)
