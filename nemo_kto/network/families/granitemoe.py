"""Granite 3 MoE: Granite with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nemo_kto.network import tables
from nemo_kto.network.families import granite, mixtral
from nemo_kto.network.family import Dimensions
from nemo_kto.network.weight_rules import Rule

_NAMES = tables.ExpertNames(
    router=["block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"],
    together=[
        ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
        ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    ],
)


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes)
    yield from tables.experts(sizes, _NAMES)


FAMILY = replace(granite.FAMILY, weights=weights, mixture=mixtral.mixture, feed_forward_adapters=False)
