"""Attention with caps and sinks against softmax attention written out, values, gradients and memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nemo_kto.algorithms.attention import Scoring, attend, attend_newest

HEADS, GROUPS, CHANNELS = 4, 2, 8
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
SCORINGS = {
    "plain": Scoring(scale=0.4),
    "cap": Scoring(scale=0.9, cap=1.5),
    "window": Scoring(scale=0.4, window=5),
    "window and cap": Scoring(scale=0.9, window=0, cap=1.5),
}
scorings = pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
with_and_without_sinks = pytest.mark.parametrize("sinks", [None, SINKS], ids=["no sinks", "sinks"])


def document(length: int, *, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return random query, key and value `[heads, n, d]`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, length, CHANNELS) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def expected(parts: list[torch.Tensor], scoring: Scoring, sinks: torch.Tensor | None) -> torch.Tensor:
    """Return what transformers' eager attention of Gemma 2 and gpt-oss computes."""
    query, key, value = parts
    key, value = (part.repeat_interleave(HEADS // GROUPS, dim=0) for part in (key, value))
    scores = query @ key.mT * scoring.scale
    if scoring.cap is not None:
        scores = torch.tanh(scores / scoring.cap) * scoring.cap
    distance = torch.arange(scores.shape[1])[:, None] - torch.arange(scores.shape[1])
    hidden = (distance < 0) if scoring.window is None else (distance < 0) | (distance > scoring.window)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], dim=-1)
    shares = scores.softmax(-1)
    return (shares if sinks is None else shares[..., :-1]) @ value


@scorings
@with_and_without_sinks
@pytest.mark.parametrize("memory", [1, 2000, 2**20])  # a token at a time, a few, all
def test_output_and_gradients_are_those_of_the_written_out_form(
    scoring: Scoring, sinks: torch.Tensor | None, memory: int
) -> None:
    leaves: list[Any] = document(23)
    doubles: list[Any] = [part.detach().double().requires_grad_() for part in leaves]
    mine = theirs = None
    if sinks is not None:
        mine, theirs = sinks.clone().requires_grad_(), sinks.double().requires_grad_()
    direction = torch.randn(HEADS, 23, CHANNELS, generator=torch.Generator().manual_seed(1))
    output, wanted = attend(*leaves, scoring, mine, memory=memory), expected(doubles, scoring, theirs)
    torch.testing.assert_close(output.double(), wanted, rtol=0, atol=2e-6)
    if sinks is not None:
        leaves, doubles = [*leaves, mine], [*doubles, theirs]
    found = torch.autograd.grad(output, leaves, direction)
    for one, other in zip(found, torch.autograd.grad(wanted, doubles, direction.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5)


@scorings
@with_and_without_sinks
def test_the_newest_token_attends_as_in_the_whole_document(scoring: Scoring, sinks: torch.Tensor | None) -> None:
    """Two documents of 9 and 5 tokens; what is behind the shorter one is not seen."""
    parts = [part.detach() for part in document(9)]
    visible = torch.zeros(2, 9, dtype=torch.bool)
    for place, length in enumerate((9, 5)):
        visible[place, max(0, length - 1 - (9 if scoring.window is None else scoring.window)) : length] = True
    query = torch.stack([parts[0][:, 8], parts[0][:, 4]])
    keys, values = (torch.stack([part, part]) for part in parts[1:])
    keys[1, :, 5:] = values[1, :, 5:] = 1e4
    found = attend_newest(query, keys, values, visible, scoring, sinks)
    wanted = expected(parts, scoring, sinks)
    torch.testing.assert_close(found, torch.stack([wanted[:, 8], wanted[:, 4]]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_with_and_without_gradients(dtype: torch.dtype) -> None:
    parts, scoring = document(30, dtype=dtype), SCORINGS["cap"]
    with_gradients = attend(*parts, scoring, SINKS, memory=4000)
    with torch.no_grad():
        without = attend(*parts, scoring, SINKS, memory=4000)
    assert with_gradients.requires_grad and with_gradients.dtype == dtype
    assert torch.equal(with_gradients, without)
    wanted = expected([part.float() for part in parts], scoring, SINKS)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-6  # bfloat16 has 8 bits
    torch.testing.assert_close(without.float(), wanted, rtol=0, atol=tolerance)


def test_scores_are_not_kept() -> None:
    """Queries, keys, values, and a number for each query."""
    kept: list[int] = []
    parts = document(64)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attend(*parts, SCORINGS["cap"])
    assert sum(kept) == sum(part.numel() for part in parts) + HEADS * 64
