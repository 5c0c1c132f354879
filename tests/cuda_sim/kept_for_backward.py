"""Attention and norm of torch that keep for the backward pass what CUDA's kernels keep.

torch chooses kernels by the device. For the simulated one it would take those made of many operators, which keep all
scores of attention, and several copies of a norm's input in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

_attention, _rms_norm = F.scaled_dot_product_attention, F.rms_norm


def install() -> None:
    """Let tensors of the device go through them."""
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    F.rms_norm = rms_norm  # type: ignore[assignment]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The CPU's flash attention: it keeps its inputs, its output and a number for each query and head."""
    if not query.is_cuda or dropout_p:
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)  # type: ignore[no-any-return]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    output: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output


def rms_norm(
    values: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """It keeps its inputs, and a number for each row."""
    if not values.is_cuda or weight is None or eps is None:
        return _rms_norm(values, normalized_shape, weight, eps)  # type: ignore[no-any-return]
    output: torch.Tensor = _RMSNorm.apply(values, weight, eps)  # type: ignore[no-untyped-call]
    return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        inverse = (values.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(values, weight, inverse)
        return (values.float() * inverse * weight.float()).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        values, weight, inverse = ctx.saved_tensors
        # y = x r w with r = (mean x^2 + eps)^(-1/2), dr/dx = -r^3 x / n
        of_scaled = gradient.float() * weight.float()
        along = (of_scaled * values.float()).mean(-1, keepdim=True) * inverse**3
        of_weight = (gradient.float() * values.float() * inverse).flatten(0, -2).sum(0)
        return (of_scaled * inverse - values.float() * along).to(values.dtype), of_weight.to(weight.dtype), None
