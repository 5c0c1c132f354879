"""Core attention over a packed row of documents, where Transformer Engine's is missing or takes no float32.

Tensor legend: `T` tokens of the row, `c` context-parallel ranks, `T/c` consecutive tokens of it on this rank, `n`
tokens of one document, `a` query heads and `g` key/value heads of this tensor-parallel rank, `d` channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

_SMALLEST_CHUNK = 256
"""Fewest queries handled at once under a sliding window; the mask of a chunk is [chunk, chunk + window]."""


class DocumentAttention(MegatronModule):
    """Causal attention within each document of a packed row, by torch's scaled-dot-product kernels.

    Takes the place of `DotProductAttention` in Megatron's layer specification and has its constructor. Documents are
    cut at `cu_seqlens`, so no mask over the row and no padding exist. The kernels are chosen by shapes alone: the
    result has the same bits with and without gradients.

    Context parallelism is Ulysses' (arXiv 2309.14509): one all-to-all gives each rank whole rows of `a/c` heads, a
    second one its own tokens of all heads. Key/value heads that `c` ranks cannot share are repeated before.

    Args:
        config: Megatron's configuration; `window_size=(w, 0)` lets token i see tokens i-w..i on the layers that
            `window_attn_skip_freq` selects.
        layer_number: Number of the layer, from 1.
        attn_mask_type: Always causal here, given by the layer specification.
        attention_type: Always "self" here.
        softmax_scale: Factor of the scores; None for 1/sqrt(d).
        pg_collection: Megatron's process groups; `cp` is the context-parallel one. None without any.
        kwargs: What Megatron passes besides.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        self.cp_group: dist.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        *,
        packed_seq_params: PackedSeqParams,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the attention output `[T/c, 1, a * d]` in the dtype of `query`.

        Args:
            query: `[T/c, 1, a, d]`.
            key: `[T/c, 1, g, d]`; `g` divides `a`.
            value: `[T/c, 1, g, d]`.
            attention_mask: Unused; the documents' boundaries say everything.
            packed_seq_params: `cu_seqlens_q` `[documents + 1]` int32 holds the boundaries, from 0 to T.
            kwargs: What Megatron passes to every core attention besides.
        """
        boundaries = packed_seq_params.cu_seqlens_q
        lengths = (boundaries[1:] - boundaries[:-1]).tolist()
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if self.cp_group is not None:
            query, key, value = _whole_rows(query, key, value, self.cp_group)
        documents = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        output = torch.cat([self._document(*(part.transpose(0, 1)[None] for part in parts)) for parts in documents])
        if self.cp_group is not None:
            output = _own_tokens(output, self.cp_group)
        return output.reshape(output.shape[0], 1, -1)

    def _document(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return `[n, a, d]` from query `[1, a, n, d]` and key and value `[1, g, n, d]` of one document."""
        length, window = query.shape[2], self.window
        if window is None or length <= window + 1:
            output = self._attend(query, key, value, None)
        else:
            # in chunks, so that time and memory grow with n * window instead of n * n
            chunk = max(window, _SMALLEST_CHUNK)
            outputs = []
            for start in range(0, length, chunk):
                end, first = min(start + chunk, length), max(0, start - window)
                mask = _window_mask(start, end, first, window, query.device)
                keys, values = key[:, :, first:end], value[:, :, first:end]
                outputs.append(self._attend(query[:, :, start:end], keys, values, mask))
            output = torch.cat(outputs, dim=2)
        return output[0].transpose(0, 1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if query.is_cuda and query.shape[1] != key.shape[1]:
            # with grouped heads torch has no memory-efficient kernel for float32 and would keep all scores
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )


def _whole_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup
) -> Sequence[torch.Tensor]:
    """Return this rank's heads of whole rows, `[T, a/c, d]` and twice `[T, g'/c, d]`: one all-to-all over `group`.

    Args:
        query: `[T/c, a, d]`.
        key: `[T/c, g, d]`; its heads are repeated to `g'`, the least multiple of `g` that `c` divides.
        value: `[T/c, g, d]`.
        group: The context-parallel ranks; their number divides `a`.
    """
    size, kv_heads = group.size(), key.shape[1]
    repeats = math.lcm(kv_heads, size) // kv_heads
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    by_rank = [part.unflatten(1, (size, -1)) for part in (query, key, value)]
    received = all_to_all(group, torch.cat(by_rank, dim=2).transpose(0, 1))  # [c, T/c, (a + 2 g') / c, d]
    return received.flatten(0, 1).split([part.shape[2] for part in by_rank], dim=1)


def _own_tokens(output: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return `[T/c, a, d]`, this rank's tokens of all heads, from `[T, a/c, d]`: one all-to-all over `group`."""
    received = all_to_all(group, output.unflatten(0, (group.size(), -1)))  # [c, T/c, a/c, d]
    return received.transpose(0, 1).flatten(1, 2)


def _window_mask(start: int, end: int, first: int, window: int, device: torch.device) -> torch.Tensor:
    """Return `[end - start, end - first]` bool: whether query i in start..end may see key j in first..end."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
    return (distance >= 0) & (distance <= window)
