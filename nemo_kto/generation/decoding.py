"""Answers of the live model to prompts, token by token, under every layout.

Every process knows all prompts and all answers so far. The prompts are dealt to the data-parallel replicas, and each
replica's to as many packed rows as the pipeline has stages, so that these work at the same time. For each new token
the rows go through Megatron's schedule: whole at first, then, where keys and values are kept, as one token per
document. The last stage chooses the next tokens, and one all-reduce tells everyone. So all processes see at the same
time which answers have ended, and run equally many passes, as experts shared by several replicas need it.

Megatron-Core has engines of its own (0.16.1): the dynamic one needs flash-attn and CUDA, the static one takes neither
packed rows nor context parallelism nor interleaved stages, and asserts CUDA between pipeline stages.

Tensor legend: `T` tokens of a packed row, `c` context-parallel ranks, which hold `T/c` tokens each, `b` documents of a
row or of all rows of a replica, `h` hidden size, `v` tokens of the vocabulary, `v/t` rows of the padded vocabulary on
this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from nemo_kto.data.batches.packed_rows import PackedRow
from nemo_kto.errors import ConfigError, DataError
from nemo_kto.generation.rows import Prompt, Row
from nemo_kto.kto.scoring import boundaries, part_of, rows_known, unwrapped
from nemo_kto.network.attention import CachedRowParams
from nemo_kto.network.gpt import tensor_generator
from nemo_kto.network.key_value_cache import KeyValueCache
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.parallel import RankPosition

_AT_ONCE = 64
"""Prompts a replica works on together: enough to fill it, few enough for the memory of keys and values."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Longest answer, at least 1; its stop token counts.
        temperature: Logits are divided by it; 0 takes the most probable token.
        top_p: Only the most probable tokens that together reach this probability are drawn (arXiv 1904.09751).
        seed: What the draws depend on, beside the numbers of the prompt and of the token.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise a ConfigError for numbers that nothing can be drawn with."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature} must be a number of at least 0.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1.")


@torch.no_grad()
def generate(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    stop_token_ids: frozenset[int],
    layout: Layout,
    place: RankPosition,
    use_cache: bool | None = None,
) -> list[list[int]]:
    """Return the answers to `prompts`, on every process; all of them call it with the same arguments.

    An answer ends with the first stop token, after `max_new_tokens`, or where the model has no more positions. Of many
    prompts, some at a time are worked on.

    Each part takes a forward-only pass of Megatron's schedule per token of the longest answer, and with each pass one
    all-reduce of an integer per prompt over all processes, one all-gather of `[b, v/t]` logits over the
    tensor-parallel ranks and, with context parallelism, one all-reduce of `[b, h]` per row.

    Args:
        chunks: The chunks of the live model on this process, wrapped for data parallelism or not.
        prompts: What is answered.
        sampling: How tokens are chosen.
        stop_token_ids: Tokens that end an answer.
        layout: The layout.
        place: This process's place in it.
        use_cache: Keep keys and values, which only `DocumentAttention` can, so that a pass is of one token per
            document; False to score whole documents for each token. None to keep them wherever that is possible.

    Returns:
        Token ids of each answer, without the prompt, with the stop token if there was one.

    Raises:
        DataError: A prompt is empty, leaves no room for an answer, or holds a token that the model lacks.
    """
    model = unwrapped(chunks[0])
    cached = model.attends_by_document if use_cache is None else use_cache
    assert model.attends_by_document or not cached, "only DocumentAttention keeps keys and values"
    _check_prompts(prompts, model.max_sequence_length, model.vocab_size)
    scorer = _NextTokenScorer(chunks=chunks, place=place, layout=layout)
    size = _AT_ONCE * place.dp_size
    answers: list[list[int]] = []
    for first in range(0, len(prompts), size):
        answers += _answer(scorer, prompts[first : first + size], first, sampling, stop_token_ids, cached=cached)
        for chunk in map(unwrapped, chunks):
            if chunk.vision is not None:
                chunk.vision.forget()
    return answers


def _answer(
    scorer: _NextTokenScorer,
    prompts: Sequence[Prompt],
    first: int,
    sampling: Sampling,
    stop_token_ids: frozenset[int],
    *,
    cached: bool,
) -> list[list[int]]:
    """Return the answers to some prompts, of which the first has number `first`."""
    place, longest = scorer.place, unwrapped(scorer.chunks[0]).max_sequence_length
    texts: list[list[int]] = [prompt.tokens.tolist() for prompt in prompts]
    limits = [min(len(text) + sampling.max_new_tokens, longest) for text in texts]
    rotary = unwrapped(scorer.chunks[0]).rotary
    switches = frozenset() if rotary is None else rotary.switches
    rows = _deal(prompts, texts, scorer.layout, place, cached=cached, switches=switches)
    unfinished = set(range(len(texts)))
    while unfinished:
        logits = scorer.logits(rows)
        newest = torch.zeros(len(texts), dtype=torch.int64, device=scorer.device)
        if logits is not None and place.reports:
            numbers = [number for row in rows for number in row.numbers]
            steps = [len(texts[number]) - prompts[number].tokens.numel() for number in numbers]
            newest[numbers] = next_tokens(logits, sampling, [first + number for number in numbers], steps)
        dist.all_reduce(newest)
        tokens = newest.tolist()
        for number in unfinished:
            texts[number].append(tokens[number])
        unfinished = {n for n in unfinished if tokens[n] not in stop_token_ids and len(texts[n]) < limits[n]}
        for row in rows:
            row.go_on(unfinished)
    return [text[prompt.tokens.numel() :] for text, prompt in zip(texts, prompts, strict=True)]


