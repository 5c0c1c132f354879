"""Norms for layers whose tokens the tensor-parallel ranks may share; Megatron's wrapper of torch's refuses that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_kto.algorithms.pointwise import Parts, rms_norm
from nemo_kto.network.sharded import own_state


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


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm of queries or keys over the channels of all heads, which the tensor-parallel ranks share.

    Args:
        config: Megatron's configuration.
        channels: Channels of this rank's heads.
        tp_group: The tensor-parallel ranks.

    Attributes:
        weight: `[channels]`, this rank's part.
    """

    def __init__(self, config: TransformerConfig, channels: int, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(channels, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        self.eps = config.layernorm_epsilon
        self.tp_group = tp_group
        self._parts = None if tp_group.size() == 1 else Parts(channels * tp_group.size(), self._add_up)

    def _add_up(self, sums: torch.Tensor) -> None:
        dist.all_reduce(sums, group=self.tp_group)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the normed `values`, `[T, 1, heads of this rank, channels of a head]`."""
        return rms_norm(values.flatten(2), self.weight, self.eps, self._parts).view(values.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Any] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return Megatron's, with the weight divided as it is."""
        return own_state(self, prefix, sharded_offsets, metadata, divided={"weight": 0})


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
