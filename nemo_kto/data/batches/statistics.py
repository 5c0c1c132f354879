"""What there is to know about feedback before it is trained on.

Shapes: `n` samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_kto.algorithms.class_weights import balanced_weights, is_balanced, weighted_ratio
from nemo_kto.data.batches.samples import Samples
from nemo_kto.data.batches.sampling import GlobalBatchSampler
from nemo_kto.data.reading.records import EMPTY

_PERCENTILES = (50, 90, 99, 100)
_BATCH_SIZES = (128, 64, 32, 16, 8)
"""Sizes to recommend: the paper's author advises 8 to 128."""
_MOST_BINS = 30
_WANTED_STEPS = 100
"""Steps in an epoch that leave room for a learning-rate schedule."""


@dataclass(frozen=True, kw_only=True)
class DataStatistics:
    """Numbers about the samples of a split.

    Attributes:
        samples: Samples that are trained on.
        desirable: Those with thumbs up.
        undesirable: Those with thumbs down.
        bad: Records that cannot be used.
        empty_responses: Those of them whose response is empty.
        overlong: Records dropped because they are too long.
        truncated: Records cut because they are too long.
        prompt_tokens: Percentile -> tokens of a prompt.
        response_tokens: Percentile -> tokens of a response.
        duplicates: Samples that repeat prompt, response and label of an earlier one.
        conflicts: Pairs of prompt and response that have both labels.
        prompts: Different prompts.
        shared_prompts: Prompts of more than one sample.
        largest_group: Samples of the prompt with most of them.
        boundary_merges: Samples whose prompt and response the tokenizer would merge.
        global_batch_size: What the following depend on.
        kl_meetings: Samples of the first epoch whose KL response is one to their own prompt, where responses are
            exchanged in the whole batch.
        tokens: Tokens of the samples in an epoch.
        kl_tokens: Tokens of the KL pairs in an epoch; each is read in addition.
        padding: Share of an epoch's tokens that would be padding, were every batch padded to its longest sample. Rows
            are packed here, so it is what packing saves.
        recommended_weights: Loss weights for desirable and undesirable samples; None if all are of one kind.
        recommended_batch_size: Global batch size; None if there is too little data for any.
    """

    samples: int
    desirable: int
    undesirable: int
    bad: int
    empty_responses: int
    overlong: int
    truncated: int
    prompt_tokens: dict[str, int]
    response_tokens: dict[str, int]
    duplicates: int
    conflicts: int
    prompts: int
    shared_prompts: int
    largest_group: int
    boundary_merges: int
    global_batch_size: int
    kl_meetings: int | None
    tokens: int
    kl_tokens: int | None
    padding: float | None
    recommended_weights: tuple[float, float] | None
    recommended_batch_size: int | None


def describe(samples: Samples, *, global_batch_size: int | None, seed: int) -> DataStatistics:
    """Returns the statistics of some samples, of which there is at least one.

    Args:
        samples: The samples.
        global_batch_size: Samples per step; None for what is recommended.
        seed: Seed of the order in which they are dealt.
    """
    prompts, responses, desirable = (samples.column(name) for name in ("prompt_key", "response_key", "desirable"))
    sizes = np.unique(prompts, return_counts=True)[1]
    labels, pairs = np.stack([prompts, responses, desirable], axis=1), np.stack([prompts, responses], axis=1)
    different = len(np.unique(labels, axis=0))
    recommended = recommended_batch_size(len(samples))
    size = global_batch_size or recommended or min(len(samples), _BATCH_SIZES[-1])
    meetings, kl_tokens, padding = _dealt(samples, size, seed) if size <= len(samples) else (None, None, None)
    num_desirable = int(desirable.sum())
    counts, totals = (num_desirable, len(samples) - num_desirable), samples.class_totals
    return DataStatistics(
        samples=len(samples),
        desirable=counts[0],
        undesirable=counts[1],
        bad=samples.num_bad,
        empty_responses=sum(record.reason in EMPTY for store in samples.stores for record in store.bad_records()),
        overlong=samples.num_overlong,
        truncated=samples.num_truncated,
        prompt_tokens=_percentiles(samples.prompt_kept),
        response_tokens=_percentiles(samples.response_kept),
        duplicates=len(samples) - different,
        conflicts=different - len(np.unique(pairs, axis=0)),
        prompts=len(sizes),
        shared_prompts=int((sizes > 1).sum()),
        largest_group=int(sizes.max()),
        boundary_merges=int(samples.column("merged").sum()),
        global_batch_size=size,
        kl_meetings=meetings,
        tokens=int(samples.lengths.sum()),
        kl_tokens=kl_tokens,
        padding=padding,
        recommended_weights=_recommended_weights(*totals) if all(totals) else None,
        recommended_batch_size=recommended,
    )


