"""Attention over packed rows of documents: the product's way beside torch's others, forward and forward + backward.

python benchmarks/attention.py [--rounds N]

Two rows: documents as short as feedback (30 to 430 tokens, 230 on average), and long ones (2k to 4k). All ways start
from the same queries, keys and values, have fewer key/value heads than query heads, and are checked against torch's
`scaled_dot_product_attention` of each document alone, outputs and gradients, before anything is timed.

* per document: the product's `DocumentAttention`, one call of torch's kernel per document.
* nested: one call on nested (jagged) tensors; key/value heads are repeated, as it takes no groups.
* padded: one call on documents padded to the longest, with a mask; padding and taking out are counted.
* masked row: one call on the whole row with a mask of [tokens, tokens].
* flex: FlexAttention, compiled, with the documents as its block mask, which is made once per row and not timed.
* varlen: `torch.nn.attention.varlen`, a kernel that takes boundaries; CUDA only.

A way that does not run here has the reason in its cell. float32 on a CPU, bfloat16 on a GPU. It does not show the rest
of a layer, nor the memory of the masks.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, median_and_range, publish

HEADS, GROUPS, CHANNELS = 8, 4, 64
LENGTHS = {
    "short, mean 230": (230, 30, 430, 145, 315, 90, 370, 230),
    "long, 2k to 4k": (2048, 4096, 3000),
}
TIMED = ("forward", "forward + backward")
LONGEST_REASON = 90

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps query `[T, a, d]`, key and value `[T, g, d]` to output `[T, a, d]`."""


@dataclass(frozen=True)
class Row:
    """The documents of a row.

    Attributes:
        lengths: Tokens of each.
        boundaries: `[documents + 1]` int32, from 0 to T.
        documents: `[T]` int64, the document of each token.
    """

    lengths: tuple[int, ...]
    boundaries: torch.Tensor
    documents: torch.Tensor


def main() -> None:
    """Check and time all ways on both rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = [line for title in LENGTHS for line in measure(title, options.rounds)]
    publish("attention", rows, lengths=LENGTHS, heads=HEADS, key_value_heads=GROUPS, channels=CHANNELS)


def measure(title: str, rounds: int) -> list[dict[str, str]]:
    """Return the lines of one row of documents."""
    row = row_of(LENGTHS[title])
    inputs = inputs_of(row)
    ways = {name: make(row) for name, make in WAYS.items()}
    cells: dict[str, dict[str, str]] = {name: {} for name in ways}
    for timed in TIMED:
        run = {"forward": forward, "forward + backward": forward_backward}[timed]
        runs: dict[str, Callable[[], object]] = {}
        for name, way in ways.items():
            reason = way if isinstance(way, str) else refusal(partial(run, way, inputs))
            if reason is not None:
                cells[name][timed] = reason
                continue
            assert not isinstance(way, str)
            check(name, way, row, inputs, with_gradients=timed != "forward")
            runs[name] = partial(run, way, inputs)
        seconds = interleaved(runs, rounds)
        ours = statistics.median(seconds["per document"])
        for name, found in seconds.items():
            milliseconds = median_and_range([1e3 * one for one in found], 1)
            cells[name][timed] = f"{milliseconds} ms, {statistics.median(found) / ours:.2f} x"
    return [{"documents": title, "way": name, **cells[name]} for name in ways]


def refusal(run: Callable[[], object]) -> str | None:
    """Return why torch does not do something here, in its own words; None if it does."""
    try:
        run()
    except Exception as error:  # torch has many kinds of errors for "not here", its compiler its own
        text = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
        return text[:LONGEST_REASON]
    return None


def forward(way: Attend, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the output, without gradients."""
    with torch.no_grad():
        return way(*inputs[:3])


