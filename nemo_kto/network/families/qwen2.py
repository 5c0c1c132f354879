"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values, and sliding windows if asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.family import Dimensions, Family, sliding_window
from nemo_kto.network.weight_rules import Rule


def fields(hf: Any) -> dict[str, Any]:
    """Return Megatron's fields."""
    return {"add_qkv_bias": True, **sliding_window(hf)}


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes, bias=True)
    yield from tables.feed_forward(sizes)


FAMILY = Family(weights=weights, fields=fields)
