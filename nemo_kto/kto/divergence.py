"""A step whose loss or gradient is not finite: where that began, which records it held, and what becomes of the run.

Tensor legend: `n` samples of this rank in the global batch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from nemo_kto.algorithms.finite import first_not_finite, is_finite
from nemo_kto.data.batches.datamodule import KTODataModule
from nemo_kto.data.batches.packed_rows import KTOBatch
from nemo_kto.data.tokens.contents import in_brief
from nemo_kto.errors import DivergenceError
from nemo_kto.kto.baseline import Baseline
from nemo_kto.network.gpt import KTOGPTModel
from nemo_kto.network.sharded import sharded_leaves
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runtime import parallel
from nemo_kto.runtime.steps import gradient_of

logger = logging.getLogger(__name__)

PARAMETER, LOSS, GRADIENT = "parameter", "loss", "gradient"
_ORDER = (PARAMETER, LOSS, GRADIENT)
"""In the order in which a step comes by them."""


@dataclass(frozen=True)
class Cause:
    """What was not finite first.

    Attributes:
        what: PARAMETER, LOSS or GRADIENT.
        where: The parameter's name, or which numbers of the loss; None if it was gone when it was computed again.
        rank: The first rank that had it; None if that cannot be told.
    """

    what: str
    where: str | None
    rank: int | None

    def sentences(self, step: int, *, first: bool) -> str:
        """Return what happened and what to do.

        Args:
            step: Number of the step, from 1.
            first: Whether it is the run's first, before which no update was made.
        """
        if self.what == PARAMETER:
            return (
                f"The parameter {self.where}, on rank {self.rank}, is not finite before step {step}: the update of "
                f"the step before was too large. {_LOWER}"
            )
        if self.what == LOSS:
            advice = _NOT_THE_RATE if first else _LOWER
            where = f"The {self.where} came first, on rank {self.rank}" if self.rank is not None else self.where
            return f"The loss of step {step} is not finite. {where}; the parameters were finite. {advice}"
        if self.where is None:
            return (
                f"The gradient of step {step} is not finite, but was when it was computed again: look at the hardware "
                "(memory errors) and the network."
            )
        advice = _NOT_THE_RATE if first else _LOWER
        return (
            f"The gradient of step {step} is not finite, though its loss is. That of {self.where} came first, on rank "
            f"{self.rank}. {advice}"
        )


_LOWER = "Lower model.optim.lr, or raise model.optim.sched.warmup_steps, and run the command again."
_NOT_THE_RATE = (
    "No update was made before, so it is not the learning rate: look at the step's records, and try another "
    "trainer.precision."
)


def find_cause(
    models: Sequence[KTOGPTModel],
    baseline: Baseline | None,
    observed: torch.Tensor | None,
    *,
    loss: float,
    compute_again: Callable[[], None],
) -> Cause:
    """Return what was not finite first in a step; collective: a gathering of objects, or two.

    Args:
        models: This rank's chunks, whose parameters are as they were before the step.
        baseline: The step's baseline on this rank.
        observed: What `Objective.observe` returned for this rank's samples, `[2, n]` or `[3, n]`; None where there are
            none.
        loss: The step's loss, the same on all ranks.
        compute_again: Makes the step's gradients once more and leaves each rank's as they are.
    """
    name = first_not_finite(_parameters(models))
    mine: tuple[str, str] | None = None if name is None else (PARAMETER, name)
    if mine is None and baseline is not None and observed is not None:
        part = _part_of_loss(baseline, observed)
        mine = None if part is None else (LOSS, part)
    found = _first(mine)
    if found is not None:
        return found
    if not math.isfinite(loss):
        return Cause(LOSS, "The loss function made it of finite log-probs", None)
    compute_again()
    name = first_not_finite(_gradients(models))
    return _first(None if name is None else (GRADIENT, name)) or Cause(GRADIENT, None, None)


def _first(mine: tuple[str, str] | None) -> Cause | None:
    """Return what came first of what the ranks have found: one gathering of objects."""
    everyone: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = [Cause(*one, rank) for rank, one in enumerate(everyone) if one is not None]
    return min(found, key=lambda cause: _ORDER.index(cause.what), default=None)


def _part_of_loss(baseline: Baseline, observed: torch.Tensor) -> str | None:
    """Return which of the numbers that the loss is made of are not finite; None if all are."""
    parts = (
        ("policy's log-probs", observed[0]),
        ("reference's log-probs", observed[1]),  # log-ratios, of finite log-probs of the policy
        ("log-probs of the KL set", baseline.value),
        ("shares of the samples", baseline.coefficients),
    )
    return first_not_finite(parts)


def _parameters(models: Iterable[KTOGPTModel]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters by the names they have whatever the layout."""
    for model in models:
        for adapters in (False, True):
            yield from ((leaf.key, leaf.data) for leaf in sharded_leaves(model, adapters=adapters))


