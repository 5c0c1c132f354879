"""OLMo 3: OLMo 2 with sliding windows in three layers of four, whose rotary embedding is another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_kto.network.families import olmo2
from nemo_kto.network.family import sliding_window


def fields(hf: Any) -> dict[str, Any]:
    """Return the fields of the model's configuration."""
    return {**olmo2.fields(hf), **sliding_window(hf)}


FAMILY = replace(olmo2.FAMILY, fields=fields, rotary_by_layer_type=True)
