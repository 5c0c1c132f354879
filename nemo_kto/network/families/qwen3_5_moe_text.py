"""Qwen3.5's mixtures, their language model: Qwen3.5 with the experts of Qwen3-Next in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.families import qwen2_moe, qwen3_5_text
from nemo_kto.network.family import Dimensions, Mixture
from nemo_kto.network.weight_rules import Rule


def mixture(hf: Any) -> Mixture:
    """Return the mixtures of experts."""
    return Mixture(
        experts=hf.num_experts,
        chosen=hf.num_experts_per_tok,
        feed_forward=hf.moe_intermediate_size,
        sparse_layers=tuple(range(hf.num_hidden_layers)),
        normalized=True,
        shared=qwen2_moe.shared_expert(hf),
    )


def feed_forward(hf: Any) -> int:
    """Return the channels of a shared expert: no layer is dense, and Megatron wants a number."""
    return int(hf.shared_expert_intermediate_size)


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes)
    yield from tables.delta_net(sizes, by_head=False)
    yield from tables.experts(sizes, tables.ExpertNames.of("mlp", "gate_proj", "up_proj", "down_proj"))


FAMILY = replace(
    qwen3_5_text.FAMILY, weights=weights, mixture=mixture, feed_forward=feed_forward, part_of=("qwen3_5_moe",)
)
