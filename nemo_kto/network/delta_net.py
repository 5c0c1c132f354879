"""Gated DeltaNet (arXiv 2412.06464), linear attention in the place of self-attention, as Qwen3-Next has it.

Megatron's own takes no packed rows and cannot do without the package fla. Here documents are cut by their lengths;
where fla and causal_conv1d can be imported, their kernels are used in half precision.

Tensor legend: `T` tokens of a packed row, `c` context-parallel ranks, `T/c` consecutive tokens of it on this rank,
`T/t` those between the layers that tensor-parallel ranks share, `h` hidden size, `i` key heads of this rank, `j` value
heads, `x` channels of a query and of a key, `y` of a value, `w` tokens that the convolution sees, `f` its channels,
i (2 x + j/i y), `b` documents that go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import all_to_all, copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule

from nemo_kto.algorithms.delta_rule import (
    causal_convolution,
    convolve_newest,
    delta_rule_step,
    gated_delta_rule,
    repeated,
)
from nemo_kto.algorithms.pointwise import rms_norm
from nemo_kto.network.attention import CachedRowParams, DocumentParams, own_tokens
from nemo_kto.network.key_value_cache import KeyValueCache
from nemo_kto.network.model_config import ModelConfig
from nemo_kto.network.sharded import mark_divided, own_state

try:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
except ImportError:
    chunk_gated_delta_rule = None
try:
    from causal_conv1d import causal_conv1d_fn
except ImportError:
    causal_conv1d_fn = None


class GatedDeltaNet(MegatronModule):
    """Linear attention within each document of a packed row; it has the constructor of Megatron's attention.

    Tensor-parallel ranks share key heads, each with its value heads. Context-parallel ones share tokens, and in
    between, after one all-to-all, the heads: a second one gives each its own tokens again.

    Args:
        config: The model's configuration, with `delta`.
        layer_number: Number of the layer, from 1.
        pg_collection: Megatron's process groups.
        kwargs: What Megatron passes besides.

    Attributes:
        conv_weight: `[f, 1, w]`, the channels of each key head and its values together.
        A_log: `[j]`, logarithms of how fast states decay.
        dt_bias: `[j]`, added to what a token says of that.
        gated_norm_weight: `[y]`, whole on every rank.
    """

    def __init__(self, config: ModelConfig, *, layer_number: int, pg_collection: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        assert config.delta is not None
        self._delta = delta = config.delta
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.cp_group: dist.ProcessGroup | None = pg_collection.cp if config.context_parallel_size > 1 else None
        self._key_heads = delta.key_heads // config.tensor_model_parallel_size
        self._shared = delta.value_heads // delta.key_heads
        self._seen = 2 * delta.key_channels + delta.values_of_key_head
        of_head = self._seen + delta.values_of_key_head + 2 * self._shared
        values = delta.value_heads * delta.value_channels
        settings = {"config": config, "bias": False, "tp_group": self.tp_group}
        self.in_proj = ColumnParallelLinear(
            config.hidden_size,
            delta.key_heads * of_head,
            init_method=config.init_method,
            gather_output=False,
            **settings,
        )
        self.out_proj = RowParallelLinear(
            values,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **settings,
        )
        heads = self._key_heads * self._shared
        self.conv_weight = self._divided(self._key_heads * self._seen, 1, delta.window)
        self.A_log, self.dt_bias = self._divided(heads), self._divided(heads)
        self.gated_norm_weight = torch.nn.Parameter(torch.ones(delta.value_channels, dtype=config.params_dtype))

    def _divided(self, *shape: int) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=self.config.params_dtype))
        mark_divided(parameter, dim=0)
        return parameter

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Any] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return Megatron's, with what heads have divided as they are."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        names = ("conv_weight", "A_log", "dt_bias")
        return state | own_state(self, prefix, sharded_offsets, metadata, divided=dict.fromkeys(names, 0))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: DocumentParams,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return Megatron's (output `[T/t, 1, h]`, bias).

        Args:
            hidden_states: `[T/t, 1, h]`.
            attention_mask: Unused.
            packed_seq_params: The documents of the row. With the `cache` of `CachedRowParams`, passes after its first
                one are of one new token per document.
            kwargs: What Megatron passes to every attention besides.
        """
        projected, _ = self.in_proj(hidden_states)
        by_head = projected.squeeze(1).unflatten(-1, (self._key_heads, -1))
        seen, gates, rates = by_head.split([self._seen, self._delta.values_of_key_head, 2 * self._shared], dim=-1)
        seen = torch.cat([seen, rates], dim=-1)  # [T/c, i, 2 x + j/i (y + 2)]
        if self.cp_group is not None:
            seen = _whole_rows(seen, self.cp_group)
        weights = self._weights_of_rank()
        cache = packed_seq_params.cache if isinstance(packed_seq_params, CachedRowParams) else None
        if cache is not None and cache.holds(self.layer_number):
            output = self._newest_tokens(seen, *weights, cache)
        elif cache is None and self._recomputes and torch.is_grad_enabled():
            output = tensor_parallel.checkpoint(
                lambda *parts: self._documents(*parts, packed_seq_params, None), False, seen, *weights
            )
        else:
            output = self._documents(seen, *weights, packed_seq_params, cache)
        if self.cp_group is not None:
            output = own_tokens(output, self.cp_group)
        found: tuple[torch.Tensor, torch.Tensor | None] = self.out_proj(self._gated(output, gates))
        return found

    @property
    def _recomputes(self) -> bool:
        config = self.config
        return config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules

    def _weights_of_rank(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `conv_weight` `[f, w]`, `A_log` and `dt_bias` of the heads that this rank has of whole rows."""
        weights = (self.conv_weight.squeeze(1), self.A_log, self.dt_bias)
        if self.cp_group is None:
            return weights
        one, two, three = (weight.chunk(self.cp_group.size())[self.cp_group.rank()] for weight in weights)
        return one, two, three

    def _split(self, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what is convolved `[T, f]`, and what says how much is written and how much decays, `[T, j]` each."""
        convolved, writes, decays = seen.split([self._seen, self._shared, self._shared], dim=-1)
        return convolved.flatten(1), writes.flatten(1), decays.flatten(1)

    def _by_head(self, convolved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries and keys `[T, i, x]` and values `[T, j, y]`."""
        delta = self._delta
        query, key, value = convolved.unflatten(-1, (-1, self._seen)).split(
            [delta.key_channels, delta.key_channels, delta.values_of_key_head], dim=-1
        )
        return query, key, value.unflatten(-1, (-1, delta.value_channels)).flatten(1, 2)

    def _documents(
        self,
        seen: torch.Tensor,
        conv_weight: torch.Tensor,
        decay_rates: torch.Tensor,
        dt_bias: torch.Tensor,
        row: DocumentParams,
        cache: KeyValueCache | None,
    ) -> torch.Tensor:
        """Return `[T, j, y]` of whole documents; their states go into the cache, if there is one."""
        inputs, writes, decays = self._split(seen)
        convolved = self._convolve(inputs, conv_weight, row)
        parts = (*self._by_head(convolved), _log_decay(decays, decay_rates, dt_bias), writes.sigmoid())
        output, states = self._rule(parts, row)
        if cache is not None:
            before = self._delta.window - 1
            lengths = row.lengths[: cache.documents]
            newest = [
                F.pad(part[max(0, length - before) :], (0, 0, max(0, before - length), 0))
                for part, length in zip(inputs.split(row.lengths), lengths, strict=False)
            ]
            pasts = torch.stack(newest) if newest else inputs.new_zeros(0, before, inputs.shape[1])
            cache.hold(self.layer_number, (pasts, states[: cache.documents]))
        return output

    def _newest_tokens(
        self,
        seen: torch.Tensor,
        conv_weight: torch.Tensor,
        decay_rates: torch.Tensor,
        dt_bias: torch.Tensor,
        cache: KeyValueCache,
    ) -> torch.Tensor:
        """Return `[T, j, y]` for the newest token of each document; zeros for tokens that fill up the row."""
        pasts, states = cache.held(self.layer_number)
        inputs, writes, decays = (part[: cache.documents] for part in self._split(seen))
        window = torch.cat([pasts, inputs[:, None]], dim=1)
        parts = self._by_head(convolve_newest(window, conv_weight))
        output, states = delta_rule_step(*parts, _log_decay(decays, decay_rates, dt_bias), writes.sigmoid(), states)
        cache.hold(self.layer_number, (window[:, 1:], states))
        return F.pad(output, (0, 0, 0, 0, 0, len(seen) - len(output)))

    def _convolve(self, inputs: torch.Tensor, weight: torch.Tensor, row: DocumentParams) -> torch.Tensor:
        """Return the convolution `[T, f]` of `inputs` `[T, f]`."""
        boundaries = row.cu_seqlens_q
        places = torch.arange(len(inputs), device=inputs.device)
        documents = torch.bucketize(places, boundaries[1:], right=True)
        # what the kernel takes (causal_conv1d 1.5)
        suits = self._takes_kernels(inputs) and weight.shape[1] in (2, 3, 4) and not weight.shape[0] % 8
        if suits and causal_conv1d_fn is not None:
            numbers = documents[None].int()
            found = causal_conv1d_fn(inputs.T[None], weight, None, seq_idx=numbers, activation="silu")
            return found[0].T  # type: ignore[no-any-return]
        return causal_convolution(inputs, weight, places - boundaries[documents])

    def _takes_kernels(self, inputs: torch.Tensor) -> bool:
        """Return whether kernels are used: fla's refuses float32, and neither has one order of additions."""
        return inputs.is_cuda and inputs.dtype != torch.float32 and not self.config.deterministic_mode

    def _rule(self, parts: tuple[torch.Tensor, ...], row: DocumentParams) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `gated_delta_rule` does, by fla's kernel if that can be."""
        query, key, value, log_decay, beta = parts
        if chunk_gated_delta_rule is None or not self._takes_kernels(value):
            return gated_delta_rule(query, key, value, log_decay, beta, lengths=row.lengths)
        output, states = chunk_gated_delta_rule(
            repeated(query, value)[None],
            repeated(key, value)[None],
            value[None],
            g=log_decay[None],
            beta=beta[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=row.cu_seqlens_q.long(),
        )
        return output[0], states

    def _gated(self, output: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Return `[T/c, 1, j y]`: the normed output `[T/c, j, y]` times silu of the gates `[T/c, i, j/i y]`."""
        weight = self.gated_norm_weight
        if self.tp_group.size() > 1:
            # each rank has the gradient of its heads; the tokens are all of them
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        normed = rms_norm(output, weight, self.config.layernorm_epsilon)
        gated = normed * F.silu(gates.reshape(output.shape).float())
        return gated.to(output.dtype).flatten(1)[:, None]


def _log_decay(decays: torch.Tensor, rates: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return `[T, j]` float32: minus exp(A_log) softplus(what the token says + bias), as in Mamba (eq. 4)."""
    return -rates.float().exp() * F.softplus(decays.float() + bias)


def _whole_rows(seen: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return `[T, i/c, ...]`, this rank's heads of whole rows, from `[T/c, i, ...]`: one all-to-all over `group`."""
    received = all_to_all(group, seen.unflatten(1, (group.size(), -1)).transpose(0, 1))  # [c, T/c, i/c, ...]
    return received.flatten(0, 1)  # type: ignore[no-any-return]