def next_tokens(
    logits: torch.Tensor, sampling: Sampling, prompts: Sequence[int], steps: Sequence[int]
) -> torch.Tensor:
    """Return the next token `[b]` int64 of each document.

    A draw depends on the seed and on the numbers of the prompt and of the token alone. So layouts, whose logits differ
    by rounding, draw the same token, unless a draw falls into the width of that rounding between two tokens.

    Args:
        logits: `[b, v]` float32.
        sampling: How to choose.
        prompts: Number of each document's prompt.
        steps: Number of the token in each document's answer, from 0.
    """
    if sampling.temperature == 0 or not prompts:
        return logits.argmax(dim=-1)
    no_tokens: Any = None  # the warpers look at the logits only
    scores = TemperatureLogitsWarper(sampling.temperature)(no_tokens, logits)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(no_tokens, scores)
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)  # float32 loses the tail of a large vocabulary
    generators = [
        tensor_generator(sampling.seed, f"answer {number}, token {step}")
        for number, step in zip(prompts, steps, strict=True)
    ]
    draws = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    places = draws.to(cumulative)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, places, right=True)[:, 0]
    return drawn.clamp_(max=logits.shape[1] - 1)  # a diverged model's logits are no numbers: any token will do


def _check_prompts(prompts: Sequence[Prompt], max_positions: int, vocab_size: int) -> None:
    for number, prompt in enumerate(prompts, 1):
        length = prompt.tokens.numel()
        if not 0 < length < max_positions:
            raise DataError(
                f"Prompt {number} has {length} tokens; to be answered it needs 1 to "
                f"{max_positions - 1}, as the model has {max_positions} positions. Leave it out or change its length."
            )
        highest = max((token for token in prompt.tokens.tolist() if token != prompt.image_token_id), default=0)
        if highest >= vocab_size:
            raise DataError(
                f"Prompt {number} holds the token number {highest}, which the model lacks; its numbers end "
                f"at {vocab_size - 1}. Leave it out, or use the tokenizer that belongs to the model."
            )


def _deal(
    prompts: Sequence[Prompt],
    texts: list[list[int]],
    layout: Layout,
    place: RankPosition,
    *,
    cached: bool,
    switches: frozenset[int],
) -> list[Row]:
    """Return this replica's rows, one a stage, for that is also the least number interleaved stages can work on."""
    mine = range(place.dp_rank, len(texts), place.dp_size)
    shares = [mine[first :: layout.pipeline] for first in range(layout.pipeline)]
    return [Row(prompts, texts, list(share), KeyValueCache() if cached else None, switches) for share in shares]


@dataclass(kw_only=True)
class _NextTokenScorer:
    """Runs rows through a pipeline-parallel model, as `RowScorer` does, and returns the logits of the tokens to come.

    Attributes:
        chunks: The chunks of the live model on this rank.
        place: This process's place in the layout.
        layout: The layout.
    """

    chunks: Sequence[torch.nn.Module]
    place: RankPosition
    layout: Layout
    _backend: Callable[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Pick Megatron's schedule for the pipeline size."""
        self._backend = get_forward_backward_func()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.chunks[0].parameters()).device

    def logits(self, rows: Sequence[Row]) -> torch.Tensor | None:
        """Return `[b, v]` float32, for the rows' documents in their order; None except on the last stage."""
        packed = [(row.pack(self.device), row.cache) for row in rows]
        with rows_known([row for row, _ in packed], self.chunks, self.place, self.layout):
            outputs: list[torch.Tensor] = self._backend(
                forward_step_func=self._forward_step,
                data_iterator=[iter(packed) for _ in self.chunks],
                model=list(self.chunks),
                num_microbatches=len(rows),
                seq_length=1,  # of no meaning: rows differ in length (variable_seq_lengths)
                micro_batch_size=1,
                forward_only=True,
            )
        if not self.place.is_last_stage:
            return None
        network: Any = unwrapped(self.chunks[-1])
        logits: torch.Tensor = network.logit_shape.logits(torch.cat(outputs) @ network.output_weight().T).float()
        group = self.place.tp_group
        if group.size() > 1:
            shards = [torch.empty_like(logits) for _ in range(group.size())]
            dist.all_gather(shards, logits, group=group)
            logits = torch.cat(shards, dim=1)
        return logits[:, : network.vocab_size]

    def _forward_step(
        self, rows: Iterator[tuple[PackedRow, KeyValueCache | None]], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
        whole, cache = next(rows)
        row = part_of(whole, self.place, self.layout).to(self.device)
        hidden = model(
            input_ids=row.tokens[None],
            position_ids=row.position_ids[None],
            attention_mask=None,
            packed_seq_params=CachedRowParams(cache=cache, **boundaries(row)),
        )
        return hidden, partial(self._last_hidden, row, whole.response_tokens.numel())

    def _last_hidden(self, row: PackedRow, documents: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (a loss of zero, the hidden state `[b, h]` of each document's last token), on the last stage.

        Args:
            row: This rank's part of the row.
            documents: `b`.
            hidden: `[T/c, 1, h]`; under sequence parallelism this tensor-parallel rank's part of it, which takes one
                all-gather.
        """
        if self.layout.sequence:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.place.tp_group)
        last = hidden.new_zeros(documents, hidden.shape[-1])
        last[row.document_ids] = hidden[row.response_positions, 0]
        if self.layout.context > 1:
            dist.all_reduce(last, group=self.place.cp_group)
        return hidden.new_zeros(()), last
