"""The gated delta rule (arXiv 2412.06464), and the short convolution before it, over the documents of a packed row.

A head keeps a matrix S, its state, zero before a document's first token. Token t decays it and corrects what it
returns for the token's key (eq. 10):

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T,    o_t = S_t^T q_t

Here documents are cut into chunks, and the corrections of a chunk come from one triangular system (section 3.3): the
number of steps one behind the other is that of chunks. The result has the same bits with and without gradients.

Tensor legend: `T` tokens of a packed row, `b` documents, `i` key heads, `j` value heads, a multiple of `i`: neighbours
share a key head; `x` channels of a query and of a key, `y` of a value, `c` tokens of a chunk, `n`
chunks, `f` channels of the convolution, `w` tokens that it sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk. A fixed number: what a document gives does not depend on the others of its row."""

_EPSILON = 1e-6


def causal_convolution(values: Tensor, weight: Tensor, places: Tensor) -> Tensor:
    """Return `silu` of a sum over each channel's newest `w` tokens of a document, computed in float32.

    Args:
        values: `[T, f]`.
        weight: `[f, w]`, the newest token's last.
        places: `[T]`, the tokens' places in their documents.

    Returns:
        `[T, f]` in the dtype of `values`.
    """
    wide = weight.to(_wide(values))
    total = values * wide[:, -1]
    for back in range(1, min(weight.shape[1], len(values))):
        is_there = (places[back:] >= back)[:, None]
        earlier = torch.where(is_there, values[:-back], 0.0) * wide[:, -1 - back]
        total = total + F.pad(earlier, (0, 0, back, 0))
    return F.silu(total).to(values.dtype)


def convolve_newest(window: Tensor, weight: Tensor) -> Tensor:
    """Return what `causal_convolution` does for the newest token of each document, `[b, f]`.

    Args:
        window: `[b, w, f]`, the document's newest tokens, zeros where it has none.
        weight: `[f, w]`.
    """
    return F.silu((window * weight.to(_wide(window)).T).sum(1)).to(window.dtype)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    lengths: Sequence[int],
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return the outputs `[T, j, y]`, in the dtype of `value`, and the last states of the documents `[b, j, x, y]`.

    It is computed in float32 at least, in which the states are.

    Args:
        query: `[T, i, x]`, here made vectors of length 1/sqrt(x).
        key: `[T, i, x]`, here made unit vectors.
        value: `[T, j, y]`.
        log_decay: `[T, j]`, g, at most 0.
        beta: `[T, j]`, 0 to 1.
        lengths: Tokens of each document, T together.
        chunk: See `CHUNK`.
    """
    query, key = _unit(query, value) * query.shape[-1] ** -0.5, _unit(key, value)
    wide = key.dtype
    query, key, values = (_cut(part.to(wide), lengths, chunk) for part in (query, key, value))
    decays, betas = (_cut(part.to(wide)[..., None], lengths, chunk) for part in (log_decay, beta))

    total = decays.cumsum(2)  # [n, j, c, 1]: the decay since the chunk began
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=key.device).triu(1)
    # masked before exp, which would overflow
    between = (total - total.mT).masked_fill(later, -torch.inf).exp()
    rated = key * betas
    system = rated @ key.mT * between
    wanted = torch.cat([values * betas, rated * total.exp()], dim=-1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    corrections, reads = (part.unbind() for part in solved.split([value.shape[-1], key.shape[-1]], dim=-1))
    within = (query @ key.mT * between).unbind()
    asked, left = (query * total.exp()).unbind(), total[:, :, -1:]
    kept, remaining = (key * (left - total).exp()).mT.unbind(), left.exp().unbind()

    chunks = zip(corrections, reads, within, asked, kept, remaining, strict=True)
    outputs, states = [], []
    for length in lengths:
        state: Tensor | None = None
        for new, read, of_chunk, of_state, keeps, remains in itertools.islice(chunks, -(-length // chunk)):
            if state is None:
                outputs.append(of_chunk @ new)
                state = keeps @ new
            else:
                corrected = new - read @ state
                outputs.append(of_state @ state + of_chunk @ corrected)
                state = remains * state + keeps @ corrected
        assert state is not None, "a document has tokens"
        states.append(state)
    return _joined(torch.stack(outputs), lengths, chunk).to(value.dtype), torch.stack(states)


def delta_rule_step(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the outputs `[b, j, y]` of the newest token of each document, and the states after it `[b, j, x, y]`.

    Args:
        query: `[b, i, x]`, see `gated_delta_rule`.
        key: `[b, i, x]`.
        value: `[b, j, y]`.
        log_decay: `[b, j]`.
        beta: `[b, j]`.
        states: `[b, j, x, y]`, those before it.
    """
    query, key = _unit(query, value) * query.shape[-1] ** -0.5, _unit(key, value)
    states = states * log_decay.to(states).exp()[..., None, None]
    found = (states.mT @ key[..., None])[..., 0]
    correction = (value.to(states) - found) * beta.to(states)[..., None]
    states = states + key[..., None] * correction[..., None, :]
    return (states.mT @ query[..., None])[..., 0].to(value.dtype), states


def repeated(shared: Tensor, value: Tensor) -> Tensor:
    """Return queries or keys `[T, i, x]` once for each of the value heads that share them, `[T, j, x]`."""
    return shared.repeat_interleave(value.shape[1] // shared.shape[1], dim=1)


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _unit(vectors: Tensor, value: Tensor) -> Tensor:
    """Return unit vectors `[T, j, x]` for `[T, i, x]`, in float32 at least; the sum gets what transformers adds."""
    wide = vectors.to(_wide(vectors))
    return repeated(wide * (wide.square().sum(-1, keepdim=True) + _EPSILON).rsqrt(), value)


def _cut(row: Tensor, lengths: Sequence[int], chunk: int) -> Tensor:
    """Return the chunks `[n, j, c, ...]` of a row `[T, j, ...]`, of whose documents each is filled up with zeros.

    A token of zeros leaves the state as it is.
    """
    filled = [F.pad(part, (0, 0, 0, 0, 0, -len(part) % chunk)) for part in row.split(lengths)]  # type: ignore[no-untyped-call]
    return torch.cat(filled).unflatten(0, (-1, chunk)).transpose(1, 2)  # type: ignore[no-untyped-call, no-any-return]


def _joined(chunks: Tensor, lengths: Sequence[int], chunk: int) -> Tensor:
    """Return the row `[T, j, y]` of chunks `[n, j, c, y]`, without what they are filled up with."""
    filled = chunks.transpose(1, 2).flatten(0, 1).split([length + -length % chunk for length in lengths])  # type: ignore[no-untyped-call]
    return torch.cat([part[:length] for part, length in zip(filled, lengths, strict=True)])
