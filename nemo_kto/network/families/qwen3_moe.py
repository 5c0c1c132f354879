"""Qwen3-MoE: Qwen3 with mixtures of experts where `mlp_only_layers` and `decoder_sparse_step` put them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.families import qwen3
from nemo_kto.network.family import Dimensions, Mixture
from nemo_kto.network.weight_rules import Rule


def mixture(hf: Any) -> Mixture | None:
    """Return the mixtures of experts."""
    sparse_layers = tuple(
        layer
        for layer in range(hf.num_hidden_layers)
        if layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0
    )
    if not hf.num_experts or not sparse_layers:
        return None
    return Mixture(
        experts=hf.num_experts,
        chosen=hf.num_experts_per_tok,
        feed_forward=hf.moe_intermediate_size,
        sparse_layers=sparse_layers,
        normalized=hf.norm_topk_prob,
    )


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from qwen3.FAMILY.weights(sizes)
    yield from tables.experts(sizes, tables.ExpertNames.of("mlp", "gate_proj", "up_proj", "down_proj"))


FAMILY = replace(qwen3.FAMILY, weights=weights, mixture=mixture, feed_forward_adapters=False)
