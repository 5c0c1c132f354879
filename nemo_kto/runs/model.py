"""Which model a configuration means, and in which dtype and on what it is computed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.batches.datamodule import KTODataModule
from nemo_kto.errors import ConfigError
from nemo_kto.network.hf_config import hf_config_from_sizes, load_hf_config, whole_config
from nemo_kto.network.megatron_config import Recompute
from nemo_kto.network.vision import VisionSettings, can_see
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
    check_weights(Path(folder), hf_config, vision=seeing(Path(folder), hf_config))
    return hf_config


def seeing(folder: Path, hf_config: PretrainedConfig, *, train: str = "none") -> VisionSettings | None:
    """Return what sees images in the model of a folder; None for a model whose images are of no use here.

    Args:
        folder: The folder.
        hf_config: The configuration of its language model.
        train: `model.vision.train`.
    """
    if not can_see(hf_config):
        return None
    whole = whole_config(folder)
    assert whole is not None, folder
    return VisionSettings(config=whole, train=train)


def vision_settings(config: KTOConfig, hf_config: PretrainedConfig, data: KTODataModule) -> VisionSettings | None:
    """Return what sees images in a run; None where there are none to be seen, which spares the memory.

    Raises:
        ConfigError: It is to be trained, and cannot, or there are no images.
    """
    train, folder = config.model.vision.train, config.pretrained_checkpoint.restore_from_path
    if train == "none" and not data.has_images:
        return None
    found = None if folder is None else seeing(Path(folder), hf_config, train=train)
    if train != "none" and found is None:
        raise ConfigError(f"model.vision.train={train}, but the model sees no images. Leave the key out.")
    if train != "none" and not data.has_images:
        raise ConfigError(f"model.vision.train={train}, but the data has no images. Leave the key out.")
    return found


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
