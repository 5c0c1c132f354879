"""SmolLM3: Llama without rotary embedding in some layers, every fourth in the published models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_kto.network.families import llama
from nemo_kto.network.family import sliding_window


def fields(hf: Any) -> dict[str, Any]:
    """Return Megatron's fields; its pattern says where there is no rotary embedding, Hugging Face's where there is."""
    rotated = hf.no_rope_layers[: hf.num_hidden_layers]
    return {"no_rope_freq": [1 - has_rotary for has_rotary in rotated], **sliding_window(hf)}


FAMILY = replace(llama.LIKE, fields=fields)
