"""Causal attention with what torch's kernels cannot do: caps of the scores, and sinks.

Scores are formed for a chunk of queries at a time and formed again in the backward pass, which keeps queries, keys,
values and a number for each query, as the kernels do. The result has the same bits with and without gradients.

Tensor legend: `n` tokens of a document, `b` documents, `m` tokens of the longest of them, `a` query heads, `g`
key/value heads, each shared by `a / g` neighbouring query heads, `d` channels of a head, `c` queries of a chunk.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SCORES_MEMORY = 64 * 2**20
"""Bytes of the scores that are formed at once, which exist about three times."""


class Scoring(NamedTuple):
    """How scores are made of products of queries and keys.

    Attributes:
        scale: Factor of the products.
        window: Earlier tokens that a token sees besides itself; None for all.
        cap: Largest score: `cap * tanh(score / cap)` (arXiv 2408.00118, section 2); None for no cap.
    """

    scale: float
    window: int | None = None
    cap: float | None = None

    def scores(self, products: Tensor) -> Tensor:
        """Return the scores of products, float32, in the memory of a float32 argument."""
        scores = products.float().mul_(self.scale)
        return scores if self.cap is None else scores.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, scores: Tensor) -> Tensor | float:
        """Return the derivative of the scores by the products."""
        return self.scale if self.cap is None else scores.div(self.cap).square_().neg_().add_(1).mul_(self.scale)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    sinks: Tensor | None = None,
    *,
    memory: int = SCORES_MEMORY,
) -> Tensor:
    """Return the attention output `[a, n, d]` of one document, in the dtype of `query`.

    Args:
        query: `[a, n, d]`.
        key: `[g, n, d]`.
        value: `[g, n, d]`.
        scoring: See there.
        sinks: `[a]`, for each head the score of one token more, which has no value (arXiv 2309.17453): what it gets of
            the softmax is lost. None for none.
        memory: See `SCORES_MEMORY`.
    """
    output: Tensor = _Attention.apply(query, key, value, sinks, scoring, memory)  # type: ignore[no-untyped-call]
    return output


def attend_newest(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scoring: Scoring, sinks: Tensor | None = None
) -> Tensor:
    """Return the attention output `[b, a, d]` of the newest token of each document.

    Args:
        query: `[b, a, d]`.
        key: `[b, g, m, d]`.
        value: `[b, g, m, d]`.
        visible: `[b, m]` bool, which tokens it sees.
        scoring: See there; the window is in `visible`.
        sinks: See `attend`.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))  # type: ignore[no-untyped-call]
    scores = scoring.scores(grouped @ key.mT).masked_fill_(~visible[:, None, None], -math.inf)
    normalizers = _normalizers(scores, None if sinks is None else sinks.reshape(grouped.shape[1:3]))
    shares = scores.sub_(normalizers[..., None]).exp_()
    return (shares.to(value.dtype) @ value).flatten(1, 2)


def _normalizers(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the logarithms of the sums that the softmax divides by, for scores `[..., m]` and sinks `[...]`."""
    sums = scores.logsumexp(dim=-1)
    return sums if sinks is None else torch.logaddexp(sums, sinks.float().expand_as(sums))


class _Chunk(NamedTuple):
    """The queries of a chunk, and the keys that any of them sees."""

    queries: slice
    keys: slice

    def hidden(self, window: int | None, device: torch.device) -> Tensor:
        """Return `[c, keys]` bool: whether a query must not see a key."""
        places = torch.arange(self.queries.start, self.queries.stop, device=device)
        distance = places[:, None] - torch.arange(self.keys.start, self.keys.stop, device=device)
        hidden = distance < 0
        return hidden if window is None else hidden | (distance > window)


def _chunks(length: int, heads: int, window: int | None, memory: int) -> list[_Chunk]:
    """Return the chunks of a document, each as long as there is memory for, and at least a token."""
    found = []
    start = 0
    while start < length:
        first = 0 if window is None else max(0, start - window)
        # c queries and the keys before them: heads * c * (start - first + c) numbers of four bytes
        before, room = start - first, memory // (4 * heads)
        size = max(1, (math.isqrt(before * before + 4 * room) - before) // 2)
        end = min(start + size, length)
        found.append(_Chunk(slice(start, end), slice(first, end)))
        start = end
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scoring: Scoring, memory: int
    ) -> Tensor:
        heads, length, _ = query.shape
        chunks = _chunks(length, heads, scoring.window, memory)
        normalizers = torch.empty(heads, length, dtype=torch.float32, device=query.device)
        output = query.new_empty(heads, length, value.shape[-1])
        for chunk in chunks:
            scores = scoring.scores(_products(query, key, chunk))
            scores.masked_fill_(chunk.hidden(scoring.window, query.device), -math.inf)
            sums = _normalizers(scores, None if sinks is None else sinks[:, None])
            normalizers[:, chunk.queries] = sums
            shares = scores.sub_(sums[..., None]).exp_()
            output[:, chunk.queries] = _over_groups(shares.to(value.dtype), value[:, chunk.keys])
        ctx.save_for_backward(query, key, value, sinks, normalizers)
        ctx.settings = (scoring, chunks)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, normalizers = ctx.saved_tensors
        scoring, chunks = ctx.settings
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros(it.shape, dtype=torch.float32, device=it.device) for it in (key, value))
        grad_sinks = None if sinks is None else torch.zeros(sinks.shape, dtype=torch.float32, device=sinks.device)
        for chunk in chunks:
            sums, wanted = normalizers[:, chunk.queries], grad[:, chunk.queries]
            scores = scoring.scores(_products(query, key, chunk))
            slope = scoring.slope(scores)
            shares = scores.sub_(sums[..., None]).exp_()
            shares.masked_fill_(chunk.hidden(scoring.window, query.device), 0.0)
            grad_value[:, chunk.keys] += _into_groups(shares.to(grad.dtype), wanted, key.shape[0])
            grad_shares = _over_groups(wanted, value[:, chunk.keys].mT).float()
            along = (shares * grad_shares).sum(-1)
            grad_products = grad_shares.sub_(along[..., None]).mul_(shares).mul_(slope)
            if grad_sinks is not None:
                assert sinks is not None
                grad_sinks -= ((sinks.float()[:, None] - sums).exp() * along).sum(-1)
            rounded = grad_products.to(query.dtype)
            grad_query[:, chunk.queries] = _over_groups(rounded, key[:, chunk.keys])
            grad_key[:, chunk.keys] += _into_groups(rounded, query[:, chunk.queries], key.shape[0])
        found = None if grad_sinks is None else grad_sinks.to(sinks.dtype)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), found, None, None


def _products(query: Tensor, key: Tensor, chunk: _Chunk) -> Tensor:
    """Return the products `[a, c, keys]` of the queries and the keys of a chunk."""
    return _over_groups(query[:, chunk.queries], key[:, chunk.keys].mT)


def _over_groups(per_query: Tensor, per_key: Tensor) -> Tensor:
    """Return the product `[a, c, y]` of `[a, c, x]` with each head's own of `[g, x, y]`."""
    groups, (heads, rows, _) = per_key.shape[0], per_query.shape
    product = per_query.reshape(groups, heads // groups * rows, -1) @ per_key
    return product.reshape(heads, rows, -1)


def _into_groups(left: Tensor, right: Tensor, groups: int) -> Tensor:
    """Return `[g, x, y]`: of `[a, c, x]` and `[a, c, y]` the products over queries, summed over a group's heads."""
    one, other = (part.reshape(groups, -1, part.shape[-1]) for part in (left, right))
    return one.mT @ other
