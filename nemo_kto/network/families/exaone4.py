"""EXAONE 4: OLMo 2 with queries and keys normed by head; where layers have windows, the others no rotary embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_kto.network.families import olmo2
from nemo_kto.network.family import sliding_window


def fields(hf: Any) -> dict[str, Any]:
    """Return the fields of the model's configuration."""
    found = {**olmo2.fields(hf), **sliding_window(hf)}
    if hf.sliding_window is not None:
        found["no_rope_freq"] = [int(kind != "sliding_attention") for kind in hf.layer_types]
    return found


FAMILY = replace(olmo2.FAMILY, fields=fields, norms_of_all_heads=False)
