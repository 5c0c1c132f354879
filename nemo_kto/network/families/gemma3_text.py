"""Gemma 3 without its eyes: Gemma 2 with normed queries and keys, two rotary embeddings, and no cap of the scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_kto.network.families import gemma2, qwen3
from nemo_kto.network.family import whole_of


def fields(hf: Any) -> dict[str, Any]:
    """Return the fields of the model's configuration; transformers does not look at `attn_logit_softcapping` here."""
    return {**gemma2.fields(hf), "attention_cap": None, "images_see_themselves": whole_of(hf) == "gemma3"}


FAMILY = replace(
    gemma2.FAMILY, fields=fields, head_norms=qwen3.head_norms, rotary_by_layer_type=True, part_of=("gemma3",)
)
