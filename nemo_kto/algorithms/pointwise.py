"""Norm, gated activation and rotary embedding, each one autograd function that keeps little for the backward pass.

Written as expressions, they would keep every intermediate result, together more than the matrix products around them.
Here the norm keeps what went in and a number for each vector, the activation what went in, the rotary embedding its
angles; the rest is computed again. The results are those of the expressions, to rounding, and have the same bits with
and without gradients.

Tensor legend: `...` tokens and whatever else the rows are counted by, `h` channels, `f` channels inside a feed-forward
part, `T` tokens of a row, `a` heads, `d` channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Parts(NamedTuple):
    """Vectors of which each rank has some channels.

    Attributes:
        channels: Channels of a whole vector.
        add_up: Replaces a rank's sums over its own channels by the sums over all, in place.
    """

    channels: int
    add_up: Callable[[Tensor], None]


def rms_norm(values: Tensor, weight: Tensor, eps: float, parts: Parts | None = None) -> Tensor:
    """Return `values / sqrt(mean(values^2) + eps) * weight` (arXiv 1910.07467, eq. 4), computed in float32.

    Args:
        values: `[..., h]`.
        weight: `[h]`.
        eps: Added to the mean square over the channels.
        parts: What the `h` channels are a part of; None where they are all.

    Returns:
        `[..., h]` in the dtype of `values`.
    """
    output: Tensor = _RMSNorm.apply(values, weight, eps, parts)  # type: ignore[no-untyped-call]
    return output


def swiglu(projected: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return `silu(gate) * up`, times `weights` if given (arXiv 2002.05202, eq. 5).

    Args:
        projected: `[..., 2 f]`, the gate's channels first.
        weights: `[..., 1]`, one factor for each token, as a mixture's router gives it.

    Returns:
        `[..., f]` in the dtype of `projected`.
    """
    output: Tensor = _GatedUnit.apply(projected, weights, _Gating(_SILU))  # type: ignore[no-untyped-call]
    return output


def geglu(projected: Tensor) -> Tensor:
    """Return `gelu(gate) * up` (arXiv 2002.05202, eq. 5) with the tanh form of GELU (arXiv 1606.08415, section 2).

    Args:
        projected: `[..., 2 f]`, the gate's channels first.

    Returns:
        `[..., f]` in the dtype of `projected`.
    """
    output: Tensor = _GatedUnit.apply(projected, None, _Gating(_GELU))  # type: ignore[no-untyped-call]
    return output


def quick_geglu(
    projected: Tensor, weights: Tensor | None = None, *, offset: float = 0.0, limit: float | None = None
) -> Tensor:
    """Return `gate * sigmoid(1.702 gate) * (up + offset)`, times `weights` if given.

    The sigmoid form of GELU is from arXiv 1606.08415, section 2; with an offset of one and a limit it is gpt-oss's
    (arXiv 2508.10925).

    Args:
        projected: `[..., 2 f]`, the gate's channels first.
        weights: See `swiglu`.
        offset: Added to `up`.
        limit: Largest value of the gate, and largest magnitude of `up`; None for no limit.

    Returns:
        `[..., f]` in the dtype of `projected`.
    """
    gating = _Gating(_QUICK_GELU, offset, limit)
    output: Tensor = _GatedUnit.apply(projected, weights, gating)  # type: ignore[no-untyped-call]
    return output


def gelu(values: Tensor) -> Tensor:
    """Return the tanh form of GELU (arXiv 1606.08415, section 2); only `values` are kept for the backward pass."""
    return F.gelu(values, approximate="tanh")


def rotate(values: Tensor, table: Tensor, *, interleaved: bool = False) -> Tensor:
    """Return queries or keys with the rotary embedding applied (arXiv 2104.09864, in the form of Llama).

    Channel i is rotated together with channel i + r/2; channels from r on stay as they are.

    Args:
        values: `[T, 1, a, d]`.
        table: `[T, 1, 1, r]` float32, r <= d: the cosines of the r/2 pairs' angles, then the sines.
        interleaved: Rotate channel 2i together with channel 2i + 1, as in the paper.

    Returns:
        `[T, 1, a, d]` in the dtype of `values`.
    """
    output: Tensor = _Rotation.apply(values, table, interleaved)  # type: ignore[no-untyped-call]
    return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, eps: float, parts: Parts | None) -> Tensor:
        values = values.contiguous()  # a part of a wider tensor, kept, would keep all of that
        ctx.parts = parts or Parts(values.shape[-1], _are_all)
        squares = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float32).square_()
        ctx.parts.add_up(squares)
        inverse = squares.div_(ctx.parts.channels).add_(eps).rsqrt_()
        ctx.save_for_backward(values, weight, inverse)
        normed: Tensor = values * inverse
        return normed.mul_(weight).to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        values, weight, inverse = ctx.saved_tensors
        factor = weight.float()
        normed = values * inverse
        product = grad * normed
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        along = product @ factor
        ctx.parts.add_up(along)
        along = along.div_(ctx.parts.channels)[..., None]
        grad_values = torch.mul(grad, factor, out=product)
        grad_values.addcmul_(normed, along, value=-1).mul_(inverse)
        return grad_values.to(values.dtype), grad_weight, None, None


