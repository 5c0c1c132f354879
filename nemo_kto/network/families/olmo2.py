"""OLMo 2: norms behind attention and feed-forward part only; queries and keys normed over all heads together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.families import qwen3
from nemo_kto.network.family import Dimensions, Family
from nemo_kto.network.weight_rules import Rule


def fields(hf: Any) -> dict[str, Any]:
    """Return the fields of the model's configuration."""
    return {"norms_before": False, "norms_after": True}


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes, norm=None)
    yield from tables.feed_forward(sizes, norm=None)
    yield from tables.norms_after(
        sizes, attention="post_attention_layernorm", feed_forward="post_feedforward_layernorm"
    )


FAMILY = Family(weights=weights, fields=fields, head_norms=qwen3.head_norms, norms_of_all_heads=True)
