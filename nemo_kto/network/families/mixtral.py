"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.family import Dimensions, Family, Mixture, Refusals, sliding_window, unlike_llama
from nemo_kto.network.weight_rules import Rule


def mixture(hf: Any) -> Mixture:
    """Return the mixture of experts."""
    return Mixture(
        experts=hf.num_local_experts,
        chosen=hf.num_experts_per_tok,
        feed_forward=hf.intermediate_size,
        sparse_layers=tuple(range(hf.num_hidden_layers)),
        normalized=True,
    )


def unsupported(hf: Any) -> Refusals:
    """Return what cannot be expressed, also the noise that transformers makes in the router while it trains."""
    found = unlike_llama(hf)
    if hf.router_jitter_noise > 0:
        found["router_jitter_noise"] = (hf.router_jitter_noise, "Policy and reference have to be routed alike.")
    return found


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes)
    yield from tables.experts(sizes, tables.ExpertNames.of("block_sparse_moe", "w1", "w3", "w2"))


FAMILY = Family(
    weights=weights,
    fields=sliding_window,
    mixture=mixture,
    unsupported=unsupported,
    feed_forward_adapters=False,
)
