"""MiniMax-M2: mixtures chosen by sigmoids and a bias; queries and keys normed over all heads, partly rotated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.families import mixtral, qwen3
from nemo_kto.network.family import Dimensions, Family, Mixture
from nemo_kto.network.weight_rules import Rule

_NAMES = replace(
    tables.ExpertNames.of("block_sparse_moe", "w1", "w3", "w2"),
    bias=["block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"],
)


def mixture(hf: Any) -> Mixture:
    """Return the mixture of experts."""
    return replace(mixtral.mixture(hf), scores="sigmoid", chosen_with_bias=True)


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes)
    yield from tables.experts(sizes, _NAMES)


FAMILY = Family(
    weights=weights,
    mixture=mixture,
    unsupported=mixtral.unsupported,
    head_norms=qwen3.head_norms,
    norms_of_all_heads=True,
    feed_forward_adapters=False,
    partial_rotary=True,
)
