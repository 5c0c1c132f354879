"""Scoring packed rows on Megatron's pipeline schedule: forward-only passes, and the pass that makes gradients.

Tensor legend: `n` samples of this rank in the global batch, `b` samples of one micro-batch, `T` tokens of a packed
row, `c` context-parallel ranks, which hold `T/c` tokens each, `R` response tokens predicted on this rank, `h` hidden
size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

from nemo_kto.algorithms.dropout import token_keys
from nemo_kto.algorithms.logprobs import response_token_logps, sum_per_document
from nemo_kto.data.batches.packed_rows import PackedRow
from nemo_kto.data.batches.upload import upload
from nemo_kto.network.gpt import KTOGPTModel
from nemo_kto.network.lora import RowParams
from nemo_kto.runtime import row_shapes
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.parallel import RankPosition


@dataclass(frozen=True)
class RowScores:
    """The log-probs of one micro-batch on the last stage.

    Attributes:
        token_logps: `[R]` float32, natural log, of the response tokens that this rank has the hidden states for.
        counts: `[b]` how many of them each document has, one document after the other.
        lengths: `[b]` float32, response tokens of each document, over all context-parallel ranks.
        average: Mean instead of sum over a response's tokens.
        cp_group: The context-parallel ranks; None for one.
        first: Documents in the rows before.
    """

    token_logps: torch.Tensor
    counts: tuple[int, ...]
    lengths: torch.Tensor
    average: bool
    cp_group: dist.ProcessGroup | None
    first: int

    @property
    def documents(self) -> slice:
        """The places of the documents among those of all rows."""
        return slice(self.first, self.first + len(self.counts))

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return each document's sum `[b]` of values `[R]` of its tokens.

        Under context parallelism one all-reduce of `[b]`. All ranks then form the same loss, whose gradient goes back
        through each one's own tokens.
        """
        sums = sum_per_document(values, self.counts)
        if self.cp_group is not None:
            sums = reduce_from_tensor_model_parallel_region(sums, group=self.cp_group)
        return sums

    def reduced(self, values: torch.Tensor) -> torch.Tensor:
        """Return each document's sum or mean `[b]`, by `average`, of values `[R]` of its tokens."""
        return self.total(values) / self.lengths if self.average else self.total(values)

    @cached_property
    def logps(self) -> torch.Tensor:
        """Log-prob `[b]` of each document."""
        return self.reduced(self.token_logps)


LossFunction = Callable[[RowScores, int], tuple[torch.Tensor, torch.Tensor]]
"""Maps the scores of a micro-batch and its index to its share of the global batch's loss, a scalar, and to what is
wanted of it besides, detached."""


def unwrapped(chunk: torch.nn.Module) -> KTOGPTModel:
    """Return the model inside a chunk that may be wrapped for data parallelism."""
    inner = chunk if isinstance(chunk, KTOGPTModel) else chunk.module
    assert isinstance(inner, KTOGPTModel)
    return inner


def part_of(row: PackedRow, place: RankPosition, layout: Layout) -> PackedRow:
    """Return what a process works on of a row: its tokens, once the row is filled up so that it can be divided."""
    return row.padded(_parts(layout)).shard(place.cp_rank, layout.context)


def _parts(layout: Layout) -> int:
    """Return how many ranks of a stage share the tokens of a row between layers."""
    return layout.context * (layout.tensor if layout.sequence else 1)


def boundaries(row: PackedRow) -> dict[str, Any]:
    """Return the fields of `DocumentParams` that say where a row's documents and images are."""
    return {
        "qkv_format": "thd",
        "cu_seqlens_q": row.cu_seqlens,
        "cu_seqlens_kv": row.cu_seqlens,
        "max_seqlen_q": row.max_seqlen,
        "max_seqlen_kv": row.max_seqlen,
        "lengths": row.lengths,
        "images": row.images,
        "rotary_positions": row.rotary_positions,
    }


