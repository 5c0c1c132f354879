"""Which projections of a model have adapters, by the names that NeMo, PEFT and Hugging Face give them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from nemo_kto.errors import ConfigError
from nemo_kto.network.families import dimensions_of, family_of
from nemo_kto.network.family import Dimensions, whole_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Value = TypeVar("Value")

LINEAR_OF = {
    "q_proj": "self_attention.linear_qkv",
    "k_proj": "self_attention.linear_qkv",
    "v_proj": "self_attention.linear_qkv",
    "q_a_proj": "self_attention.linear_q_down_proj",
    "q_b_proj": "self_attention.linear_q_up_proj",
    "kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
    "kv_b_proj": "self_attention.linear_kv_up_proj",
    "o_proj": "self_attention.linear_proj",
    "gate_proj": "mlp.linear_fc1",
    "up_proj": "mlp.linear_fc1",
    "down_proj": "mlp.linear_fc2",
    "qkv_proj": "self_attention.linear_qkv",
    "gate_up_proj": "mlp.linear_fc1",
    "c_fc": "mlp.linear_fc1",
    "c_proj": "mlp.linear_fc2",
}
"""Projection, by its name in Hugging Face -> Megatron's linear layer that it is, or is part of; see `linear_of`."""

_LATENT_QUERIES = "self_attention.linear_q_proj"
_OUTPUT = "self_attention.linear_proj"
_ALL = (*dict.fromkeys(LINEAR_OF.values()), _LATENT_QUERIES)
_QKV = tuple(name for name in _ALL if name.startswith("self_attention.") and name != _OUTPUT)

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projection that returns several parts of a linear layer -> those parts, in their order."""


WHOLE = ("embed_tokens", "lm_head")
"""Embedding and output layer, by their names in Hugging Face, which can be trained whole beside adapters."""

_GROUPS = {
    "attention_qkv": _QKV,
    "attention_dense": (_OUTPUT,),
    "mlp_fc1": ("mlp.linear_fc1",),
    "mlp_fc2": ("mlp.linear_fc2",),
    "attention": (*_QKV, _OUTPUT),
    "mlp": ("mlp.linear_fc1", "mlp.linear_fc2"),
    "all": _ALL,
}
"""NeMo's names of target modules -> linear layers."""


def parts_of(name: str) -> tuple[str, ...]:
    """Return the parts of Megatron's linear layer that a projection, or that of adapters, returns, in its order."""
    projection = name.rpartition("-")[2]
    return _FUSED.get(projection, (projection,))


def projections_of_model(hf_config: PretrainedConfig) -> tuple[str, ...]:
    """Return the projections of a model's layers."""
    projections = family_of(hf_config).projections
    return ordered(projections(hf_config) if callable(projections) else projections)


def linear_of(projection: str, sizes: Dimensions) -> str:
    """Return the linear layer that a projection of a model is, or is part of."""
    if projection == "q_proj" and sizes.latent is not None:
        return _LATENT_QUERIES
    return LINEAR_OF[projection]


def place_in_layer(projection: str, layer: int, sizes: Dimensions) -> tuple[str, str]:
    """Return (Megatron's linear layer, name of the adapters beside it) for a projection of a layer.

    In a layer of experts those of the feed-forward part are the shared expert's. Hugging Face has it as a module in
    the mixture, whose name and a hyphen are in front of the adapters' then.
    """
    linear, mixture = linear_of(projection, sizes), sizes.mixture
    if mixture is None or mixture.shared is None or layer not in mixture.sparse_layers or linear[:4] != "mlp.":
        return linear, projection
    return linear.replace("mlp.", "mlp.shared_experts."), f"{mixture.shared.name}-{projection}"


def module_of(projection: str, layer: int, hf_config: PretrainedConfig) -> str:
    """Return what a projection of a layer is called in the Hugging Face model, which PEFT's patterns match."""
    linear, name = place_in_layer(projection, layer, dimensions_of(hf_config))
    block = "self_attn" if linear.startswith("self_attention.") else "mlp"
    model = "model" if whole_of(hf_config) is None else "model.language_model"
    return f"{model}.layers.{layer}.{block}.{name.replace('-', '.')}"


