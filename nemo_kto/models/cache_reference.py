"""Fills the cache of the reference's log-probs with what a run needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

from nemo_kto.data.datamodule import KTODataModule
from nemo_kto.data.reference_cache import ReferenceCache
from nemo_kto.data.sampling import PairIndex
from nemo_kto.errors import StoppedEarly
from nemo_kto.models.kto_step import RowScorer
from nemo_kto.runtime import parallel

BATCHES_PER_PART = 16
"""Global batches scored between two files: what a run loses at most when it is killed."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One global batch of which something is not in the cache.

    Attributes:
        split: "train" or "validation".
        pairs: What the batch holds.
        samples: Whether the samples are to be scored.
        kl: Whether the KL set is.
    """

    split: str
    pairs: list[PairIndex]
    samples: bool
    kl: bool


def remaining_work(cache: ReferenceCache, data: KTODataModule, *, val_batches: int) -> list[Work]:
    """Return what is left to be scored for a run, the same list on every rank.

    Whole batches are scored, in the rows that training will make of them, and of a document that is scored twice the
    first value counts. So under the same layout the values of the first epoch are those of a live reference to the
    last bit. A batch whose documents are all there is left out.

    Args:
        cache: The cache, as far as it has been read.
        data: The data of the run, its position set.
        val_batches: Batches of one validation.
    """
    work = []
    for split, table in cache.tables.items():
        planned: set[int] = set()
        limit = val_batches if split == "validation" else None
        for pairs in itertools.islice(data.global_batches(split), limit):
            samples, kl = torch.tensor([(pair.sample, pair.kl) for pair in pairs]).T
            missing = []
            for names in (table.names(samples, samples), table.names(samples, kl)):
                new = set(names[~table.knows(names)].tolist()) - planned
                planned |= new
                missing.append(bool(new))
            if any(missing):
                work.append(Work(split=split, pairs=pairs, samples=missing[0], kl=missing[1]))
    return work


def fill(
    cache: ReferenceCache,
    work: list[Work],
    data: KTODataModule,
    scorer: RowScorer,
    *,
    micro_batch_size: int,
    kl_micro_batch_size: int,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Score the work with the live model, whose weights are the reference's; collective.

    For every `BATCHES_PER_PART` batches one all-gather of objects, of 12 bytes a document; then rank 0 writes a part.
    Afterwards the tables of all ranks hold everything.

    Args:
        cache: The cache.
        work: What `remaining_work` returned.
        data: The data of the run.
        scorer: Of the live model.
        micro_batch_size: Samples of a row.
        kl_micro_batch_size: Pairs of a row of the KL set.
        stop: Asked between parts whether to end; collective, with the same answer on all ranks.

    Raises:
        CheckpointError: The folder cannot be written.
        StoppedEarly: `stop` said so.
    """
    failure = f"The reference log-probs cannot be written to {cache.folder}"
    parallel.run_on_rank_zero(cache.create, failure)
    with tqdm(total=len(work), desc="Reference", unit="batch", disable=dist.get_rank() != 0) as bar:
        for start in range(0, len(work), BATCHES_PER_PART):
            if stop():
                raise StoppedEarly(f"{start} of {len(work)} batches of the reference's log-probs")
            mine: list[_Scored] = []
            for item in work[start : start + BATCHES_PER_PART]:
                batch, table = data.rank_batch(item.split, item.pairs), cache.tables[item.split]
                samples, kl = batch.pairs.T
                jobs = []
                if item.kl:
                    jobs.append((table.names(samples, kl), batch.kl_rows(kl_micro_batch_size)))
                if item.samples:
                    jobs.append((table.names(samples, samples), batch.sample_rows(micro_batch_size)))
                for names, rows in jobs:
                    values = scorer.score(rows)
                    if values is not None and scorer.place.reports:
                        mine.append((item.split, names, values.cpu()))
                bar.update()
            found = _gathered(mine, cache.tables)
            parallel.run_on_rank_zero(partial(cache.write_part, found), failure)
            for split, pieces in found.items():
                cache.add(split, pieces)


_Scored = tuple[str, torch.Tensor, torch.Tensor]
"""(split, names of documents, log-probs)."""


def _gathered(mine: list[_Scored], splits: Iterable[str]) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return split -> (names, log-probs) of all ranks."""
    everyone: list[list[_Scored]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {
        split: [(names, values) for theirs in everyone for name, names, values in theirs if name == split]
        for split in splits
    }
