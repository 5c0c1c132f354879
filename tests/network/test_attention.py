"""DocumentAttention against softmax attention written out, document by document, on one rank and on several."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from nemo_kto.data.batches.row_images import Picture, RowImages
from nemo_kto.network.attention import DocumentAttention, DocumentParams
from nemo_kto.network.model_config import ModelConfig

HEADS, GROUPS, CHANNELS = 4, 2, 8


def attention(
    *, layer_number: int = 1, softmax_scale: float | None = None, cp_group: Any = None, **config: object
) -> DocumentAttention:
    """Build the module as Megatron's SelfAttention does."""
    transformer = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=HEADS, **config)
    transformer.context_parallel_size = cp_group.size() if cp_group else 1
    return DocumentAttention(
        config=transformer,
        layer_number=layer_number,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=None,
        softmax_scale=softmax_scale,
        pg_collection=SimpleNamespace(cp=cp_group),
    )


def row(lengths: list[int], *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Return random query, key and value of a row of documents."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    return tuple(
        torch.randn(total, heads, CHANNELS, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    )


def run(
    module: DocumentAttention, qkv: tuple[torch.Tensor, ...], lengths: list[int], images: RowImages | None = None
) -> torch.Tensor:
    """Call the module as Megatron's SelfAttention does; returns `[T, heads * channels]`."""
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    params = DocumentParams(
        lengths=tuple(lengths),
        qkv_format="sbhd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        images=images,
    )
    query, key, value = (part[:, None] for part in qkv)
    extras = {"attn_mask_type": AttnMaskType.causal, "attention_bias": None, "packed_seq_params": params}
    output: torch.Tensor = module(query, key, value, None, **extras)
    assert output.shape == (len(query), 1, HEADS * value.shape[-1])
    return output[:, 0]


def expected(
    qkv: tuple[torch.Tensor, ...],
    lengths: list[int],
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(q k^T * scale) v over the visible tokens of each document, `[T, heads * channels]`.

    Sinks are further tokens' scores, `[heads]`, whose share is lost. Tokens of the same block, `[T]`, see each other,
    also those to come, but in block -1.
    """
    outputs = []
    if blocks is None:
        blocks = torch.full((sum(lengths),), -1)
    for query, key, value, block in zip(*(part.split(lengths) for part in (*qkv, blocks)), strict=True):
        key, value = (part.repeat_interleave(HEADS // GROUPS, dim=1) for part in (key, value))
        scores = torch.einsum("ihd,jhd->hij", query, key) * scale
        scores = scores if cap is None else torch.tanh(scores / cap) * cap
        distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
        hidden = (distance < 0) & ((block[:, None] != block) | (block < 0))
        hidden = hidden if window is None else hidden | (distance > window)
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(query), 1)], dim=-1)
        weights = scores.softmax(-1)[..., : len(query)]
        outputs.append(torch.einsum("hij,jhd->ihd", weights, value).flatten(1))
    return torch.cat(outputs)


def with_gradients(output: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return an output and the gradients of its product with random numbers."""
    factors = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    return [output, *torch.autograd.grad((output * factors).sum(), leaves)]


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_take_a_share_of_each_heads_softmax(window: int | None) -> None:
    """Also of documents of one token, which would otherwise have all of itself."""
    lengths = [7, 1, 12]
    module = attention(softmax_type="learnable", window_size=None if window is None else (window, 0))
    assert module.softmax_offset is not None
    with torch.no_grad():
        module.softmax_offset.copy_(torch.tensor([-1.0, 0.0, 0.5, 3.0]))
    qkv = row(lengths)
    leaves = [*qkv, module.softmax_offset]
    wanted = expected(qkv, lengths, scale=CHANNELS**-0.5, window=window, sinks=module.softmax_offset)
    for one, other in zip(
        with_gradients(run(module, qkv, lengths), leaves), with_gradients(wanted, leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("channels", [3, 13])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_values_may_have_other_channels(channels: int, window: int | None, cap: float | None) -> None:
    lengths = [7, 1, 12]
    size = None if window is None else (window, 0)
    module = attention(softmax_scale=0.4, window_size=size, attention_cap=cap)
    query, key, _ = row(lengths)
    value = torch.randn(20, GROUPS, channels, generator=torch.Generator().manual_seed(4)).requires_grad_()
    qkv = (query, key, value)
    wanted = expected(qkv, lengths, scale=0.4, window=window, cap=cap)
    for one, other in zip(
        with_gradients(run(module, qkv, lengths), [*qkv]), with_gradients(wanted, [*qkv]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("lengths", [[5], [1], [7, 1, 12, 3]])
def test_each_document_attends_to_itself_causally(lengths: list[int]) -> None:
    qkv = row(lengths)
    result = run(attention(), qkv, lengths)
    torch.testing.assert_close(result, expected(qkv, lengths, scale=CHANNELS**-0.5), rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [None, (6, 0)])
def test_scores_are_capped(window: tuple[int, int] | None) -> None:
    lengths = [7, 1, 280]
    qkv = row(lengths)
    direction = torch.randn(sum(lengths), HEADS * CHANNELS, generator=torch.Generator().manual_seed(1))
    result = run(attention(attention_cap=0.7, window_size=window), qkv, lengths)
    wanted = expected(qkv, lengths, scale=CHANNELS**-0.5, window=window and window[0], cap=0.7)
    torch.testing.assert_close(result, wanted, rtol=0, atol=2e-6)
    ours = torch.autograd.grad(result, qkv, direction)
    for mine, theirs in zip(ours, torch.autograd.grad(wanted, qkv, direction), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


def test_softmax_scale_replaces_the_default() -> None:
    qkv = row([9, 4])
    result = run(attention(softmax_scale=0.7), qkv, [9, 4])
    torch.testing.assert_close(result, expected(qkv, [9, 4], scale=0.7), rtol=0, atol=2e-6)


# 600 tokens are three chunks of 256 for the small window and two of 300 for the large one
@pytest.mark.parametrize("window", [0, 6, 299, 300])
@pytest.mark.parametrize("lengths", [[600, 20, 7], [8, 300]])
def test_sliding_window_sees_that_many_earlier_tokens(window: int, lengths: list[int]) -> None:
    qkv = row(lengths)
    result = run(attention(window_size=(window, 0)), qkv, lengths)
    wanted = expected(qkv, lengths, scale=CHANNELS**-0.5, window=window)
    torch.testing.assert_close(result, wanted, rtol=0, atol=2e-6)


def test_sliding_window_only_on_the_layers_that_have_one() -> None:
    qkv = row([30])
    config = {"window_size": (4, 0), "window_attn_skip_freq": [0, 1]}
    full = run(attention(layer_number=1, **config), qkv, [30])
    windowed = run(attention(layer_number=2, **config), qkv, [30])
    scale = CHANNELS**-0.5
    torch.testing.assert_close(full, expected(qkv, [30], scale=scale), rtol=0, atol=2e-6)
    torch.testing.assert_close(windowed, expected(qkv, [30], scale=scale, window=4), rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [None, (6, 0)])
def test_gradients_equal_the_written_out_form(window: tuple[int, int] | None) -> None:
    lengths = [7, 1, 280]
    qkv = row(lengths)
    direction = torch.randn(sum(lengths), HEADS * CHANNELS, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(run(attention(window_size=window), qkv, lengths), qkv, direction)
    written = expected(qkv, lengths, scale=CHANNELS**-0.5, window=window and window[0])
    for mine, theirs in zip(ours, torch.autograd.grad(written, qkv, direction), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [None, (6, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_with_and_without_gradients(window: tuple[int, int] | None, dtype: torch.dtype) -> None:
    lengths = [33, 1, 290]
    module, qkv = attention(window_size=window), row(lengths, dtype=dtype)
    with_gradients = run(module, qkv, lengths)
    with torch.no_grad():
        without = run(module, qkv, lengths)
    assert with_gradients.requires_grad and not without.requires_grad
    assert with_gradients.dtype == dtype
    assert torch.equal(with_gradients, without)


# four documents with no, two, no and three images, of which the last two follow one on another
SHOWN = [7, 33, 1, 60]
IMAGES = ((9, 5), (20, 9), (41, 12), (70, 8), (78, 9))
"""Where images begin in the row, and how many tokens they have."""


def images_of_row() -> RowImages:
    pictures = tuple(Picture(number, tokens) for number, (_, tokens) in enumerate(IMAGES))
    nowhere = torch.empty(0, dtype=torch.int64)
    return RowImages(pictures, nowhere, nowhere, tuple(start for start, _ in IMAGES))


def blocks_of_row() -> torch.Tensor:
    """Return what transformers makes of it, document by document."""
    is_image = torch.zeros(sum(SHOWN), dtype=torch.int64)
    for start, tokens in IMAGES:
        is_image[start : start + tokens] = 1
    return torch.cat([get_block_sequence_ids_for_mask(part[None])[0] for part in is_image.split(SHOWN)])


@pytest.mark.parametrize("window", [None, 4, 8, 30])
def test_tokens_of_an_image_see_each_other(window: int | None) -> None:
    """What comes, all of it, and of what came what the window reaches, as in transformers' Gemma 3."""
    size = None if window is None else (window, 0)
    module, qkv = attention(window_size=size, images_see_themselves=True), row(SHOWN)
    wanted = expected(qkv, SHOWN, scale=CHANNELS**-0.5, window=window, blocks=blocks_of_row())
    found = run(module, qkv, SHOWN, images_of_row())
    for one, other in zip(with_gradients(found, [*qkv]), with_gradients(wanted, [*qkv]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-6)
    with torch.no_grad():
        assert torch.equal(run(module, qkv, SHOWN, images_of_row()), found)
    # tokens without an image have the bits that they have without any
    plain = run(module, qkv, SHOWN)
    assert torch.equal(found[blocks_of_row() < 0], plain[blocks_of_row() < 0])
    assert not torch.equal(found, plain)


def test_in_other_models_they_do_not() -> None:
    qkv = row(SHOWN)
    assert torch.equal(run(attention(), qkv, SHOWN, images_of_row()), run(attention(), qkv, SHOWN))


def test_other_documents_do_not_change_a_single_bit() -> None:
    lengths = [12, 9, 15]
    module, qkv = attention(), row(lengths)
    alone = run(module, tuple(part[12:21] for part in qkv), [9])
    assert torch.equal(run(module, qkv, lengths)[12:21], alone)


def shares_of_a_row(dtype: torch.dtype, cap: float | None) -> tuple[torch.Tensor, ...]:
    """Return this context-parallel rank's part of the output and of the gradients of query, key and value."""
    lengths = [7, 1, 280, 12]  # the ranks' parts begin and end within documents
    size, rank = dist.get_world_size(), dist.get_rank()
    direction = torch.randn(sum(lengths), HEADS * CHANNELS, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine = [part.detach().chunk(size)[rank].requires_grad_() for part in row(lengths, dtype=dtype)]
    module = attention(cp_group=dist.group.WORLD, window_size=(30, 0), attention_cap=cap)
    output = run(module, tuple(mine), lengths)
    return output.detach(), *torch.autograd.grad(output, mine, direction.chunk(size)[rank])


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("ranks", [2, 4])  # two and four ranks for two key/value heads
def test_context_parallel_ranks_share_the_heads(run_ranks: Callable[..., Any], ranks: int, cap: float | None) -> None:
    parts = run_ranks(shares_of_a_row, ranks, torch.float32, cap)
    output, *gradients = (torch.cat(shares) for shares in zip(*parts, strict=True))
    lengths = [7, 1, 280, 12]
    qkv = row(lengths)
    direction = torch.randn(sum(lengths), HEADS * CHANNELS, generator=torch.Generator().manual_seed(1))
    wanted = expected(qkv, lengths, scale=CHANNELS**-0.5, window=30, cap=cap)
    torch.testing.assert_close(output, wanted, rtol=0, atol=2e-6)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, qkv, direction), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)
