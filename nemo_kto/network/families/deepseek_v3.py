"""DeepSeek-V3 and Moonlight: latent attention, mixtures chosen by sigmoids and a bias, first layers dense."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.families import glm4_moe
from nemo_kto.network.family import Biases, Dimensions, Family, Latent, Refusals, unlike_llama
from nemo_kto.network.weight_rules import Rule


def latent(hf: Any) -> Latent:
    """Return the sizes of latent attention."""
    return Latent(
        queries=hf.q_lora_rank,
        keys_and_values=hf.kv_lora_rank,
        plain=hf.qk_nope_head_dim,
        rotated=hf.qk_rope_head_dim,
        values=hf.v_head_dim,
    )


def fields(hf: Any) -> dict[str, Any]:
    """Return the fields of the model's configuration; with YaRN scores have a factor (arXiv 2309.00071, eq. 22)."""
    rope, factor = dict(hf.rope_parameters), 1.0
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim") and rope["factor"] > 1:
        factor = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1
    return {
        "rotary_interleaved": bool(hf.rope_interleave),
        "softmax_scale": factor * factor * latent(hf).scored ** -0.5,
    }


def biases(hf: Any) -> Biases:
    """Return the biases, of the layers that compress and of the one behind attention."""
    return Biases(inputs=bool(hf.attention_bias), output=bool(hf.attention_bias))


def unsupported(hf: Any) -> Refusals:
    """Return what cannot be expressed, also heads that share keys, which they do otherwise already."""
    found = unlike_llama(hf)
    if hf.num_key_value_heads != hf.num_attention_heads:
        found["num_key_value_heads"] = (hf.num_key_value_heads, "Each head has keys of its own.")
    return found


def projections(hf: Any) -> tuple[str, ...]:
    """Return the projections, of attention and of dense feed-forward parts."""
    queries = ("q_proj",) if hf.q_lora_rank is None else ("q_a_proj", "q_b_proj")
    return (*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.latent_attention(sizes)
    yield from tables.feed_forward(sizes)
    yield from tables.experts(sizes, tables.ExpertNames.of("mlp", "gate_proj", "up_proj", "down_proj"))


FAMILY = Family(
    weights=weights,
    fields=fields,
    mixture=glm4_moe.mixture,
    latent=latent,
    biases=biases,
    unsupported=unsupported,
    projections=projections,
    feed_forward_adapters=False,
    further_layers=("num_nextn_predict_layers", "num_mtp_layers"),
)