def has_projection(projection: str, layer: int, sizes: Dimensions) -> bool:
    """Return whether a layer has a projection of the model's; one of linear attention has none for attention."""
    return not LINEAR_OF[projection].startswith("self_attention.") or layer in sizes.attention_layers


def layers_with(projections: Iterable[str], hf_config: PretrainedConfig) -> tuple[int, ...]:
    """Return the numbers of the layers, from 0, that have any of these projections of a model."""
    sizes, names = dimensions_of(hf_config), list(projections)
    return tuple(layer for layer in range(sizes.layers) if any(has_projection(name, layer, sizes) for name in names))


def linear_layers(hf_config: PretrainedConfig) -> dict[str, tuple[str, ...]]:
    """Return Megatron's linear layers of a transformer layer -> the parts their rows are made of, in their order."""
    layers: dict[str, tuple[str, ...]] = {}
    sizes = dimensions_of(hf_config)
    for projection in projections_of_model(hf_config):
        name = linear_of(projection, sizes)
        layers[name] = (*layers.get(name, ()), *parts_of(projection))
    return layers


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Which projections have adapters, and of what kind.

    Attributes:
        projections: Hugging Face's names, in the order of `LINEAR_OF`.
        layers: Numbers of the layers, from 0, ascending.
        rank: Rows of A and columns of B.
        alpha: The adapters' output is multiplied by alpha / rank, or alpha / sqrt(rank) with `rslora`.
        rslora: See `alpha` (arXiv 2312.03732).
        dropout: Probability with which the adapters do not see an input channel of a token in training.
        base: In which format the frozen weights of linear layers are kept: a key of `quantised_weight.FORMATS`; None
            for plain numbers.
        rank_pattern: The end of a module's name, or a regular expression for it -> its `rank`; the first that fits.
        alpha_pattern: The same -> its `alpha`.
        dora: Whether the length of each row of a weight is trained as well (arXiv 2402.09353).
        whole: Which of `WHOLE` are trained whole besides, in their order.
    """

    projections: tuple[str, ...]
    layers: tuple[int, ...]
    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    base: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dora: bool = False
    whole: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's adapters; see `module_of`."""
        return _first_of(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the alpha of a module's adapters."""
        return _first_of(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """Return what the output of a module's adapters is multiplied by."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)


def adapted_modules(
    settings: LoRASettings, hf_config: PretrainedConfig, layers: Iterable[int] | None = None
) -> dict[tuple[int, str], str]:
    """Return (layer, projection) -> name of each module that has adapters, of some layers or of all."""
    sizes = dimensions_of(hf_config)
    return {
        (layer, projection): module_of(projection, layer, hf_config)
        for layer in settings.layers
        if layers is None or layer in layers
        for projection in settings.projections
        if has_projection(projection, layer, sizes)
    }


def fits_pattern(pattern: str, module: str) -> bool:
    """Return whether a pattern means a module, as PEFT has it (`peft.utils.other.get_pattern_key`)."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _first_of(patterns: Mapping[str, Value], module: str, otherwise: Value) -> Value:
    return next((value for pattern, value in patterns.items() if fits_pattern(pattern, module)), otherwise)


def projections_of(target_modules: Iterable[str], hf_config: PretrainedConfig) -> tuple[str, ...]:
    """Return the projections of a model that NeMo's or PEFT's names of target modules mean.

    Raises:
        ConfigError: The model has none of a name, or there is no name.
    """
    known, sizes = projections_of_model(hf_config), dimensions_of(hf_config)
    chosen: set[str] = set()
    for name in target_modules:
        if name in _GROUPS:
            chosen.update(projection for projection in known if linear_of(projection, sizes) in _GROUPS[name])
        elif name in known:
            chosen.add(name)
        else:
            raise ConfigError(
                f"model.peft.lora_tuning.target_modules: {name} is unknown. Use {', '.join((*_GROUPS, *known))}."
            )
    if not chosen:
        raise ConfigError("model.peft.lora_tuning.target_modules is empty. Name at least one, like attention_qkv.")
    return ordered(chosen)


def ordered(projections: Iterable[str]) -> tuple[str, ...]:
    """Return projections in the order of `LINEAR_OF`."""
    chosen = set(projections)
    return tuple(name for name in LINEAR_OF if name in chosen)
