"""Scoring packed rows on Megatron's pipeline schedule: forward-only passes, and the pass that makes gradients.

Tensor legend: `n` samples of this rank in the global batch, `b` samples of one micro-batch, `T` tokens of a packed
row, `R` response tokens in it, `h` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from nemo_kto.algorithms.logprobs import response_token_logps, sum_per_document
from nemo_kto.data.batching import PackedRow
from nemo_kto.runtime.parallel import Layout, RankPosition

LossFunction = Callable[[torch.Tensor, int], torch.Tensor]
"""Maps a micro-batch's log-probs `[b]` and its index to its share of the global batch's loss, a scalar."""


@dataclass(kw_only=True)
class RowScorer:
    """Runs packed rows through a pipeline-parallel model and returns one log-prob per document.

    Policy and reference, training and validation are all scored here, by the same kernels in the same order, so that
    equal weights give bit-equal log-probs.

    Attributes:
        chunks: The chunks of the live model on this rank, wrapped for data parallelism.
        place: This process's place in the layout.
        layout: The layout.
        average: Mean instead of sum over a response's tokens.
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
        return self._run(rows, _no_loss, forward_only=True)

    def train(self, rows: Sequence[PackedRow], loss: LossFunction) -> torch.Tensor | None:
        """Accumulate the gradients of the summed `loss` of all micro-batches of all data-parallel ranks.

        Returns:
            The policy's log-probs `[n]` as in `score`, detached.
        """
        # The schedule divides by the number of micro-batches, Megatron's data-parallel wrapper by the ranks.
        scale = len(rows) * self.place.dp_size
        return self._run(rows, lambda logps, index: loss(logps, index) * scale, forward_only=False)

    def _run(self, rows: Sequence[PackedRow], loss: LossFunction, *, forward_only: bool) -> torch.Tensor | None:
        outputs: list[torch.Tensor] = self._backend(
            forward_step_func=partial(self._forward_step, loss),
            data_iterator=[iter(enumerate(rows)) for _ in self.chunks],
            model=list(self.chunks),
            num_microbatches=len(rows),
            seq_length=1,  # rows differ in length: Megatron exchanges shapes (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return torch.cat(outputs) if self.place.is_last_stage else None

    def _forward_step(
        self, loss: LossFunction, rows: Iterator[tuple[int, PackedRow]], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
        index, row = next(rows)
        num_documents, num_tokens = row.num_documents, row.tokens.numel()
        row = row.padded(self.layout.tensor if self.layout.sequence else 1).to(self._device)
        hidden = model(
            input_ids=row.tokens[None],
            position_ids=row.position_ids[None],
            attention_mask=None,
            # for the balance of the experts' loads: tokens that only fill up the row do not count
            padding_mask=None if row.tokens.numel() == num_tokens else _from_on(num_tokens, row.tokens),
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=row.cu_seqlens,
                cu_seqlens_kv=row.cu_seqlens,
                max_seqlen_q=row.max_seqlen,
                max_seqlen_kv=row.max_seqlen,
            ),
        )
        return hidden, partial(self._row_loss, loss, index, row, num_documents)

    def _row_loss(
        self, loss: LossFunction, index: int, row: PackedRow, num_documents: int, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (loss, detached log-probs `[b]`) from the last stage's hidden states `[T, 1, h]`.

        Under sequence parallelism each rank has `T/t` of them: one all-gather of `[T, 1, h]` over the tensor-parallel
        group; the backward pass takes its part of the gradient, which is complete on every rank.
        """
        network: Any = self.chunks[-1].module
        if self.layout.sequence:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.place.tp_group
            )
        token_logps = response_token_logps(
            hidden[row.response_positions, 0],
            network.output_weight(),
            row.response_tokens,
            vocab_size=network.vocab_size,
            tp_group=self.place.tp_group if self.place.tp_group.size() > 1 else None,
        )
        logps = sum_per_document(token_logps, row.document_ids, num_documents, average=self.average)
        return loss(logps, index), logps.detach()

    @property
    def _device(self) -> torch.device:
        return next(self.chunks[0].parameters()).device


def _from_on(start: int, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mask `[1, T]` that is true from the token `start` on."""
    return (torch.arange(tokens.numel(), device=tokens.device) >= start)[None]


def _no_loss(logps: torch.Tensor, index: int) -> torch.Tensor:
    # the schedule divides what it gets in place: never hand it the log-probs themselves
    return logps.new_zeros(())
