"""Phi-3 and Phi-4: Llama whose projections are fused, with a rotary embedding of a share of each head's channels."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_kto.network import tables
from nemo_kto.network.family import Dimensions, Family, sliding_window
from nemo_kto.network.weight_rules import Rule


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes, fused="qkv_proj")
    yield from tables.feed_forward(sizes, fused="gate_up_proj")


FAMILY = Family(
    weights=weights,
    fields=sliding_window,
    projections=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    partial_rotary=True,
)
