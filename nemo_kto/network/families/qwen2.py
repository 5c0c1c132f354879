"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values, and sliding windows if asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_kto.network.families import llama
from nemo_kto.network.family import Biases, sliding_window


def biases(hf: Any) -> Biases:
    """Return the biases it always has."""
    return Biases(inputs=True)


LIKE = replace(llama.LIKE, fields=sliding_window, biases=biases)
"""What is built like it varies."""

FAMILY = replace(LIKE, part_of=("llava",))
