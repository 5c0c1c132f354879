"""Lengths of the rows of a matrix to which a product of low rank is added, without that sum being there as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

_NUMBERS = 1 << 23
"""Most numbers of the matrix that are there in float32 at a time: 32 MiB."""


@torch.no_grad()
def row_squares(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """Return the sum of squares of each row of `weight + scale * B A`: `[g * o]` float64.

    Elements are float32, their sums float64. So lengths, rounded to float32, are the same however the columns are
    divided among ranks that add up their sums, but for a row in many millions.

    Args:
        weight: `[g, o, i]`, groups of rows.
        lora_a: `[r, i]`.
        lora_b: `[g, o, r]`.
        scale: What their product is multiplied by.
    """
    _, rows, inputs = weight.shape
    inner = lora_a.float()
    groups_at_once, rows_at_once = max(_NUMBERS // (rows * inputs), 1), max(_NUMBERS // inputs, 1)
    squares = []
    for weights, outer in zip(torch.split(weight, groups_at_once), torch.split(lora_b, groups_at_once), strict=True):
        pieces = [torch.split(each.flatten(0, 1), rows_at_once) for each in (weights, outer)]
        for some, its_outer in zip(*pieces, strict=True):
            changed = torch.addmm(some.float(), its_outer.float(), inner, alpha=scale)
            squares.append(changed.square_().sum(-1, dtype=torch.float64))
    return torch.cat(squares)
