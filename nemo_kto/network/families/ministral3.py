"""Ministral 3, its language model: Mistral whose queries have a factor that grows with their position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_kto.network.families import mistral
from nemo_kto.network.family import Refusals, unlike_llama


def unsupported(hf: Any) -> Refusals:
    """Return what cannot be expressed, also factors of which something is not said."""
    found = unlike_llama(hf)
    rope = dict(hf.rope_parameters or {})
    for name in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        if rope.get(name) is None:
            found[f"rope_parameters.{name}"] = (None, "The factors of queries follow from it.")
    return found


FAMILY = replace(mistral.FAMILY, unsupported=unsupported, rotary_scales_queries=True, part_of=("mistral3",))
