"""Log-probs of response tokens from a vocabulary-parallel output layer, without ever holding all logits.

Tensor legend: `R` response tokens, `c` tokens of a chunk, `h` hidden size, `v/t` rows of the padded vocabulary on this
tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

LOGITS_MEMORY = 256 * 2**20
"""Most bytes of logits and log-probs over the vocabulary that are held at once."""


class LogitShape(NamedTuple):
    """What a model makes of the products of hidden states and output layer.

    Attributes:
        factor: They are multiplied by it.
        cap: Largest logit after that: `cap * tanh(logit / cap)` (arXiv 2408.00118, section 2); None for no cap.
    """

    factor: float = 1.0
    cap: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the products are the logits."""
        return self.factor == 1.0 and self.cap is None

    def logits(self, products: Tensor) -> Tensor:
        """Return logits, in float32 unless they are the products; float32 products are written over."""
        if self.is_plain:
            return products
        logits = products.float().mul_(self.factor)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of logits by the products, in the memory of float32 `logits`."""
        return self.factor if self.cap is None else logits.div_(self.cap).square_().neg_().add_(1).mul_(self.factor)


PLAIN = LogitShape()


def response_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    shape: LogitShape = PLAIN,
    tp_group: dist.ProcessGroup | None = None,
    logits_memory: int = LOGITS_MEMORY,
) -> Tensor:
    """Return the log-prob of each response token: the log-softmax of the logits over the whole vocabulary.

    The logits are `hidden @ weight.T`, in the model's `shape`.

    The output layer is fused in: logits exist for a chunk of tokens at a time, as many as `logits_memory` has room for
    and at least one. What the gradient needs of them is kept from the forward pass where all tokens are one chunk, and
    computed again in the backward pass where they are not. With a frozen `weight` neither is needed: the gradient of
    `hidden` is then formed in the forward pass, but for a factor per token.

    Each chunk takes two all-reduces over `tp_group` forward, of `[c]` (maximum) and `[2, c]` (sum of exponentials,
    target), and one of `[R, h]` follows backward.

    Args:
        hidden: `[R, h]`, the final hidden state that predicts each token; equal on all ranks of `tp_group`.
        weight: `[v/t, h]`, this rank's rows of the output layer; rank `k` holds ids from `k * v/t`.
        targets: `[R]` int64, global token ids below `vocab_size`.
        vocab_size: Number of real tokens; padding rows from there on take no part in the softmax.
        shape: See `LogitShape`.
        tp_group: Ranks that share the vocabulary; None if this rank has all of it.
        logits_memory: Bytes.

    Returns:
        `[R]` float32, natural log; bit-equal with and without gradients. The gradient of `hidden` is complete on every
        rank (summed over `tp_group`). The backward pass can run once.
    """
    logps: Tensor = _ResponseLogps.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, vocab_size, shape, tp_group, logits_memory
    )
    return logps


def sum_per_document(token_logps: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the sum of each document's token log-probs.

    Args:
        token_logps: `[R]` float32, document by document.
        lengths: `[d]` how many of them each document has; numbers, so that nobody waits for a device to tell them.

    Returns:
        `[d]` float32.
    """
    # a sum per document, not an index_add: on CUDA that one adds in an order that changes from run to run
    return torch.stack([part.sum() for part in torch.split(token_logps, list(lengths))])


