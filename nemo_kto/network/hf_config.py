"""What this package needs of a Hugging Face model's configuration: reading it, checking it, making one from sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.network import moe
from nemo_kto.runtime.layout import ModelSizes

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
_SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")


def load_hf_config(path: str | Path) -> PretrainedConfig:
    """Return the configuration of the Hugging Face model in folder `path`, checked for what Megatron can express.

    Raises:
        CheckpointError: `path` is not a folder with a readable `config.json`.
        ConfigError: The model is of an unsupported architecture or uses an unsupported feature.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json. Name the folder of a Hugging Face model.")
    try:
        model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a JSON object: {error}.") from error
    _check_model_type(model_type, file)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # its checks of single fields raise classes with no common base
        raise CheckpointError(f"{file} cannot be read by transformers: {error}") from error
    check_hf_config(config)
    return config


def check_hf_config(config: PretrainedConfig) -> None:
    """Raise a ConfigError that names the field when Megatron-Core cannot express the model of `config`."""
    source = getattr(config, "name_or_path", "") or "the model's configuration"
    _check_model_type(config.model_type, source)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{source}: quantised weights cannot be trained. Use the model's unquantised folder.")
    unsupported = {
        "attention_bias": bool(getattr(config, "attention_bias", False)),  # biased o_proj: no Megatron field
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "hidden_act": config.hidden_act != "silu",
        "rope_parameters.rope_type": rope_parameters(config).get("rope_type", "default") not in _SUPPORTED_ROPE_TYPES,
        "partial_rotary_factor": rope_parameters(config).get("partial_rotary_factor", 1.0) != 1.0,
        **moe.unsupported_fields(config),
    }
    for field, found in unsupported.items():
        if found:
            value = getattr(config, field.split(".")[0], None)
            raise ConfigError(
                f"{source}: {field} is not supported with the value {value!r}. Supported are models without attention "
                f"output and feed-forward biases, hidden_act=silu, rope types {', '.join(_SUPPORTED_ROPE_TYPES)}, and "
                "experts chosen without noise, two or more for each token where their probabilities are normalised."
            )


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Return the rotary embedding's parameters; transformers 4 kept them in `rope_scaling` and `rope_theta`."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"rope_theta": getattr(config, "rope_theta", 10000.0), **found}


def hf_config_from_sizes(
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    vocab_size: int,
    max_position_embeddings: int,
    num_query_groups: int | None = None,
    kv_channels: int | None = None,
    rotary_base: float = 10000.0,
    layernorm_epsilon: float = 1e-5,
    share_embeddings_and_output_weights: bool = False,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> PretrainedConfig:
    """Return the Llama configuration of a model given by sizes, so that it takes every later step of a loaded one.

    Args:
        num_layers: Number of transformer layers.
        hidden_size: Channels of the hidden states.
        ffn_hidden_size: Channels inside the feed-forward layers.
        num_attention_heads: Query heads.
        vocab_size: Number of tokens, unpadded.
        max_position_embeddings: Longest document, in tokens.
        num_query_groups: Key/value heads; None for one per query head.
        kv_channels: Channels of a head; None for hidden_size / num_attention_heads.
        rotary_base: Base of the rotary embedding's wavelengths.
        layernorm_epsilon: Epsilon of the RMS norms.
        share_embeddings_and_output_weights: Whether the output layer is the embedding.
        bos_token_id: The tokenizer's first token of a text, if it has one.
        eos_token_id: The tokenizer's last token of a text, where generation stops.

    Raises:
        ConfigError: The heads do not divide the hidden size.
    """
    if kv_channels is None and hidden_size % num_attention_heads:
        raise ConfigError(
            f"model.hidden_size={hidden_size} cannot be divided by model.num_attention_heads={num_attention_heads}. "
            "Choose a multiple, or give the channels of a head in model.kv_channels."
        )
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=ffn_hidden_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_query_groups or num_attention_heads,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        head_dim=kv_channels or hidden_size // num_attention_heads,
        rope_theta=rotary_base,
        rms_norm_eps=layernorm_epsilon,
        tie_word_embeddings=share_embeddings_and_output_weights,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )


def _check_model_type(model_type: str | None, source: str | Path) -> None:
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"{source}: the architecture {model_type!r} is not supported. "
            f"Supported are: {', '.join(SUPPORTED_MODEL_TYPES)}."
        )


def model_sizes(hf: PretrainedConfig) -> ModelSizes:
    """Return the sizes that decide how a model can be divided."""
    sparse = moe.expert_layers(hf)
    return ModelSizes(
        num_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        ffn_hidden_size=None if all(sparse) else hf.intermediate_size,
        num_experts=moe.num_experts(hf),
        expert_layers=[layer for layer, is_sparse in enumerate(sparse) if is_sparse],
        expert_ffn_hidden_size=moe.expert_ffn_hidden_size(hf),
    )
