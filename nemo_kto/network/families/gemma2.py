"""Gemma 2: norms around attention and feed-forward part, to whose weights one is added; caps of scores and logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.family import Dimensions, Family, Refusals, sliding_window, unlike_llama
from nemo_kto.network.weight_rules import Rule


def fields(hf: Any) -> dict[str, Any]:
    """Return the fields of the model's configuration."""
    return {
        "layernorm_zero_centered_gamma": True,
        "norms_after": True,
        "embedding_multiplier": hf.hidden_size**0.5,
        "embedding_multiplier_is_rounded": True,
        "softmax_scale": hf.query_pre_attn_scalar**-0.5,
        "attention_cap": hf.attn_logit_softcapping,
        "logits_cap": hf.final_logit_softcapping,
        **sliding_window(hf),
    }


def unsupported(hf: Any) -> Refusals:
    """Return what cannot be expressed, also attention to tokens to come."""
    found = unlike_llama(hf)
    if hf.use_bidirectional_attention:
        found["use_bidirectional_attention"] = (True, "Tokens see those before them only.")
    return found


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes)
    yield from tables.feed_forward(sizes, norm="pre_feedforward_layernorm")
    yield from tables.norms_after(
        sizes, attention="post_attention_layernorm", feed_forward="post_feedforward_layernorm"
    )


FAMILY = Family(weights=weights, fields=fields, unsupported=unsupported)