class _ResponseLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        shape: LogitShape,
        tp_group: dist.ProcessGroup | None,
        logits_memory: int,
    ) -> Tensor:
        first_id = 0 if tp_group is None else dist.get_rank(tp_group) * weight.shape[0]
        rows = weight[: min(max(vocab_size - first_id, 0), weight.shape[0])]
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        # products as they come and their log-softmax in float32, logits in float32 if they are others; padding rows
        # count too, so all ranks have equal chunks
        bytes_each = hidden.element_size() + (4 if shape.is_plain else 8)
        chunk_size = max(1, logits_memory // (weight.shape[0] * bytes_each))
        logps = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        shifts = torch.empty_like(logps)
        normalizers = torch.empty_like(logps)
        kept = unit_gradient = None
        if of_hidden and not of_weight:
            unit_gradient = torch.empty_like(hidden)
        for part in _chunks(targets, chunk_size):
            target = _Target.of(targets[part], first_id, len(rows))
            sums = _Sums(logps[part], shifts[part], normalizers[part])
            log_probs = _log_softmax(shape.logits(hidden[part] @ rows.T), target, tp_group, sums)
            if unit_gradient is not None:
                gradient = _gradient_of_products(log_probs, sums, target, torch.ones_like(sums.logps), shape)
                unit_gradient[part] = gradient.to(hidden.dtype) @ rows
            elif of_weight and len(targets) <= chunk_size:
                kept = log_probs
            del log_probs  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, targets, logps, shifts, normalizers, kept, unit_gradient)
        ctx.settings = (first_id, len(rows), shape, tp_group, chunk_size)
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None, None]:
        hidden, weight, targets, logps, shifts, normalizers, kept, unit_gradient = ctx.saved_tensors
        first_id, num_rows, shape, tp_group, chunk_size = ctx.settings
        if unit_gradient is not None:
            grad_hidden = (unit_gradient * grad_logps[:, None]).to(hidden.dtype)
            _all_reduce(grad_hidden, tp_group)
            return grad_hidden, None, None, None, None, None, None
        rows = weight[:num_rows]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for part in _chunks(targets, chunk_size):
            target = _Target.of(targets[part], first_id, num_rows)
            sums = _Sums(logps[part], shifts[part], normalizers[part])
            log_probs = kept
            if log_probs is None:
                log_probs = torch.log_softmax(shape.logits(hidden[part] @ rows.T), -1, dtype=torch.float32)
            gradient = _gradient_of_products(log_probs, sums, target, grad_logps[part], shape).to(hidden.dtype)
            grad_hidden[part] = gradient @ rows
            if gradient.dtype == torch.float32:
                grad_weight[:num_rows].addmm_(gradient.T, hidden[part])
            else:
                grad_weight[:num_rows] += gradient.T @ hidden[part]
            del log_probs, gradient
        _all_reduce(grad_hidden, tp_group)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


class _Sums(NamedTuple):
    """What is known of each token of a chunk, `[c]` float32 each, once its logits are summed.

    Attributes:
        logps: The target's log-prob over the whole vocabulary.
        shifts: What is to be subtracted of log-probs over this rank's rows only to make them such.
        normalizers: What was subtracted of this rank's logits to make them log-probs over its rows.
    """

    logps: Tensor
    shifts: Tensor
    normalizers: Tensor


class _Target(NamedTuple):
    """The row `[c]` of each target among this rank's, clamped into range; whether it really is on this rank `[c]`."""

    row: Tensor
    is_local: Tensor

    @classmethod
    def of(cls, targets: Tensor, first_id: int, num_rows: int) -> _Target:
        row = targets - first_id
        return cls(row.clamp(0, max(num_rows - 1, 0)), (row >= 0) & (row < num_rows))


def _chunks(targets: Tensor, chunk_size: int) -> list[slice]:
    return [slice(start, start + chunk_size) for start in range(0, len(targets), chunk_size)]


def _log_softmax(logits: Tensor, target: _Target, tp_group: dist.ProcessGroup | None, sums: _Sums) -> Tensor:
    """Return the log-softmax `[c, rows]` of logits over this rank's rows only, in float32; `sums` are written."""
    log_probs = torch.log_softmax(logits, -1, dtype=torch.float32)
    target_logits = torch.zeros_like(sums.logps)
    sums.normalizers.fill_(float("-inf"))  # of a rank with padding rows only
    if logits.shape[1]:
        target_logits = logits.gather(1, target.row[:, None])[:, 0].float()
        target_log_probs = log_probs.gather(1, target.row[:, None])[:, 0]
        sums.normalizers.copy_(target_logits - target_log_probs)
        if tp_group is None:
            sums.logps.copy_(target_log_probs)
            sums.shifts.zero_()
            return log_probs
    maximum = sums.normalizers.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
    totals = torch.stack([(sums.normalizers - maximum).exp(), target_logits * target.is_local])
    _all_reduce(totals, tp_group)
    everywhere = totals[0].log() + maximum
    sums.logps.copy_(totals[1] - everywhere)
    sums.shifts.copy_(everywhere - sums.normalizers)
    return log_probs


def _gradient_of_products(
    log_probs: Tensor, sums: _Sums, target: _Target, grad_logps: Tensor, shape: LogitShape
) -> Tensor:
    """Return the gradient of the products, in the place of `log_probs`.

    That of the logits is `grad_logps * (one_hot(target) - softmax)`.
    """
    slope: Tensor | float = shape.factor
    if shape.cap is not None:
        slope = shape.slope(log_probs + sums.normalizers[:, None])
    # one factor for both, so that with one rank no pass over the vocabulary is spent on the shift
    gradient = log_probs.exp_().mul_((grad_logps * -torch.exp(-sums.shifts))[:, None])
    if gradient.shape[1]:
        gradient.scatter_add_(1, target.row[:, None], (grad_logps * target.is_local)[:, None])
    return gradient if shape.is_plain else gradient.mul_(slope)


def _all_reduce(tensor: Tensor, tp_group: dist.ProcessGroup | None) -> None:
    if tp_group is not None and tensor.numel():
        dist.all_reduce(tensor, group=tp_group)
