"""Qwen3-Next: three of four layers have linear attention, the others gates; mixtures as in Qwen2-MoE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.families import qwen2_moe, qwen3
from nemo_kto.network.family import Delta, Dimensions, Family, Refusals, unlike_llama
from nemo_kto.network.weight_rules import Rule

_KINDS = ("linear_attention", "full_attention")


def delta(hf: Any) -> Delta | None:
    """Return the layers of linear attention."""
    layers = tuple(layer for layer, kind in enumerate(_layer_types(hf)) if kind == _KINDS[0])
    if not layers:
        return None
    return Delta(
        layers=layers,
        key_heads=hf.linear_num_key_heads,
        value_heads=hf.linear_num_value_heads,
        key_channels=hf.linear_key_head_dim,
        value_channels=hf.linear_value_head_dim,
        window=hf.linear_conv_kernel_dim,
    )


def _layer_types(hf: Any) -> list[str]:
    """Return the kind of each layer; published folders say only how often one has attention that is not linear."""
    kinds: list[str] | None = getattr(hf, "layer_types", None)
    if kinds is None:
        every = getattr(hf, "full_attention_interval", 4)
        kinds = [_KINDS[not (layer + 1) % every] for layer in range(hf.num_hidden_layers)]
    return kinds


def fields(hf: Any) -> dict[str, Any]:
    """Return the fields of the model's configuration."""
    return {"layernorm_zero_centered_gamma": True}


def unsupported(hf: Any) -> Refusals:
    """Return what cannot be expressed, also value heads that do not go with key heads."""
    found = unlike_llama(hf)
    if not set(_layer_types(hf)) <= set(_KINDS):
        found["layer_types"] = (hf.layer_types, f"Supported are {' and '.join(_KINDS)}.")
    if hf.hidden_act not in ("silu", "swish"):
        found["hidden_act"] = (hf.hidden_act, "The convolution of linear attention has silu.")
    if hf.linear_num_value_heads % hf.linear_num_key_heads:
        reason = f"A multiple of linear_num_key_heads={hf.linear_num_key_heads} is needed."
        found["linear_num_value_heads"] = (hf.linear_num_value_heads, reason)
    return found


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes)
    yield from tables.delta_net(sizes, by_head=True)
    yield from tables.feed_forward(sizes)
    yield from tables.experts(sizes, tables.ExpertNames.of("mlp", "gate_proj", "up_proj", "down_proj"))


FAMILY = Family(
    weights=weights,
    fields=fields,
    mixture=qwen2_moe.mixture,
    delta=delta,
    output_gates=True,
    unsupported=unsupported,
    head_norms=qwen3.head_norms,
    feed_forward_adapters=False,
    partial_rotary=True,
    further_tensors="mtp.",
)
