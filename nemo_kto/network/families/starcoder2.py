"""StarCoder2: LayerNorms, biases everywhere, a feed-forward part that is not gated, sliding windows if asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.family import Biases, Dimensions, Family, sliding_window
from nemo_kto.network.weight_rules import Rule


def fields(hf: Any) -> dict[str, Any]:
    """Return the fields of the model's configuration."""
    return {"gated_linear_unit": False, "layernorm_epsilon": hf.norm_epsilon, **sliding_window(hf)}


def biases(hf: Any) -> Biases:
    """Return the biases: all or none."""
    biased = bool(hf.use_bias)
    return Biases(inputs=biased, output=biased, feed_forward=biased)


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes)
    yield from tables.plain_feed_forward(sizes, up="c_fc", down="c_proj")


FAMILY = Family(
    weights=weights,
    fields=fields,
    biases=biases,
    layer_norms=True,
    projections=("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
)
