"""Which model a configuration means, and in which dtype and on what it is computed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.batches.datamodule import KTODataModule
from nemo_kto.errors import ConfigError
from nemo_kto.network.family import whole_of
from nemo_kto.network.hf_config import hf_config_from_sizes, load_hf_config, whole_config
from nemo_kto.network.megatron_config import Recompute
from nemo_kto.network.vision import PROJECTORS, VisionSettings, can_see
from nemo_kto.runs.data import highest_token_id
from nemo_kto.weights.import_hf import check_weights
from nemo_kto.weights.model_card import read_facts

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


def accelerator_of(config: KTOConfig) -> str:
    """Return "cpu" or "gpu" for `trainer.accelerator`."""
    wanted = config.trainer.accelerator
    if wanted == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    if wanted == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu, but no CUDA device is visible. Use cpu or auto.")
    return wanted


def params_dtype_of(config: KTOConfig) -> torch.dtype:
    """Return the dtype of parameters and activations for `trainer.precision`; the optimizer's is always float32."""
    return PARAMS_DTYPES[config.trainer.precision]


def dtype_of_run(source: Path) -> torch.dtype:
    """Return the dtype that the run of a checkpoint computed in; see `checkpoint_model.source_of`."""
    precision = read_facts(source).get("config", {}).get("trainer", {}).get("precision", 32)
    return PARAMS_DTYPES[precision]


def base_format_of(config: KTOConfig) -> str | None:
    """Return in which format frozen weights beside adapters are kept: a key of `quantised_weight.FORMATS`, or None."""
    peft = config.model.peft
    return f"{peft.quantize_base}_double" if peft.double_quantization else peft.quantize_base


def hf_config_of(config: KTOConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Return the Hugging Face configuration of the model: of the folder, or from the sizes in `model`.

    Raises:
        ConfigError: Sizes contradict the folder, or are incomplete.
        CheckpointError: The folder is no usable model.
    """
    sizes = {name: getattr(config.model, name) for name in _SIZES}
    given = {name: value for name, value in sizes.items() if value is not None}
    folder = config.pretrained_checkpoint.restore_from_path
    if folder is None:
        hf_config = hf_config_from_sizes(
            vocab_size=highest_token_id(tokenizer) + 1,  # the tokenizer may leave out some below
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **given,
        )
        hf_config.dtype = params_dtype_of(config)  # so a checkpoint is exported as the run itself would
        return hf_config
    if given:
        raise ConfigError(
            f"{', '.join('model.' + name for name in given)}: the sizes come from "
            f"pretrained_checkpoint.restore_from_path={folder}. Leave these keys out, or restore_from_path."
        )
    hf_config = load_hf_config(folder)
    trains = config.model.vision.train != "none"  # else a folder need not have what sees images, for data of text
    check_weights(Path(folder), hf_config, vision=vision_of(config, hf_config) if trains else None)
    return hf_config


def vision_of(config: KTOConfig, hf_config: PretrainedConfig) -> VisionSettings | None:
    """Return what sees images in the model, and what is trained of it; None for a model that takes none here.

    Raises:
        ConfigError: It is to be trained, and is not there.
    """
    train, folder = config.model.vision.train, config.pretrained_checkpoint.restore_from_path
    if can_see(hf_config):
        assert folder is not None, "a model with random weights sees nothing"
        whole = whole_config(folder)
        assert whole is not None
        return VisionSettings(config=whole, train=train)
    if train != "none":
        raise ConfigError(
            f"model.vision.train={train}: a {whole_of(hf_config) or hf_config.model_type}, as in {folder}, cannot be "
            f"given images. Supported are {', '.join(PROJECTORS)}. Leave the key out."
        )
    return None


def vision_to_plan(config: KTOConfig, hf_config: PretrainedConfig) -> VisionSettings | None:
    """Return what sees images in a model that is planned for, whose folder may have its config.json only, or not."""
    folder = config.pretrained_checkpoint.restore_from_path
    known = folder is not None and (Path(folder) / "config.json").is_file()
    return vision_of(config, hf_config) if known and can_see(hf_config) else None


def vision_for(
    config: KTOConfig, hf_config: PretrainedConfig, data: KTODataModule, *, trains: bool
) -> VisionSettings | None:
    """Return what sees images in a run; None where there are none to be seen, which spares its memory.

    Args:
        config: The configuration.
        hf_config: The model's.
        data: The data, prepared.
        trains: Whether there is something to train; else what was trained has to be there.

    Raises:
        ConfigError: It is to be trained, and cannot, or there are none.
    """
    if data.has_images or (config.model.vision.train != "none" and not trains):
        vision, folder = vision_of(config, hf_config), config.pretrained_checkpoint.restore_from_path
        if vision is not None and folder is not None:
            check_weights(Path(folder), hf_config, vision=vision)
        return vision
    if config.model.vision.train != "none":
        raise ConfigError(
            f"model.vision.train={config.model.vision.train}, and no record of the data has an image. Leave the key "
            "out."
        )
    return None


def recompute_of(config: KTOConfig) -> Recompute | None:
    """Return what the backward pass computes again; `parse_config` has checked that the keys fit together."""
    settings = config.model
    if settings.activations_checkpoint_granularity is None:
        return None
    return Recompute(
        granularity=settings.activations_checkpoint_granularity,
        method=settings.activations_checkpoint_method,
        num_layers=settings.activations_checkpoint_num_layers,
    )
