"""Core attention over a packed row of documents, where Transformer Engine's is missing or takes no float32.

Tensor legend: `T` tokens of the row, `c` context-parallel ranks, `T/c` consecutive tokens of it on this rank, `n`
tokens of one document, `a` query heads and `g` key/value heads of this tensor-parallel rank, `d` channels of a head,
of which values and the output may have another number.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention

from nemo_kto.algorithms.attention import Scoring, attend, attend_newest
from nemo_kto.data.batches.row_images import RowImages
from nemo_kto.network.key_value_cache import KeyValueCache
from nemo_kto.network.model_config import ModelConfig
from nemo_kto.network.sharded import mark_divided, own_state

_SMALLEST_CHUNK = 256
"""Fewest queries handled at once under a sliding window; the mask of a chunk is [chunk, chunk + window]."""


@dataclass(kw_only=True)
class DocumentParams(PackedSeqParams):  # type: ignore[misc]
    """Megatron's description of a packed row.

    Attributes:
        lengths: Tokens of each document of the whole row, as numbers: a layer that asked the device for them would
            wait until it has computed all layers before.
        images: The images of the row; None for none.
        rotary_positions: See `PackedRow`.
    """

    lengths: tuple[int, ...]
    images: RowImages | None = None
    rotary_positions: torch.Tensor | None = None


@dataclass(kw_only=True)
class CachedRowParams(DocumentParams):
    """The description of a packed row whose documents are to go on.

    Attributes:
        cache: Where their keys and values are kept; None to keep none.
    """

    cache: KeyValueCache | None = None


class DocumentAttention(MegatronModule):
    """Causal attention within each document of a packed row, by torch's scaled-dot-product kernels.

    Takes the place of `DotProductAttention` in Megatron's layer specification and has its constructor. Documents are
    cut by their lengths, so no mask over the row and no padding exist. The kernels are chosen by shapes alone: the
    result has the same bits with and without gradients. What they cannot do is done by `algorithms/attention.py`.

    Context parallelism is Ulysses' (arXiv 2309.14509): one all-to-all gives each rank whole rows of `a/c` heads, a
    second one its own tokens of all heads. Key/value heads that `c` ranks cannot share are repeated before.

    Args:
        config: The model's configuration; `window_size=(w, 0)` lets token i see tokens i-w..i on the layers that
            `window_attn_skip_freq` selects; `attention_cap` caps the scores; with `softmax_type="learnable"` each head
            has a sink.
        layer_number: Number of the layer, from 1.
        attn_mask_type: Always causal here, given by the layer specification.
        attention_type: Always "self" here.
        softmax_scale: Factor of the scores; None for 1/sqrt(d).
        pg_collection: Megatron's process groups; `cp` is the context-parallel one. None without any.
        kwargs: What Megatron passes besides.

    Attributes:
        softmax_offset: The sinks `[a]`, see `algorithms.attention.attend`; None for none.
    """

    softmax_offset: torch.nn.Parameter | None

    def __init__(
        self,
        config: ModelConfig,
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
        self.tp_group = getattr(pg_collection, "tp", None)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0]
        self._scoring: Scoring | None = None
        sinks = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            sinks = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
            mark_divided(sinks, dim=0)
        self.register_parameter("softmax_offset", sinks)  # Transformer Engine's name
        if config.attention_cap is not None or sinks is not None:
            scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
            self._scoring = Scoring(scale, self.window, config.attention_cap)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        *,
        packed_seq_params: DocumentParams,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the attention output `[T/c, 1, a * d]` in the dtype of `query`.

        Args:
            query: `[T/c, 1, a, d]`.
            key: `[T/c, 1, g, d]`; `g` divides `a`.
            value: `[T/c, 1, g, d]`.
            attention_mask: Unused; the documents' boundaries say everything.
            packed_seq_params: The documents' `lengths`, T together. With the `cache` of `CachedRowParams`, passes
                after its first one are of one new token per document.
            kwargs: What Megatron passes to every core attention besides.
        """
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.cp_group is not None:
            query, key, value = _whole_rows(query, key, value, self.cp_group)
        cache = packed_seq_params.cache if isinstance(packed_seq_params, CachedRowParams) else None
        if cache is not None and cache.holds(self.layer_number):
            output = self._newest_tokens(query, key, value, cache)
        else:
            blocks = self._blocks(packed_seq_params)
            output = self._documents(query, key, value, packed_seq_params.lengths, blocks)
            if cache is not None:
                cache.start(self.layer_number, key, value)
        if self.cp_group is not None:
            output = own_tokens(output, self.cp_group)
        return output.reshape(output.shape[0], 1, -1)

    def _sinks(self) -> torch.Tensor | None:
        """Return the sinks `[a/c]` of the heads that this rank has of whole rows."""
        if self.softmax_offset is None or self.cp_group is None:
            return self.softmax_offset
        return self.softmax_offset.chunk(self.cp_group.size())[self.cp_group.rank()]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Any] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return Megatron's, with the sinks divided as the heads are."""
        if self.softmax_offset is None:
            return {}
        return own_state(self, prefix, sharded_offsets, metadata, divided={"softmax_offset": 0})

    def _blocks(self, row: DocumentParams) -> list[list[slice]]:
        """Return the tokens of each document that see each other in both directions, block by block."""
        if row.images is None or not self.config.images_see_themselves:
            return [[] for _ in row.lengths]
        return blocks_of_images(row.images, row.lengths)

    def _documents(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Sequence[int],
        blocks: Sequence[Sequence[slice]],
    ) -> torch.Tensor:
        """Return `[T, a, d]` from query `[T, a, d]` and key and value `[T, g, d]` of documents that attend apart."""
        documents = zip(query.split(lengths), key.split(lengths), value.split(lengths), blocks, strict=True)
        outputs = [self._document(*(part.transpose(0, 1)[None] for part in parts), own) for *parts, own in documents]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]  # the one that attention keeps: not another one

    def _newest_tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: KeyValueCache
    ) -> torch.Tensor:
        """Return `[T, a, d]` for the newest token of each document; zeros for tokens that fill up the row."""
        keys, values = cache.append(self.layer_number, key, value)
        output = query.new_zeros(*query.shape[:2], value.shape[-1])
        documents = len(keys)
        if documents and self._scoring is not None:
            visible = cache.visible(self.window)
            scored = (visible, self._scoring, self._sinks())
            output[:documents] = attend_newest(query[:documents], keys, values, *scored)
        elif documents:
            # the query heads that share keys are as good as so many queries with the same mask: nothing is repeated
            grouped = query[:documents].unflatten(1, (keys.shape[1], -1))
            mask = cache.visible(self.window)[:, None, None]
            attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=self.softmax_scale)
            output[:documents] = attended.flatten(1, 2)
        return output

    def _document(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Sequence[slice]
    ) -> torch.Tensor:
        """Return `[n, a, d]` from query `[1, a, n, d]` and key and value `[1, g, n, d]` of one document."""
        length, window = query.shape[2], self.window
        if self._scoring is not None:
            output = attend(query[0], key[0], value[0], self._scoring, self._sinks())[None]
        elif window is None or length <= window + 1:
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
        if blocks:
            output = self._with_blocks(output, query, key, value, blocks)
        return output.squeeze(0).transpose(0, 1)

    def _with_blocks(
        self,
        output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: Sequence[slice],
    ) -> torch.Tensor:
        """Return `[1, a, n, d]`, the output with that of the tokens of blocks in its place, see `_document`.

        A token of a block sees all of the block that is still to come, and before it what any token sees.
        """
        assert self._scoring is None, "no model has images that see themselves and caps or sinks"
        parts, done = [], 0
        for block in blocks:
            first = 0 if self.window is None else max(0, block.start - self.window)
            mask = None
            if self.window is not None and block.stop - 1 - first > self.window:
                places = torch.arange(first, block.stop, device=query.device)
                mask = places[block.start - first :, None] - places <= self.window
            seen = key[:, :, first : block.stop], value[:, :, first : block.stop]
            parts += [output[:, :, done : block.start], self._attend(query[:, :, block], *seen, mask, causal=False)]
            done = block.stop
        return torch.cat([*parts, output[:, :, done:]], dim=2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        causal: bool = True,
    ) -> torch.Tensor:
        """Return `[1, a, n, d]`; without a mask a token sees itself and those before, unless not `causal`."""
        if query.shape[1] != key.shape[1] and not _takes_grouped_heads(query, mask):
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        channels = value.shape[-1]
        if query.shape[-1] != channels:
            # no kernel that does without all scores takes values of another width: channels of zeros change nothing
            assert self.softmax_scale is not None, "it would depend on them"
            widest = max(query.shape[-1], channels)
            query, key, value = (F.pad(part, (0, widest - part.shape[-1])) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return attended[..., :channels]


def blocks_of_images(images: RowImages, lengths: Sequence[int]) -> list[list[slice]]:
    """Return, for each document of a row, where in it the tokens of its images are; of neighbours together.

    As transformers has it (`get_block_sequence_ids_for_mask` of Gemma 3), for which images that follow one on another
    are one.
    """
    assert len(images.starts) == len(images.pictures), (images.starts, len(images.pictures))
    found: list[list[slice]] = [[] for _ in lengths]
    ends = list(itertools.accumulate(lengths))
    for picture, start in zip(images.pictures, images.starts, strict=True):
        document = bisect.bisect_right(ends, start)
        start -= ends[document] - lengths[document]
        end, blocks = start + picture.num_tokens, found[document]
        if blocks and blocks[-1].stop == start:
            start = blocks.pop().start
        blocks.append(slice(start, end))
    return found


def _takes_grouped_heads(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether torch has a kernel for fewer key than query heads that does not keep all scores.

    On CUDA that is flash attention alone (torch 2.13, sdp_utils.cpp): in half precision, without a mask, with up to
    256 channels, from Ampere on.
    """
    if not query.is_cuda:
        return True
    return suits_flash_attention(query, mask) and torch.cuda.get_device_capability(query.device)[0] >= 8


def suits_flash_attention(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether flash attention on CUDA takes such queries, from Ampere on."""
    return query.dtype != torch.float32 and mask is None and query.shape[-1] <= 256


def _whole_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup
) -> Sequence[torch.Tensor]:
    """Return this rank's heads of whole rows, `[T, a/c, d]` and twice `[T, g'/c, d]`: one all-to-all over `group`.

    Values may have other channels than queries and keys have.

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
    by_rank = [part.unflatten(1, (size, -1)).flatten(2) for part in (query, key, value)]
    received = all_to_all(group, torch.cat(by_rank, dim=2).transpose(0, 1))  # [c, T/c, (a + 2 g') / c * d]
    parts = received.flatten(0, 1).split([part.shape[2] for part in by_rank], dim=1)
    return [part.unflatten(1, (-1, own.shape[-1])) for part, own in zip(parts, (query, key, value), strict=True)]


def own_tokens(output: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return `[T/c, a, d]`, this rank's tokens of all heads, from `[T, a/c, d]`: one all-to-all over `group`."""
    received = all_to_all(group, output.unflatten(0, (group.size(), -1)))  # [c, T/c, a/c, d]
    return received.transpose(0, 1).flatten(1, 2)


def _window_mask(start: int, end: int, first: int, window: int, device: torch.device) -> torch.Tensor:
    """Return `[end - start, end - first]` bool: whether query i in start..end may see key j in first..end."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
    return (distance >= 0) & (distance <= window)
