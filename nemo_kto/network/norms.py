"""Norms for layers whose tokens the tensor-parallel ranks may share; Megatron's wrapper of torch's refuses that."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_kto.algorithms.pointwise import rms_norm


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that Megatron adds up its gradient over the ranks that divide the tokens.

    Args:
        config: Megatron's configuration; with `layernorm_zero_centered_gamma` one is added to the weight.
        hidden_size: Channels.
        eps: Added to the mean square.
        kwargs: What Megatron passes to every norm besides.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the normed `values`, `[..., hidden_size]`: on CUDA by torch's kernel, which a CPU has none of."""
        if values.is_cuda and not self.zero_centered:
            return super().forward(values)
        assert self.eps is not None
        # in float32: near one, bfloat16 has steps of 0.008
        weight = self.weight.float() + 1 if self.zero_centered else self.weight
        return rms_norm(values, weight, self.eps)


class SequenceParallelLayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm, marked as `SequenceParallelRMSNorm` is.

    Args:
        config: Megatron's configuration.
        hidden_size: Channels.
        eps: Added to the variance.
        kwargs: What Megatron passes to every norm besides.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        assert not config.layernorm_zero_centered_gamma, "no family has such a norm"
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def norm_of(config: TransformerConfig) -> type[SequenceParallelRMSNorm | SequenceParallelLayerNorm]:
    """Return the class of a model's norms."""
    return SequenceParallelLayerNorm if config.normalization == "LayerNorm" else SequenceParallelRMSNorm