def rows_known(
    rows: Sequence[PackedRow], chunks: Sequence[torch.nn.Module], place: RankPosition, layout: Layout
) -> AbstractContextManager[None]:
    """Return a context in which Megatron's schedule may run a pass of the rows, see `row_shapes.py`."""
    parts = _parts(layout)
    return row_shapes.known(
        [-(-row.tokens.numel() // parts) for row in rows],
        hidden_size=unwrapped(chunks[0]).config.hidden_size,
        stages=layout.pipeline,
        chunks=layout.virtual,
        is_first=place.is_first_stage,
        is_last=place.is_last_stage,
    )


@dataclass(frozen=True)
class Dropout:
    """What the adapters' dropout of one step depends on.

    Attributes:
        step: Number of the step.
        places: `[n]` int64, places of the rows' documents in the global batch, on the device.
    """

    step: int
    places: torch.Tensor

    def keys(self, first: int, row: PackedRow, in_row: torch.Tensor) -> torch.Tensor:
        """Return a key for each token `[T/c]` of a row.

        Args:
            first: Documents in the rows before.
            row: This rank's part of the row.
            in_row: `[T/c]` places of its tokens in the whole row.
        """
        documents = first + torch.bucketize(in_row, row.cu_seqlens[1:], right=True)
        # tokens that only fill up the row are of a document more
        places = self.places[documents.clamp(max=len(self.places) - 1)]
        return token_keys(row.position_ids, places, step=self.step)


@dataclass(kw_only=True)
class RowScorer:
    """Runs packed rows through a pipeline-parallel model and returns log-probs.

    Policy and reference, training and validation are all scored here, by the same kernels in the same order, so that
    equal weights give bit-equal log-probs.

    Attributes:
        chunks: The chunks of the live model on this rank; to `train` they must be wrapped for data parallelism.
        place: This process's place in the layout.
        layout: The layout.
        average: See `RowScores`.
    """

    chunks: Sequence[torch.nn.Module]
    place: RankPosition
    layout: Layout
    average: bool = False
    _backend: Callable[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Pick Megatron's schedule for the pipeline size."""
        self._backend = get_forward_backward_func()

    @torch.no_grad()
    def score(self, rows: Sequence[PackedRow]) -> torch.Tensor | None:
        """Return the log-probs `[n]` of the rows' documents, float32, natural log; None except on the last stage."""
        found = self.score_rows(rows)
        return None if found is None else torch.cat([scores.logps for scores in found])

    @torch.no_grad()
    def score_rows(self, rows: Sequence[PackedRow]) -> list[RowScores] | None:
        """Return the scores of each row; None except on the last stage."""
        # the schedule divides the loss it gets in place: never hand it the log-probs themselves
        return self._run(rows, lambda scores, index: (scores.token_logps.new_zeros(()), scores), forward_only=True)

    def forget_images(self) -> None:
        """Forget what is kept of the images of the rows so far, which no later row has."""
        for chunk in self.chunks:
            vision = unwrapped(chunk).vision
            if vision is not None:
                vision.forget()

    def train(
        self, rows: Sequence[PackedRow], loss: LossFunction, *, dropout: Dropout | None = None
    ) -> torch.Tensor | None:
        """Accumulate the gradients of the summed `loss` of all micro-batches of all data-parallel ranks.

        Args:
            rows: This rank's share of the global batch.
            loss: See `LossFunction`.
            dropout: What the adapters' dropout depends on; None for no dropout.

        Returns:
            What `loss` returned besides, joined along its last dimension; None except on the last stage.
        """
        # The schedule divides by the number of micro-batches, Megatron's data-parallel wrapper by the ranks.
        scale = len(rows) * self.place.dp_size

        def scaled(scores: RowScores, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            value, collected = loss(scores, index)
            return value * scale, collected

        found: list[torch.Tensor] | None = self._run(rows, scaled, forward_only=False, dropout=dropout)
        return None if found is None else torch.cat(found, dim=-1)

    def _run(
        self,
        rows: Sequence[PackedRow],
        loss: Callable[[RowScores, int], tuple[torch.Tensor, Any]],
        *,
        forward_only: bool,
        dropout: Dropout | None = None,
    ) -> list[Any] | None:
        """Return what `loss` returned besides for each row; None except on the last stage."""
        firsts = list(itertools.accumulate((row.num_documents for row in rows), initial=0))[:-1]
        numbered = list(zip(range(len(rows)), firsts, rows, strict=True))
        with rows_known(rows, self.chunks, self.place, self.layout):
            outputs: list[Any] = self._backend(
                forward_step_func=partial(self._forward_step, loss, dropout),
                data_iterator=[iter(numbered) for _ in self.chunks],
                model=list(self.chunks),
                num_microbatches=len(rows),
                seq_length=1,  # of no meaning: rows differ in length (variable_seq_lengths)
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return outputs if self.place.is_last_stage else None

    def _forward_step(
        self,
        loss: Callable[[RowScores, int], tuple[torch.Tensor, Any]],
        dropout: Dropout | None,
        rows: Iterator[tuple[int, int, PackedRow]],
        model: torch.nn.Module,
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, Any]]]:
        index, first, whole = next(rows)
        row = part_of(whole, self.place, self.layout).to(self._device)
        in_row = torch.arange(row.tokens.numel(), device=self._device) + self.place.cp_rank * row.tokens.numel()
        # for the balance of the experts' loads: tokens that only fill up the row do not count
        is_padded = row.tokens.numel() * self.layout.context > whole.tokens.numel()
        padding_mask = in_row >= whole.tokens.numel() if is_padded else None
        hidden = model(
            input_ids=row.tokens[None],
            position_ids=row.position_ids[None],
            attention_mask=None,
            padding_mask=None if padding_mask is None else padding_mask[None],
            packed_seq_params=RowParams(
                dropout_keys=None if dropout is None else dropout.keys(first, row, in_row), **boundaries(row)
            ),
        )
        return hidden, partial(self._row_loss, loss, index, first, row, whole.response_lengths)

    def _row_loss(
        self,
        loss: Callable[[RowScores, int], tuple[torch.Tensor, Any]],
        index: int,
        first: int,
        row: PackedRow,
        lengths: tuple[int, ...],
        hidden: torch.Tensor,
    ) -> tuple[torch.Tensor, Any]:
        """Return what `loss` returns for the last stage's hidden states `[T/c, 1, h]`.

        Under sequence parallelism each tensor-parallel rank has its part of them: one all-gather of `[T/c, 1, h]`; the
        backward pass takes its part of the gradient, which is complete on every rank.

        Args:
            loss: See `LossFunction`; what it returns besides may be anything.
            index: Number of the micro-batch.
            first: See `RowScores`.
            row: This rank's part of the row.
            lengths: `[b]` response tokens of each document.
            hidden: `[T/c, 1, h]`, or this tensor-parallel rank's part of it.
        """
        network: Any = unwrapped(self.chunks[-1])
        if self.layout.sequence:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.place.tp_group
            )
        token_logps = response_token_logps(
            hidden[row.response_positions, 0],
            network.output_weight(),
            row.response_tokens,
            vocab_size=network.vocab_size,
            shape=network.logit_shape,
            tp_group=self.place.tp_group if self.place.tp_group.size() > 1 else None,
        )
        scores = RowScores(
            token_logps=token_logps,
            counts=row.response_lengths[: len(lengths)],  # what fills up the row has none
            lengths=upload([torch.tensor(lengths, dtype=torch.float32)], self._device)[0],
            average=self.average,
            cp_group=self.place.cp_group if self.layout.context > 1 else None,
            first=first,
        )
        return loss(scores, index)

    @property
    def _device(self) -> torch.device:
        return next(self.chunks[0].parameters()).device