def _are_all(sums: Tensor) -> None:
    """Leave sums over all channels as they are."""


class _Activation(NamedTuple):
    """A function of the gate, and what its gradient is written with: gradient, gate, where to."""

    function: Callable[[Tensor], Tensor]
    gradient_into: Callable[[Tensor, Tensor, Tensor], Tensor]


def _silu_gradient(grad: Tensor, gate: Tensor, into: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=into)  # type: ignore[no-any-return]


def _gelu_gradient(grad: Tensor, gate: Tensor, into: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward.grad_input(  # type: ignore[no-any-return]
        grad, gate, approximate="tanh", grad_input=into
    )


def _quick_gelu(gate: Tensor) -> Tensor:
    return torch.sigmoid(1.702 * gate).mul_(gate)


def _quick_gelu_gradient(grad: Tensor, gate: Tensor, into: Tensor) -> Tensor:
    share = torch.sigmoid(1.702 * gate)
    return torch.mul(grad, share * (1 + 1.702 * gate * (1 - share)), out=into)


_SILU = _Activation(F.silu, _silu_gradient)
_GELU = _Activation(gelu, _gelu_gradient)
_QUICK_GELU = _Activation(_quick_gelu, _quick_gelu_gradient)


class _Gating(NamedTuple):
    """How a gated unit is made of its two halves; see `quick_geglu`."""

    activation: _Activation
    offset: float = 0.0
    limit: float | None = None

    def halves(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the activation is of, and what it is multiplied with."""
        gate, up = projected.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate, up + self.offset if self.offset else up

    def stop(self, grad_projected: Tensor, projected: Tensor) -> None:
        """Leave no gradient, in place, to what the limit has replaced."""
        if self.limit is not None:
            grads, (gate, up) = grad_projected.chunk(2, dim=-1), projected.chunk(2, dim=-1)
            grads[0].masked_fill_(gate > self.limit, 0.0)
            grads[1].masked_fill_(up.abs() > self.limit, 0.0)


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, weights: Tensor | None, gating: _Gating) -> Tensor:
        ctx.save_for_backward(projected, weights)
        ctx.gating = gating
        gate, up = gating.halves(projected)
        output = gating.activation.function(gate).mul_(up)
        return output if weights is None else (output * weights).to(projected.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        projected, weights = ctx.saved_tensors
        gate, up = ctx.gating.halves(projected)
        activated, grad_weights = ctx.gating.activation.function(gate), None
        if weights is not None:
            if ctx.needs_input_grad[1]:
                grad_weights = ((activated * up).to(weights.dtype) * grad).sum(-1, keepdim=True)
            grad = (grad * weights).to(projected.dtype)
        grad_projected = torch.empty_like(projected)
        grad_gate, grad_up = grad_projected.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_up)
        torch.mul(grad, up, out=grad_gate)
        ctx.gating.activation.gradient_into(grad_gate, gate, grad_gate)
        ctx.gating.stop(grad_projected, projected)
        return grad_projected, grad_weights, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, table: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(table)
        ctx.interleaved = interleaved
        cos, sin = table.chunk(2, dim=-1)
        return _rotated(values, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        cos, sin = table.chunk(2, dim=-1)
        return _rotated(grad, cos, -sin, ctx.interleaved), None, None  # back by the same angles


def _rotated(values: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    cos, sin, half = cos.to(values.dtype), sin.to(values.dtype), cos.shape[-1]
    first, second = slice(half), slice(half, 2 * half)
    of_channels = torch.cat([cos, cos], dim=-1)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        of_channels = cos.repeat_interleave(2, dim=-1)
    # whole heads in one pass, which is faster than half by half; what is not rotated is multiplied with one
    output = values * F.pad(of_channels, (0, values.shape[-1] - 2 * half), value=1.0)
    output[..., first].addcmul_(values[..., second], sin, value=-1)
    output[..., second].addcmul_(values[..., first], sin)
    return output
