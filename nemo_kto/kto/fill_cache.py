"""Fills the cache of the reference's log-probs with what a run needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from nemo_kto.data.batches.datamodule import KTODataModule
from nemo_kto.data.batches.dealing import DocumentIndex
from nemo_kto.data.batches.reference_cache import Key, ReferenceCache
from nemo_kto.errors import DivergenceError, StoppedEarly
from nemo_kto.kto.scoring import RowScorer
from nemo_kto.runtime import parallel

BATCHES_PER_PART = 16
"""Global batches scored between two files: what a run loses at most when it is killed, unless there are very many."""

_MOST_PARTS = 500

Work = dict[str, torch.Tensor]
"""Split -> `[batches, documents of a batch]` bool: whose log-prob is not known, nor found earlier in the same work."""


def open_cache(folder: Path, key: Key, data: KTODataModule, *, val_batches: int) -> tuple[ReferenceCache, Work]:
    """Return the cache with what it holds so far, and what is left to be scored, the same on every rank; collective.

    Rank 0 reads, so that all ranks know of the same files; the others get its tables by one broadcast of objects.

    Args:
        folder: The cache's folder.
        key: What its numbers are computed from.
        data: The data of the run, its position set.
        val_batches: Batches of one validation.

    Raises:
        ConfigError: The cache is of something else.
        CheckpointError: It cannot be read or made.
    """
    num_samples = {split: len(samples) for split, samples in data.splits.items()}
    cache = ReferenceCache(folder, key=key, num_samples=num_samples)
    known: list[Any] = [None]

    def read() -> None:
        cache.create()
        cache.read()
        tables = {split: table.contents() for split, table in cache.tables.items()}
        known[0] = (tables, remaining_work(cache, data, val_batches=val_batches))

    parallel.run_on_rank_zero(read, f"The reference log-probs in {folder} cannot be used")
    dist.broadcast_object_list(known, src=0)
    tables, work = known[0]
    if dist.get_rank() != 0:
        for split, contents in tables.items():
            cache.add(split, [contents])
    return cache, work


def remaining_work(cache: ReferenceCache, data: KTODataModule, *, val_batches: int) -> Work:
    """Return what is left to be scored for a run.

    Args:
        cache: The cache, as far as it has been read.
        data: The data of the run, its position set.
        val_batches: Batches of one validation.
    """
    work = {}
    for split, table in cache.tables.items():
        planned: set[int] = set()
        limit = val_batches if split == "validation" else None
        missing = []
        for documents in itertools.islice(data.global_batches(split), limit):
            names = table.names(*torch.tensor([(index.prompt, index.response) for index in documents]).T)
            unknown = torch.zeros(len(documents), dtype=torch.bool)
            for place in (~table.knows(names)).nonzero().flatten().tolist():
                name = int(names[place])
                if name not in planned:
                    planned.add(name)
                    unknown[place] = True
            missing.append(unknown)
        work[split] = torch.stack(missing)
    return work


def count_batches(work: Work) -> int:
    """Return the number of global batches of which anything is to be scored."""
    return sum(int(missing.any(dim=1).sum()) for missing in work.values())


def fill(
    cache: ReferenceCache,
    work: Work,
    data: KTODataModule,
    scorer: RowScorer,
    *,
    stop: Callable[[], bool],
) -> None:
    """Score the work with the live model, whose weights are the reference's; collective.

    Whole batches are scored, in the rows that training will make of them, but only what the work names is kept. So
    under the same layout the values of the first epoch are those of a live reference to the last bit.

    For every part one all-gather of objects, of 12 bytes a document; then rank 0 writes it. Afterwards the tables of
    all ranks hold everything.

    Args:
        cache: The cache.
        work: See `open_cache`.
        data: The data of the run.
        scorer: Of the live model.
        stop: Asked between parts whether to end; collective, with the same answer on all ranks.

    Raises:
        CheckpointError: The folder cannot be written.
        DivergenceError: A log-prob is not finite.
        StoppedEarly: `stop` said so.
    """
    failure = f"The reference log-probs cannot be written to {cache.folder}"
    total = count_batches(work)
    per_part = max(BATCHES_PER_PART, -(-total // _MOST_PARTS))
    batches = _batches(work, data)
    everything: dict[str, list[_Found]] = {split: [] for split in work}
    # None: where the output is no terminal, which a bar would fill with every state of it
    with tqdm(total=total, desc="Reference", unit="batch", disable=None if dist.get_rank() == 0 else True) as bar:
        for start in range(0, total, per_part):
            if stop():
                raise StoppedEarly(f"{start} of {total} batches of the reference's log-probs")
            mine: list[tuple[str, _Found]] = []
            for split, documents, missing in itertools.islice(batches, per_part):
                batch, table = data.rank_batch(split, documents), cache.tables[split]
                first = sum(not index.in_kl_set for index in documents)  # of the KL set
                jobs = (
                    (missing[first:], batch.kl_places, batch.kl_pairs, batch.kl_rows),
                    (missing[:first], batch.places, batch.pairs, batch.sample_rows),
                )
                for wanted, places, pairs, make_rows in jobs:
                    values = scorer.score(make_rows()) if wanted.any() else None
                    if values is not None and scorer.place.reports:
                        kept = wanted[places]
                        mine.append((split, (table.names(*pairs[kept].T), values.cpu()[kept])))
                scorer.forget_images()
                bar.update()
            found = _gathered(mine, work)
            _check_finite(found)
            parallel.run_on_rank_zero(partial(cache.write_part, found), failure)
            if bar.disable and dist.get_rank() == 0:
                print(f"Reference: {min(start + per_part, total)} of {total} batches", flush=True)
            for split, pieces in found.items():
                everything[split] += pieces
    for split, pieces in everything.items():  # once: each time sorts the whole table
        cache.add(split, pieces)


_Found = tuple[torch.Tensor, torch.Tensor]
"""(names of documents, log-probs)."""


def _batches(work: Work, data: KTODataModule) -> Iterator[tuple[str, list[DocumentIndex], torch.Tensor]]:
    """Yield (split, documents, which of them are to be scored) of each global batch with anything to be scored."""
    for split, batches in work.items():
        for documents, missing in zip(data.global_batches(split), batches, strict=False):
            if missing.any():
                yield split, documents, missing


def _gathered(mine: list[tuple[str, _Found]], splits: Iterable[str]) -> dict[str, list[_Found]]:
    """Return split -> what all ranks have found."""
    everyone: list[list[tuple[str, _Found]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {split: [found for theirs in everyone for name, found in theirs if name == split] for split in splits}


def _check_finite(found: dict[str, list[_Found]]) -> None:
    for split, pieces in found.items():
        number = sum(int((~values.isfinite()).sum()) for _, values in pieces)
        if number:
            raise DivergenceError(
                f"The reference's log-probs of {number} documents of the {split} data are not finite, and are not "
                "kept. Use trainer.precision=bf16-mixed or 32, or another model."
            )
