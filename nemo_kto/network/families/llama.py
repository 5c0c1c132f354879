"""Llama 1 to 3, and what is built like it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nemo_kto.network import tables
from nemo_kto.network.family import Dimensions, Family
from nemo_kto.network.weight_rules import Rule


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes)
    yield from tables.feed_forward(sizes)


LIKE = Family(weights=weights)
"""What is built like it varies."""

FAMILY = replace(LIKE, part_of=("llava",))
