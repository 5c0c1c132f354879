"""On CUDA key and value heads are repeated only for the kernels that would keep all scores otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nemo_kto.network.attention import DocumentParams
from tests.network.test_attention import GROUPS, HEADS, attention, row


def key_heads(dtype: torch.dtype, window: tuple[int, int] | None) -> tuple[set[int], float]:
    """Return how many heads the kernels' keys have, and how far the output is from the CPU's."""
    query, key, value = row([5, 300], dtype=dtype)
    layer = attention(window_size=window)
    seen: set[int] = set()
    kernel = F.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        seen.add(key.shape[1])
        return kernel(query, key, *arguments, **keywords)

    def output(device: str) -> torch.Tensor:
        documents = DocumentParams(lengths=(5, 300))
        parts = (part.to(device) for part in (query, key, value))
        found: torch.Tensor = layer(*parts, None, packed_seq_params=documents)
        return found.cpu()

    expected = output("cpu")
    F.scaled_dot_product_attention = watched  # type: ignore[assignment]
    return seen, float((output("cuda") - expected).abs().max())


@pytest.mark.parametrize(
    ("dtype", "window", "heads"),
    [
        pytest.param(torch.bfloat16, None, GROUPS, id="flash"),
        pytest.param(torch.float16, None, GROUPS, id="flash float16"),
        pytest.param(torch.float32, None, HEADS, id="float32"),
    ],
)
def test_heads_are_repeated_for_kernels_that_need_it(
    gpu_ranks: Callable[..., list[Any]], dtype: torch.dtype, window: tuple[int, int] | None, heads: int
) -> None:
    ((seen, error),) = gpu_ranks(key_heads, 1, dtype, window)
    assert seen == {heads}
    assert error < 1e-6 if dtype == torch.float32 else error < 1e-2


def test_under_a_sliding_window_only_whole_documents_keep_their_heads(gpu_ranks: Callable[..., list[Any]]) -> None:
    """A document shorter than the window has no mask."""
    ((seen, error),) = gpu_ranks(key_heads, 1, torch.bfloat16, (20, 0))
    assert seen == {GROUPS, HEADS} and error < 1e-2
