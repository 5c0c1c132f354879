"""Qwen3.5, its language model: Qwen3-Next without mixtures, whose linear attention has four projections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.families import qwen3_next
from nemo_kto.network.family import Dimensions
from nemo_kto.network.weight_rules import Rule


def mixture(hf: Any) -> None:
    """Return that there are no experts."""


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from tables.outer(sizes)
    yield from tables.attention(sizes)
    yield from tables.delta_net(sizes, by_head=False)
    yield from tables.feed_forward(sizes)


FAMILY = replace(
    qwen3_next.FAMILY,
    weights=weights,
    mixture=mixture,
    feed_forward_adapters=True,
    further_layers=("mtp_num_hidden_layers",),
    part_of=("qwen3_5",),
)