def _gradients(models: Iterable[KTOGPTModel]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the gradients by those names."""
    models = list(models)
    names = {tensor.data_ptr(): name for name, tensor in _parameters(models)}
    for model in models:
        for name, parameter in model.named_parameters():
            gradient = gradient_of(parameter)
            if gradient is not None:
                yield names.get(parameter.data_ptr(), name), gradient


def check_parameters(models: Sequence[KTOGPTModel], *, step: int) -> None:
    """Raise a DivergenceError on all ranks where one's parameters are not finite; one all-reduce of a number.

    Args:
        models: This rank's chunks, their parameters complete.
        step: Steps that were taken.
    """
    trained = (parameter for model in models for parameter in model.parameters() if parameter.requires_grad)
    device = next(models[0].parameters()).device
    broken = torch.tensor(int(not all(map(is_finite, trained))), device=device)
    dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    if not broken:
        return
    name = first_not_finite(_parameters(models))
    cause = _first(None if name is None else (PARAMETER, name))
    assert cause is not None, "a rank has found one"
    raise DivergenceError(
        f"The parameter {cause.where}, on rank {cause.rank}, is not finite after step {step}. Nothing is written of "
        f"it, and the last checkpoint is kept. {_LOWER}"
    )


class UnusableSteps:
    """Counts the steps that were left out because they were not finite, the same on all ranks.

    Args:
        skip: Whether steps may be left out at all.
        most: So many in a row.
    """

    def __init__(self, *, skip: bool, most: int) -> None:
        self.skip = skip
        self.most = most
        self.total = 0
        self.in_a_row = 0

    def finite(self) -> None:
        """Take note of a step that was taken."""
        self.in_a_row = 0

    def leave_out(self, cause: Cause, *, step: int, records: Path | None) -> None:
        """Take note of a step that was not.

        Args:
            cause: What was not finite first.
            step: Number of the step, from 1.
            records: Where its records were written to.

        Raises:
            DivergenceError: It may not be left out, or there were too many in a row, or no later one can be finite.
        """
        text = cause.sentences(step, first=step == 1)
        where = "" if records is None else f" The step's records are in {records}."
        if not self.skip or cause.what == PARAMETER:
            raise DivergenceError(f"{text} The last checkpoint is kept.{where}")
        if self.in_a_row >= self.most:
            raise DivergenceError(
                f"{text} The {self.in_a_row} steps before it were not finite either, and no more are left out "
                f"(trainer.kto.max_skipped_steps={self.most}). The last checkpoint is kept.{where}"
            )
        self.total += 1
        self.in_a_row += 1
        if is_global_rank_zero():
            logger.warning("%s It was left out: %d so far, %d in a row.%s", text, self.total, self.in_a_row, where)

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run goes on counting from."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what `state_dict` returned."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]


class RecordsFile:
    """Writes down the records of steps that were not finite, a line of JSON for each step.

    Args:
        file: Lines are appended.
        tokenizer: Makes text of tokens.
        data: The data of the run.
    """

    def __init__(self, file: Path, tokenizer: PreTrainedTokenizerBase, data: KTODataModule) -> None:
        self.file = file
        self._tokenizer = tokenizer
        self._data = data

    def add(self, cause: Cause, batch: KTOBatch, observed: torch.Tensor | None, *, step: int) -> None:
        """Write a line; collective: one gathering of objects.

        Args:
            cause: What was not finite first.
            batch: This rank's share of the global batch.
            observed: See `find_cause`.
            step: Number of the step, from 1.
        """
        everyone: list[list[Any]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, _scored(batch, observed))
        if dist.get_rank() != 0:
            return
        files, file_of = self._data.files_of("train")
        samples = self._data.splits["train"]
        records = []
        for _, number, log_prob, log_ratio in sorted(row for rows in everyone for row in rows):
            sample = samples[number]
            records.append(
                {
                    "file": files[file_of[number]],
                    "sample": number,
                    "label": sample.desirable,
                    "log_prob": _as_json(log_prob),
                    "log_ratio": _as_json(log_ratio),
                    "prompt": self._tokenizer.decode(in_brief(sample.prompt, self._data.image_token_id)),
                    "response": self._tokenizer.decode(sample.response),
                }
            )
        line = {"step": step, "what": cause.what, "where": cause.where, "rank": cause.rank, "records": records}
        try:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
        except OSError as error:  # what is to be said of the step matters more
            logger.warning("%s cannot be written: %s.", self.file, error.strerror)


def _scored(batch: KTOBatch, observed: torch.Tensor | None) -> list[tuple[int, int, float, float]]:
    """Return (place in the global batch, number, log-prob, log-ratio) of a replica's samples, on one of its ranks."""
    if observed is None or not parallel.position().reports:
        return []
    counts = (batch.weights > 0).tolist()
    columns = batch.places.tolist(), batch.pairs[:, 0].tolist(), *observed[:2].tolist()
    return [row for row, counted in zip(zip(*columns, strict=True), counts, strict=True) if counted]


def _as_json(value: float) -> float | str:
    """Return a number as JSON can hold it: text for what is not finite."""
    return value if math.isfinite(value) else str(value)
