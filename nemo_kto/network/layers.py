"""Transformer layers and their attention, as far as models differ there from what Megatron's compute."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer

from nemo_kto.network.model_config import ModelConfig
from nemo_kto.network.norms import AllHeadsRMSNorm, norm_of

Biased = tuple[torch.Tensor, torch.Tensor | None]
"""Output `[T, 1, h]` of a row-parallel layer, and its bias `[h]` that is still to be added."""


class FamilyAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention whose projections and norms are the model's, and whose rotary embedding is the layer's.

    Args:
        config: The model's configuration.
        args: See SelfAttention.
        separate_values: Give values memory of their own. They come as a part of what one projection returns for
            queries, keys and values. The rotary embedding makes the first two anew; values that are kept for the
            backward pass, by attention or by its recomputation, would then keep the memory of all three.
        kwargs: See SelfAttention.
    """

    def __init__(self, config: ModelConfig, *args: Any, separate_values: bool, **kwargs: Any) -> None:
        if config.attention_output_bias != config.add_bias_linear:
            # Megatron has one field for the biases of both parts of a layer
            config = copy.copy(config)
            config.add_bias_linear = config.attention_output_bias
        super().__init__(config, *args, **kwargs)
        if config.norms_of_all_heads:
            channels, group = config.kv_channels, self.pg_collection.tp
            self.q_layernorm = AllHeadsRMSNorm(config, self.num_attention_heads_per_partition * channels, group)
            self.k_layernorm = AllHeadsRMSNorm(config, self.num_query_groups_per_partition * channels, group)
        self._separate_values = separate_values
        tables = config.rotary_tables
        self._table = None if tables is None else tables[self.layer_number - 1]

    def forward(
        self, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return Megatron's (output, bias).

        Args:
            args: See SelfAttention.
            rotary_pos_emb: `[T, 1, 1, r]`; `[tables, T, 1, 1, r]` where layers have different ones, `[2, T, 1, 1, r]`
                where keys and queries have.
            kwargs: See SelfAttention.
        """
        tables: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = rotary_pos_emb
        if rotary_pos_emb is not None and self._table is not None:
            tables = rotary_pos_emb[self._table]
        elif rotary_pos_emb is not None and self.config.rotary_scales_queries:
            keys, queries = rotary_pos_emb
            tables = (queries, keys)
        found: Biased = super().forward(*args, rotary_pos_emb=tables, **kwargs)
        return found

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        """Return queries `[T, 1, a, d]`, keys and values `[T, 1, g, d]`, and gates `[T, 1, a, d]` if it has any."""
        if self.config.attention_output_gate:
            query, key, value, *gates = self._with_gates(hidden_states)
        else:
            query, key, value, *gates = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        return query, key, value.contiguous() if self._separate_values else value, *gates

    def _with_gates(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what `get_query_key_value_tensors` does, of heads whose gates are behind their queries.

        Megatron's way has all queries of a group first, as no projection of Hugging Face has them.
        """
        mixed, _ = self.linear_qkv(hidden_states)
        channels, groups = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        asked = 2 * self.num_attention_heads_per_partition // groups * channels
        queries, key, value = mixed.unflatten(-1, (groups, -1)).split([asked, channels, channels], dim=-1)
        query, gate = queries.unflatten(-1, (-1, 2 * channels)).flatten(2, 3).chunk(2, dim=-1)
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value, gate

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Return `x` `[T, 1, a d]` times the sigmoid of its gate; Megatron compiles that, with gradients otherwise."""
        return (x * gate.flatten(2).float().sigmoid()).to(x.dtype)


class FamilyLayer(TransformerLayer):  # type: ignore[misc]
    """A layer that norms or multiplies what attention and feed-forward part return, before it is added.

    Args:
        config: The model's configuration.
        args: See TransformerLayer.
        kwargs: See TransformerLayer.
    """

    def __init__(self, config: ModelConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # Megatron's joins are made with gradients in any case, which costs nothing where no parameter takes part
        self.bias_dropout_add_exec_handler = nullcontext
        self.post_self_attn_layernorm = self.post_mlp_layernorm = torch.nn.Identity()
        if config.norms_after:
            norm = norm_of(config)
            self.post_self_attn_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)
            self.post_mlp_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attn_bda = partial(self._join, "post_self_attn_layernorm")
        self.mlp_bda = partial(self._join, "post_mlp_layernorm")

    def _join(self, norm: str, training: bool, fused: bool) -> Any:
        """Return what adds an output to the residual stream, in the place of Megatron's; nothing is dropped out."""

        def add(output_and_bias: Biased, residual: torch.Tensor, dropout: float) -> torch.Tensor:
            output, bias = output_and_bias
            output = self.get_submodule(norm)(output if bias is None else output + bias)
            return torch.add(residual, output, alpha=self.config.residual_multiplier)

        return add
