"""What this package needs of a Hugging Face model's configuration: reading it, checking it, making one from sizes."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from nemo_kto.errors import CheckpointError, ConfigError, git_lfs_hint
from nemo_kto.network import moe, rotary
from nemo_kto.network.families import dimensions_of, family_of, parts_of_wholes
from nemo_kto.network.family import PART_OF, Refusals
from nemo_kto.network.quantised import FIELD, OLDER_FIELD, quantisation_of
from nemo_kto.network.stored import has_own_output_layer, has_weights
from nemo_kto.quiet import is_global_rank_zero

logger = logging.getLogger(__name__)


def load_hf_config(path: str | Path) -> PretrainedConfig:
    """Return the configuration of the Hugging Face model in folder `path`, checked for what Megatron can express.

    As in transformers, a model whose output layer differs from its embedding is not tied, whatever its config.json
    says. The folder need not have weights.

    Raises:
        CheckpointError: `path` is not a folder with a readable `config.json`, or its weights cannot be read.
        ConfigError: The model is of an unsupported architecture or uses an unsupported feature.
    """
    folder = Path(path)
    config = read_hf_config(folder)
    check_hf_config(config)
    if config.tie_word_embeddings and has_weights(folder) and has_own_output_layer(folder):
        _warn_untied(folder)
        config.tie_word_embeddings = False
    return config


def read_hf_config(folder: Path) -> PretrainedConfig:
    """Return what the `config.json` of a folder says, of a supported architecture.

    Of a model that sees images it is the configuration of its language model, see `family.whole_of`. Weights in fewer
    bits are read as plain numbers, see `quantised.py`: it says nothing of them.

    Raises:
        CheckpointError: It cannot be read.
        ConfigError: The model is of an unsupported architecture, or its weights are quantised in another way.
    """
    whole, file = _read(folder), folder / "config.json"
    return _language_model_of(whole, file) if whole.model_type in parts_of_wholes() else whole


def whole_config(folder: str | Path) -> PretrainedConfig | None:
    """Return what the `config.json` of a folder says of a model that sees images, all of it; None for another model.

    Raises:
        CheckpointError: See `read_hf_config`.
        ConfigError: See `read_hf_config`.
    """
    whole = _read(Path(folder))
    return whole if whole.model_type in parts_of_wholes() else None


def _read(folder: Path) -> PretrainedConfig:
    """Return what the `config.json` of a folder says, see `read_hf_config`, of all of the model."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json. Name the folder of a Hugging Face model.")
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
        named = SimpleNamespace(model_type=keys.get("model_type"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a JSON object: {error}.{git_lfs_hint(file)}") from error
    if named.model_type not in parts_of_wholes():
        if not family_of(named, file).alone:  # before transformers: it may not know the architecture either
            raise ConfigError(
                f"{file}: a {named.model_type} is the language model of {family_of(named).part_of[0]}, and "
                "transformers has no model of it alone. Use the folder of the whole model."
            )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its checks of single fields raise classes with no common base
        text = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"{file} cannot be read by transformers ({type(error).__name__}: {text}).") from error
    if quantisation_of(keys, file) is not None:
        _take_out_quantisation(config)
    return config


def _take_out_quantisation(config: PretrainedConfig) -> None:
    """Take out of a configuration, and of its language model's, what says how weights are stored in fewer bits."""
    for part in (config, getattr(config, "text_config", None)):
        for field in (FIELD, OLDER_FIELD):
            if part is not None and hasattr(part, field):
                delattr(part, field)


def _language_model_of(whole: PretrainedConfig, file: Path) -> PretrainedConfig:
    """Return the configuration of the language model of one that sees images, with what is said of the whole."""
    config: PretrainedConfig = whole.text_config
    if config.model_type not in parts_of_wholes()[whole.model_type]:
        raise ConfigError(
            f"{file}: the architecture {config.model_type!r} of the language model of {whole.model_type!r} is not "
            f"supported. Supported are: {', '.join(parts_of_wholes()[whole.model_type])}."
        )
    if getattr(config, "quantization_config", None) is None and hasattr(whole, "quantization_config"):
        config.quantization_config = whole.quantization_config
    for name in ("name_or_path", "architectures", "dtype", "tie_word_embeddings"):
        setattr(config, name, getattr(whole, name))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(whole, name, None) is not None:
            setattr(config, name, getattr(whole, name))
    setattr(config, PART_OF, whole.model_type)
    return config


@functools.cache
def _warn_untied(folder: Path) -> None:
    """Say once what is read otherwise than it is written."""
    if is_global_rank_zero():
        logger.warning(
            "%s: config.json says tie_word_embeddings, but the output layer's weights differ from the embedding's. "
            "They are two matrices then, as in transformers; what is exported says so in its config.json.",
            folder,
        )


def check_hf_config(config: PretrainedConfig) -> None:
    """Raise a ConfigError that names the field when Megatron-Core cannot express the model of `config`."""
    source = getattr(config, "name_or_path", "") or "the model's configuration"
    family = family_of(config, source)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{source}: quantised weights cannot be trained. Use the model's unquantised folder.")
    # transformers 5.8 knows nothing of it, and would leave it out; in later ones each configuration has it
    differ = getattr(config, "is_heterogeneous", bool(getattr(config, "per_layer_config", None)))
    if differ:
        raise ConfigError(f"{source}: per_layer_config is not supported, as layers that differ in size are not.")
    if getattr(config, "transformers_weights", None) is not None:
        raise ConfigError(f"{source}: transformers_weights is not supported. Call the file model.safetensors.")
    mixture = family.mixture(config)
    refusals: Refusals = {
        **family.unsupported(config),
        **rotary.unsupported_fields(config),
        **(moe.unsupported_fields(mixture, config) if mixture is not None else {}),
    }
    for field, (value, reason) in refusals.items():
        raise ConfigError(
            f"{source}: {field} is not supported with the value {value!r} in a model of the architecture "
            f"{config.model_type!r}. {reason}"
        )
    try:
        rotary.RotaryEmbedding(config, dimensions_of(config).head_channels)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{source}: no rotary embedding can be computed from rope_parameters={rotary.rope_parameters(config)} "
            f"({error!r}). Correct config.json."
        ) from error


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
        ConfigError: The heads do not divide the hidden size, or the key/value heads the heads.
    """
    if kv_channels is None and hidden_size % num_attention_heads:
        raise ConfigError(
            f"model.hidden_size={hidden_size} cannot be divided by model.num_attention_heads={num_attention_heads}. "
            "Choose a multiple, or give the channels of a head in model.kv_channels."
        )
    if num_attention_heads % (num_query_groups or num_attention_heads):
        raise ConfigError(
            f"model.num_attention_heads={num_attention_heads} cannot be divided by model.num_query_groups="
            f"{num_query_groups}. Choose a divisor."
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
