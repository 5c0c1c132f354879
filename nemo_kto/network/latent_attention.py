"""Multi-head latent attention (arXiv 2405.04434, section 2.1), as transformers computes it in DeepSeek-V3.

Megatron's own has the rotary embedding of one kind of row and divides the compressing layers among the tensor-parallel
ranks, to gather what they return. Here every rank has these small layers whole, and the rotary embedding is the
model's.

Tensor legend: `T` tokens of a packed row on this rank, `T/t` those between the layers that tensor-parallel ranks share
(all of them without sequence parallelism), `h` hidden size, `a` heads of this rank, `n` channels of a head's query
without a position, `r` with the rotary embedding, `v` of its value.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType

from nemo_kto.algorithms.pointwise import rotate
from nemo_kto.network.model_config import ModelConfig
from nemo_kto.network.norms import norm_of
from nemo_kto.network.sharded import own_state


class WholeLinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank has all of, with values still to be set.

    Args:
        config: Megatron's configuration.
        inputs: Input channels.
        outputs: Output channels.
        tp_group: The tensor-parallel ranks; with sequence parallelism each has the gradient of its tokens only, which
            Megatron then adds up.
        bias: Whether it has a bias.
    """

    def __init__(
        self, config: ModelConfig, inputs: int, outputs: int, *, tp_group: dist.ProcessGroup, bias: bool
    ) -> None:
        super().__init__()
        self.config, self.tp_group = config, tp_group
        self.sequence_parallel: bool = config.sequence_parallel
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        vector = torch.nn.Parameter(torch.empty(outputs, dtype=config.params_dtype)) if bias else None
        self.register_parameter("bias", vector)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return `[T/t, 1, outputs]` for `values` `[T/t, 1, inputs]`, and None as Megatron's layers return a bias."""
        # as matrices: see `lora.py`
        return F.linear(values.flatten(0, 1), self.weight, self.bias).unflatten(0, values.shape[:2]), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Any] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return Megatron's, with nothing divided."""
        return own_state(self, prefix, sharded_offsets, metadata, divided={})


class LatentAttention(Attention):  # type: ignore[misc]
    """Self-attention whose queries, and whose keys and values together, come from vectors of fewer channels.

    A part of each key, which has the rotary embedding, is the same for all heads.

    Args:
        config: The model's configuration, with `latent`; `kv_channels` are those of a head's value.
        submodules: Of which `core_attention` and `linear_proj` are taken.
        layer_number: Number of the layer, from 1.
        attn_mask_type: Always causal here.
        kwargs: See Attention.
    """

    def __init__(
        self, config: ModelConfig, submodules: Any, layer_number: int, attn_mask_type: AttnMaskType, **kwargs: Any
    ) -> None:
        if config.attention_output_bias != config.add_bias_linear:
            config = copy.copy(config)
            config.add_bias_linear = config.attention_output_bias
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", **kwargs)
        latent, norm = config.latent, norm_of(config)
        assert latent is not None
        self._latent = latent
        queries = config.num_attention_heads * latent.scored
        if latent.queries is None:
            self.linear_q_proj = self._divided(config.hidden_size, queries)
        else:
            self.linear_q_down_proj = self._whole(latent.queries)
            self.q_layernorm = norm(config, latent.queries, latent.norm_epsilon)
            self.linear_q_up_proj = self._divided(latent.queries, queries)
        self.linear_kv_down_proj = self._whole(latent.keys_and_values + latent.rotated)
        self.kv_layernorm = norm(config, latent.keys_and_values, latent.norm_epsilon)
        keys_and_values = config.num_attention_heads * (latent.plain + latent.values)
        self.linear_kv_up_proj = self._divided(latent.keys_and_values, keys_and_values)

    def _whole(self, outputs: int) -> WholeLinear:
        config = self.config
        return WholeLinear(config, config.hidden_size, outputs, tp_group=self.tp_group, bias=config.add_qkv_bias)

    def _divided(self, inputs: int, outputs: int) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.tp_group,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return Megatron's (output `[T/t, 1, h]`, bias).

        Args:
            hidden_states: `[T/t, 1, h]`.
            attention_mask: Unused.
            rotary_pos_emb: `[T, 1, 1, r]`, see `RotaryEmbedding`.
            packed_seq_params: The documents of the row.
            kwargs: What Megatron passes to every attention besides.
        """
        parts = self.get_query_key_value_tensors(hidden_states, rotary_pos_emb)
        if self.checkpoint_core_attention and self.training:
            attended = self._checkpointed_attention_forward(
                *parts, attention_mask, packed_seq_params=packed_seq_params
            )
        else:
            attended = self.core_attention(*parts, attention_mask, packed_seq_params=packed_seq_params)
        found: tuple[torch.Tensor, torch.Tensor | None] = self.linear_proj(attended)
        return found

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries and keys `[T, 1, a, n + r]`, and values `[T, 1, a, v]`.

        Args:
            hidden_states: `[T/t, 1, h]`.
            table: `[T, 1, 1, r]`.
        """
        latent = self._latent
        if latent.queries is None:
            queries, _ = self.linear_q_proj(hidden_states)
        else:
            compressed, _ = self.linear_q_down_proj(hidden_states)
            queries, _ = self.linear_q_up_proj(self.q_layernorm(compressed))
        plain, rotated = self._by_head(queries, latent.plain, latent.rotated)
        query = torch.cat([plain, self._rotate(rotated, table)], dim=-1)

        compressed, _ = self.linear_kv_down_proj(hidden_states)
        compressed, shared = compressed.split([latent.keys_and_values, latent.rotated], dim=-1)
        keys_and_values, _ = self.linear_kv_up_proj(self.kv_layernorm(compressed))
        plain, value = self._by_head(keys_and_values, latent.plain, latent.values)
        rotated = self._rotate(self._for_all_heads(shared)[:, :, None], table)
        key = torch.cat([plain, rotated.expand(-1, -1, plain.shape[2], -1)], dim=-1)
        # a copy: what keeps the values would keep the plain parts of the keys with them
        return query, key, value.contiguous()

    def _by_head(self, values: torch.Tensor, *channels: int) -> tuple[torch.Tensor, ...]:
        """Return parts `[T, 1, a, channels]` of what a projection returns."""
        return values.unflatten(-1, (-1, sum(channels))).split(channels, dim=-1)  # type: ignore[no-untyped-call, no-any-return]

    def _for_all_heads(self, shared: torch.Tensor) -> torch.Tensor:
        """Return `[T, 1, r]` from `[T/t, 1, r]`, whose gradient is the sum of those of all ranks' heads."""
        found: torch.Tensor
        if self.config.sequence_parallel:
            found = gather_from_sequence_parallel_region(shared, group=self.tp_group)
        else:
            found = copy_to_tensor_model_parallel_region(shared, group=self.tp_group)
        return found

    def _rotate(self, values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return rotate(values, table, interleaved=self.config.rotary_interleaved)