def recommended_batch_size(num_samples: int) -> int | None:
    """Returns the largest size of 8 to 128 that leaves 100 steps in an epoch, or else 8; None for fewer than 8."""
    possible = [size for size in _BATCH_SIZES if size <= num_samples]
    return next(
        (size for size in possible if num_samples // size >= _WANTED_STEPS), possible[-1] if possible else None
    )


def summarize(samples: Samples, files: Sequence[str], file_of: np.ndarray) -> dict[str, Any]:
    """Returns what a report and a model card say about some samples, as JSON.

    Args:
        samples: The samples, at least one.
        files: The files they were read from.
        file_of: [n] the number of each sample's file.

    Returns:
        Numbers of samples, `sources` with those of each file, and histograms of the tokens of prompts and responses:
        `edges` of k bins and how many samples of either class are in each.
    """
    desirable = samples.column("desirable")
    totals = np.bincount(file_of, minlength=len(files)).tolist()
    liked = np.bincount(file_of[desirable], minlength=len(files)).tolist()
    return {
        "sources": [
            {"path": path, "samples": total, "desirable": good}
            for path, total, good in zip(files, totals, liked, strict=True)
        ],
        "samples": len(samples),
        "desirable": samples.num_desirable,
        "undesirable": samples.num_undesirable,
        "overlong": samples.num_overlong,
        "truncated": samples.num_truncated,
        "bad": samples.num_bad,
        "prompt_lengths": _histogram(samples.prompt_kept, desirable),
        "response_lengths": _histogram(samples.response_kept, desirable),
    }


def _histogram(lengths: np.ndarray, desirable: np.ndarray) -> dict[str, list[int]]:
    """Counts by class in at most 30 bins of whole tokens."""
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, _MOST_BINS + 1).astype(np.int64))
    counts = {"desirable": lengths[desirable], "undesirable": lengths[~desirable]}
    found = {name: np.histogram(values, edges)[0].tolist() for name, values in counts.items()}
    return {"edges": edges.tolist(), **found}


def _recommended_weights(num_desirable: float, num_undesirable: float) -> tuple[float, float]:
    if is_balanced(weighted_ratio(num_desirable, num_undesirable, 1.0, 1.0)):
        return 1.0, 1.0
    return balanced_weights(num_desirable, num_undesirable)


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
    values = np.percentile(lengths, _PERCENTILES, method="higher")
    names = (f"p{percentile}" if percentile < 100 else "max" for percentile in _PERCENTILES)
    return {name: int(value) for name, value in zip(names, values, strict=True)}


def _dealt(samples: Samples, size: int, seed: int) -> tuple[int, int, float]:
    """What becomes of the samples in the first epoch: meetings, tokens of the KL pairs, share of padding."""
    keys, lengths = samples.prompt_keys, samples.lengths
    sampler = GlobalBatchSampler(
        keys,
        global_batch_size=size,
        seed=seed,
        shuffle=True,
        num_steps=len(samples) // size,
    )
    meetings = kl_tokens = real = padded = 0
    for batch in sampler:
        places, partners = np.array([(index.prompt, index.response) for index in batch if index.in_kl_set]).T
        meetings += int((keys[places] == keys[partners]).sum())
        kl_tokens += int(samples.prompt_kept[places].sum() + samples.response_kept[partners].sum())
        real += int(lengths[places].sum())
        padded += int(lengths[places].max()) * size
    return meetings, kl_tokens, 1 - real / padded