def forward_backward(way: Attend, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return the output and the gradients of query, key and value."""
    *given, seed = inputs
    output = way(*given)
    return output, *torch.autograd.grad(output, given, seed)


def check(name: str, way: Attend, row: Row, inputs: tuple[torch.Tensor, ...], *, with_gradients: bool) -> None:
    """Raise an AssertionError unless a way agrees with each document attended to alone."""
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if inputs[0].dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
    run = forward_backward if with_gradients else forward
    torch.testing.assert_close(
        run(way, inputs), run(partial(alone, row), inputs), **tolerance, msg=lambda text: f"{name}: {text}"
    )


def row_of(lengths: tuple[int, ...]) -> Row:
    """Return a row of documents."""
    counts = torch.tensor(lengths, device=device())
    boundaries = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return Row(lengths, boundaries, torch.repeat_interleave(torch.arange(len(lengths), device=device()), counts))


def inputs_of(row: Row) -> tuple[torch.Tensor, ...]:
    """Return query `[T, a, d]`, key and value `[T, g, d]`, which want gradients, and the output's gradient."""
    generator, tokens = torch.Generator().manual_seed(0), sum(row.lengths)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    tensors = [torch.randn(tokens, n, CHANNELS, generator=generator) for n in (HEADS, GROUPS, GROUPS, HEADS)]
    *given, seed = (tensor.to(device(), dtype) for tensor in tensors)
    return *(tensor.requires_grad_() for tensor in given), seed


def device() -> str:
    """Return where the tensors are."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# ways: each is made for a row and is an `Attend`, or the reason why there is none


def alone(row: Row, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return what all ways are checked against."""
    parts = zip(*(tensor.split(row.lengths) for tensor in (query, key, value)), strict=True)
    heads_first = [[part.transpose(0, 1)[None] for part in document] for document in parts]
    outputs = [F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True) for parts in heads_first]
    return torch.cat([output[0].transpose(0, 1) for output in outputs])


def per_document(row: Row) -> Attend:
    """Return the product's attention."""
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_kto.network.attention import DocumentAttention, DocumentParams
    from nemo_kto.network.model_config import ModelConfig

    config = ModelConfig(
        num_layers=1, hidden_size=HEADS * CHANNELS, num_attention_heads=HEADS, num_query_groups=GROUPS
    )
    attention = DocumentAttention(config, 1, AttnMaskType.causal, "self")
    documents = DocumentParams(lengths=tuple(row.boundaries.diff().tolist()))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = attention(query[:, None], key[:, None], value[:, None], None, packed_seq_params=documents)
        return output.reshape(query.shape)

    return attend


def nested(row: Row) -> Attend:
    """Return attention on nested tensors."""
    offsets, shortest, longest = row.boundaries.to(torch.int64), min(row.lengths), max(row.lengths)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (part.repeat_interleave(HEADS // GROUPS, dim=1) for part in (key, value))
        parts = [
            torch.nested.nested_tensor_from_jagged(part, offsets, min_seqlen=shortest, max_seqlen=longest)
            for part in (query, key, value)
        ]
        output = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts), is_causal=True)
        return output.transpose(1, 2).values()

    return attend


def padded(row: Row) -> Attend:
    """Return attention on padded documents; filling in and taking out are part of it."""
    longest, number = max(row.lengths), len(row.lengths)
    place = torch.arange(longest, device=device())
    real = place < torch.tensor(row.lengths, device=device())[:, None]  # [b, m]
    mask = (place[:, None] >= place) & real[:, None, None, :]  # [b, 1, m, m]

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.new_zeros(number, longest, *tensor.shape[1:])
        return whole.masked_scatter(real[:, :, None, None], tensor).transpose(1, 2)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        given = (filled(part) for part in (query, key, value))
        output = F.scaled_dot_product_attention(*given, attn_mask=mask, enable_gqa=True)
        return output.transpose(1, 2)[real]

    return attend


def masked_row(row: Row) -> Attend:
    """Return attention over the whole row with a mask."""
    place = torch.arange(row.documents.numel(), device=device())
    mask = (place[:, None] >= place) & (row.documents[:, None] == row.documents)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        given = (part.transpose(0, 1)[None] for part in (query, key, value))
        return F.scaled_dot_product_attention(*given, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def flex(row: Row) -> Attend:
    """Return FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, documents = row.documents.numel(), row.documents

    def visible(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (documents[query] == documents[key])

    block_mask = create_block_mask(visible, None, None, tokens, tokens, device=device())
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        given = (part.transpose(0, 1)[None] for part in (query, key, value))
        return compiled(*given, block_mask=block_mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def varlen(row: Row) -> Attend | str:
    """Return torch's attention that takes boundaries."""
    if not torch.cuda.is_available():
        return "needs CUDA"
    try:
        attend_varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has none"
    longest = max(row.lengths)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (part.repeat_interleave(HEADS // GROUPS, dim=1) for part in (key, value))
        bounds = row.boundaries
        output: torch.Tensor = attend_varlen(query, key, value, bounds, bounds, longest, longest, is_causal=True)
        return output

    return attend


WAYS: dict[str, Callable[[Row], Attend | str]] = {
    "per document": per_document,
    "nested": nested,
    "padded": padded,
    "masked row": masked_row,
    "flex": flex,
    "varlen": varlen,
}


if __name__ == "__main__":
    main()
