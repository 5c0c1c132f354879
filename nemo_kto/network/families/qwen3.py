"""Qwen3: Llama with normed queries and keys, and sliding windows if asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_kto.network.families import llama
from nemo_kto.network.family import sliding_window


def head_norms(hf: Any) -> bool:
    """Return that queries and keys are normed."""
    return True


FAMILY = replace(llama.LIKE, fields=sliding_window, head_norms=head_norms)
