"""gpt-oss: mixtures with biases and a clamped activation; attention with sinks, in windows on every other layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.families import mixtral
from nemo_kto.network.family import Dimensions, Family, Mixture, Refusals, sliding_window, unlike_llama
from nemo_kto.network.weight_rules import Rule

_ALPHA = 1.702
"""That of Megatron's `quick_gelu`: `x * sigmoid(1.702 * x)`."""

_LIMIT = 7.0
"""What gate and up are clamped to where nothing is said; transformers 5.8 has no fields for it and for the slope."""

_NAMES = tables.ExpertNames(
    router=["mlp.router.weight"],
    together=[("mlp.experts.gate_up_proj", "mlp.experts.down_proj")],
    alternating=True,
)


def mixture(hf: Any) -> Mixture:
    """Return the mixture of experts."""
    return replace(mixtral.mixture(hf), biased=True)


def fields(hf: Any) -> dict[str, Any]:
    """Return the fields of the model's configuration."""
    return {
        "softmax_type": "learnable",
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": getattr(hf, "swiglu_limit", _LIMIT),
        **sliding_window(hf),
    }


def unsupported(hf: Any) -> Refusals:
    """Return what cannot be expressed, also another slope of the activation."""
    found = unlike_llama(hf)
    alpha, limit = getattr(hf, "swiglu_alpha", _ALPHA), getattr(hf, "swiglu_limit", _LIMIT)
    if alpha != _ALPHA:
        found["swiglu_alpha"] = (alpha, f"Megatron's activation has {_ALPHA}.")
    if not limit > 0:
        found["swiglu_limit"] = (limit, "Gate and up are clamped to it.")
    return found


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes)
    yield from tables.sinks(sizes)
    yield from tables.experts(sizes, _NAMES)


FAMILY = Family(
    weights=weights,
    fields=fields,
    mixture=mixture,
    unsupported=unsupported,
    activation="quick_gelu",
    feed_forward_adapters=False,
)
