"""Granite 3: Llama whose embedding, scores, residual stream and logits have multipliers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_kto.network.families import llama


def fields(hf: Any) -> dict[str, Any]:
    """Return the fields of the model's configuration."""
    return {
        "embedding_multiplier": hf.embedding_multiplier,
        "softmax_scale": hf.attention_multiplier,
        "residual_multiplier": hf.residual_multiplier,
        "logits_multiplier": 1 / hf.logits_scaling,
    }


FAMILY = replace(llama.LIKE, fields=fields)
