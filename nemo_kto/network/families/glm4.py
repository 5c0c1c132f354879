"""GLM-4 (0414): norms around attention and feed-forward part, and neighbouring channels of half a head rotated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.family import Biases, Dimensions, Family
from nemo_kto.network.weight_rules import Rule


def fields(hf: Any) -> dict[str, Any]:
    """Return the fields of the model's configuration."""
    return {"norms_after": True, "rotary_interleaved": True}


def biases(hf: Any) -> Biases:
    """Return the biases, of queries, keys and values only."""
    return Biases(inputs=bool(hf.attention_bias))


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes)
    yield from tables.feed_forward(sizes, fused="gate_up_proj")
    yield from tables.norms_after(sizes, attention="post_self_attn_layernorm", feed_forward="post_mlp_layernorm")


FAMILY = Family(
    weights=weights,
    fields=fields,
    biases=biases,
    projections=("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    partial_rotary=True,
)
