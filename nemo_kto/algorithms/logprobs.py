"""Log-probs of response tokens from a vocabulary-parallel output layer, without ever holding all logits.

Tensor legend: `R` response tokens, `c` tokens of a chunk, `h` hidden size, `v/t` rows of the padded vocabulary on this
tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

DEFAULT_CHUNK_SIZE = 1024
"""Tokens whose logits are held at once: 1024 x 128k / 8 ranks in float32 is 64 MiB."""


def response_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> Tensor:
    """Return the log-prob of each response token: the log-softmax of `hidden @ weight.T` over the whole vocabulary.

    The output layer is fused in: logits exist for one chunk of tokens at a time, in the forward pass and, recomputed,
    in the backward pass. Each chunk takes three all-reduces of `[c]` over `tp_group` forward (maximum, sum of
    exponentials, target), and one of `[c, h]` backward.

    Args:
        hidden: `[R, h]`, the final hidden state that predicts each token; equal on all ranks of `tp_group`.
        weight: `[v/t, h]`, this rank's rows of the output layer; rank `k` holds ids from `k * v/t`.
        targets: `[R]` int64, global token ids below `vocab_size`.
        vocab_size: Number of real tokens; padding rows from there on take no part in the softmax.
        tp_group: Ranks that share the vocabulary; None if this rank has all of it.
        chunk_size: Largest `c`.

    Returns:
        `[R]` float32, natural log; bit-equal with and without gradients. The gradient of `hidden` is complete on every
        rank (summed over `tp_group`).
    """
    logps: Tensor = _ResponseLogps.apply(hidden, weight, targets, vocab_size, tp_group, chunk_size)  # type: ignore[no-untyped-call]
    return logps


def sum_per_document(token_logps: Tensor, document_ids: Tensor, num_documents: int) -> Tensor:
    """Return the sum of each document's token log-probs.

    Args:
        token_logps: `[R]` float32.
        document_ids: `[R]` int64, the document of each token, ascending.
        num_documents: Number of documents.

    Returns:
        `[num_documents]` float32.
    """
    lengths = torch.bincount(document_ids, minlength=num_documents)
    # a sum per document, not an index_add: on CUDA that one adds in an order that changes from run to run
    return torch.stack([part.sum() for part in torch.split(token_logps, lengths.tolist())])


class _ResponseLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        tp_group: dist.ProcessGroup | None,
        chunk_size: int,
    ) -> Tensor:
        first_id = _first_id(weight, tp_group)
        real_rows = min(max(vocab_size - first_id, 0), weight.shape[0])
        logps = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        normalizers = torch.empty_like(logps)
        for start in range(0, targets.numel(), chunk_size):
            part = slice(start, start + chunk_size)
            logits = (hidden[part] @ weight[:real_rows].T).float()
            local_targets, is_local = _localize(targets[part], first_id, real_rows)
            maximum = _row_maximum(logits, tp_group)
            target_logits = _pick(logits, local_targets, is_local)
            sum_exp = logits.sub_(maximum[:, None]).exp_().sum(dim=-1)
            _all_reduce(target_logits, tp_group)
            _all_reduce(sum_exp, tp_group)
            normalizers[part] = sum_exp.log() + maximum
            logps[part] = target_logits - normalizers[part]
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.settings = (first_id, real_rows, tp_group, chunk_size)  # type: ignore[attr-defined]
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        first_id, real_rows, tp_group, chunk_size = ctx.settings
        rows = weight[:real_rows]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None  # stays so where the output layer is frozen
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, targets.numel(), chunk_size):
            part = slice(start, start + chunk_size)
            # d logp / d logits = one_hot(target) - softmax
            softmax = (hidden[part] @ rows.T).float().sub_(normalizers[part, None]).exp_()
            grad_logits = softmax.mul_(-grad_logps[part, None])
            local_targets, is_local = _localize(targets[part], first_id, real_rows)
            if real_rows:
                grad_logits.scatter_add_(1, local_targets[:, None], (grad_logps[part] * is_local)[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = grad_logits @ rows
            if grad_weight is not None:
                grad_weight[:real_rows] += grad_logits.T @ hidden[part]
        if grad_hidden.numel():
            _all_reduce(grad_hidden, tp_group)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _first_id(weight: Tensor, tp_group: dist.ProcessGroup | None) -> int:
    return 0 if tp_group is None else dist.get_rank(tp_group) * weight.shape[0]


def _localize(targets: Tensor, first_id: int, real_rows: int) -> tuple[Tensor, Tensor]:
    """Return (row of each target on this rank, clamped into range; whether it really is on this rank)."""
    local = targets - first_id
    is_local = (local >= 0) & (local < real_rows)
    return local.clamp(0, max(real_rows - 1, 0)), is_local


def _row_maximum(logits: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Return the maximum `[c]` over all ranks; a rank with padding rows only has none to offer."""
    if logits.shape[1]:
        maximum = logits.amax(dim=-1)
    else:
        maximum = logits.new_full((logits.shape[0],), float("-inf"))
    if tp_group is not None:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
    return maximum


def _pick(logits: Tensor, local_targets: Tensor, is_local: Tensor) -> Tensor:
    """Return the target's logit where it is on this rank, else 0."""
    if not logits.shape[1]:
        return logits.new_zeros(logits.shape[0])
    return logits.gather(1, local_targets[:, None])[:, 0] * is_local


def _all_reduce(tensor: Tensor, tp_group: dist.ProcessGroup | None) -> None:
    if tp_group is not None:
        dist.all_reduce(tensor, group=tp_group)
