"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with mixtures of experts, each with a shared expert behind a gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.families import qwen2, qwen3_moe
from nemo_kto.network.family import Biases, Dimensions, Mixture, SharedExpert
from nemo_kto.network.weight_rules import Rule


def mixture(hf: Any) -> Mixture | None:
    """Return the mixtures of experts, which are where those of Qwen3-MoE are."""
    found = qwen3_moe.mixture(hf)
    return None if found is None else replace(found, shared=shared_expert(hf))


def shared_expert(hf: Any) -> SharedExpert:
    """Return the expert of each mixture that all tokens go through."""
    return SharedExpert(
        name="shared_expert", feed_forward=hf.shared_expert_intermediate_size, gate="shared_expert_gate"
    )


def biases(hf: Any) -> Biases:
    """Return the biases of queries, keys and values."""
    return Biases(inputs=bool(hf.qkv_bias))


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from qwen2.FAMILY.weights(sizes)
    yield from tables.experts(sizes, tables.ExpertNames.of("mlp", "gate_proj", "up_proj", "down_proj"))


FAMILY = replace(qwen2.LIKE, weights=weights, mixture=mixture, biases=biases)
