"""The mismatch permutation, and global batches that do not depend on the layout."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_kto.data.batches.dealing import DocumentIndex
from nemo_kto.data.batches.sampling import (
    GlobalBatchSampler,
    ValidationBatchSampler,
    kl_set_size,
    mismatch_permutation,
    own_prompt_pairs,
    previous_in_group,
)
from nemo_kto.errors import DataError

# Few different prompts, so that batches with many meetings are common.
KEYS = st.lists(st.integers(0, 3), min_size=1, max_size=24) | st.lists(st.integers(0, 40), min_size=1, max_size=60)


@given(KEYS)
def test_mismatch_is_a_permutation_without_fixed_points(keys):
    partner = mismatch_permutation(keys)
    assert sorted(partner) == list(range(len(keys)))
    assert len(keys) == 1 or all(p != i for i, p in enumerate(partner))


@given(KEYS)
def test_mismatch_meets_own_prompt_exactly_as_often_as_unavoidable(keys):
    # The m samples of a prompt can get only n - m responses of other prompts.
    partner = mismatch_permutation(keys)
    meetings = Counter(keys[i] for i, p in enumerate(partner) if keys[p] == keys[i])
    n = len(keys)
    assert dict(meetings) == {key: 2 * m - n for key, m in Counter(keys).items() if 2 * m > n}


@given(KEYS)
def test_mismatch_is_deterministic_and_sees_only_equality_of_keys(keys):
    assert mismatch_permutation([f"prompt {key}" for key in keys]) == mismatch_permutation(keys)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([7], [0]),
        ([1, 2, 3, 4], [1, 2, 3, 0]),  # the next sample
        ([1, 2, 1, 2], [1, 2, 3, 0]),  # equal prompts that do not meet
        ([5, 5], [1, 0]),  # unavoidable
        # Prompt 0 meets its own response of sample 1. Sample 1 has response 2, and its prompt is the same, so no
        # exchange; sample 2 (response 3, same prompt) is another prompt with another response: 0 and 2 exchange.
        ([8, 8, 9, 9], [3, 2, 1, 0]),
        ([8, 8, 9], [1, 2, 0]),  # one meeting is unavoidable, 2 * 2 - 3
    ],
)
def test_mismatch_by_hand(keys, expected):
    assert mismatch_permutation(keys) == expected


def test_mismatch_of_a_large_batch_of_one_prompt_is_quick():
    # Nothing can be exchanged; searching for a partner at each sample would take 4e8 steps.
    assert mismatch_permutation([1] * 20_000) == [*range(1, 20_000), 0]


@pytest.mark.parametrize(
    ("number", "size", "expected"),
    [
        (4, 4, [3, 0, 1, 2]),  # TRL: [completions[-1]] + completions[:-1]
        (8, 2, [1, 0, 3, 2, 5, 4, 7, 6]),
        (8, 3, [2, 0, 1, 5, 3, 4, 7, 6]),  # the last group is smaller
        (7, 3, [2, 0, 1, 5, 3, 4, 6]),  # of a single sample, which keeps its own response
        (2, 8, [1, 0]),
    ],
)
def test_groups_by_hand(number, size, expected):
    assert previous_in_group(number, size).tolist() == expected


def test_groups_do_not_look_at_prompts():
    assert own_prompt_pairs(np.array([8, 8, 9, 7, 9, 7]), 3) == 2  # 1 has the response of 0, 3 that of 5
    assert own_prompt_pairs(np.array([8, 9, 8, 9, 5]), 2) == 1  # the last one has its own


@pytest.mark.parametrize("shuffle", [True, False, "batches"])
def test_batches_of_groups_pair_within_them(shuffle):
    whole = list(global_sampler(24, gbs=6, steps=8, shuffle=shuffle))
    batches = list(global_sampler(24, gbs=6, steps=8, shuffle=shuffle, kl_group_size=3))
    for batch, other in zip(batches, whole, strict=True):
        numbers = [index.prompt for index in samples_of(batch)]
        assert samples_of(batch) == samples_of(other)
        assert [index.prompt for index in kl_set_of(batch)] == numbers
        assert [index.response for index in kl_set_of(batch)] == [numbers[i] for i in (2, 0, 1, 5, 3, 4)]


def test_a_validation_of_groups_is_in_full_groups_but_the_last():
    batches = list(ValidationBatchSampler(range(11), global_batch_size=4, kl_group_size=2))
    real = [[index.prompt for index in samples_of(batch) if index.weight] for batch in batches]
    assert real == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    pairs = [[index.response for index in kl_set_of(batch) if index.weight] for batch in batches]
    assert pairs == [[1, 0, 3, 2], [5, 4, 7, 6], [9, 8, 10]]
    assert [index[:5] for index in samples_of(batches[2])][3] == (8, 8, 3, False, 0.0)


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([None, 2, 3]))
def test_validation_counts_its_samples(num_samples, batches_of, group_size):
    sampler = ValidationBatchSampler(
        range(num_samples), global_batch_size=batches_of * (group_size or 1), kl_group_size=group_size
    )
    real = [sum(index.weight > 0 for index in samples_of(batch)) for batch in sampler]
    assert [sampler.num_samples(count) for count in range(len(sampler) + 1)] == [0, *itertools.accumulate(real)]
    assert sum(real) == num_samples


def global_sampler(
    num_samples=22, *, keys=None, gbs=4, seed=3, shuffle=True, start=0, steps=5, per_epoch=None, **given
):
    return GlobalBatchSampler(
        keys if keys is not None else list(range(num_samples)),
        global_batch_size=gbs,
        seed=seed,
        shuffle=shuffle,
        num_steps=steps,
        steps_per_epoch=per_epoch,
        start_step=lambda: start,
        **given,
    )


def samples_of(batch):
    return [index for index in batch if not index.in_kl_set]


def kl_set_of(batch):
    return [index for index in batch if index.in_kl_set]


def test_a_share_is_taken_of_each_batch():
    whole = list(global_sampler())
    assert list(global_sampler(share=lambda documents: documents[::3])) == [batch[::3] for batch in whole]
    whole = list(ValidationBatchSampler(range(9), global_batch_size=4))
    shared = list(ValidationBatchSampler(range(9), global_batch_size=4, share=lambda documents: documents[::3]))
    assert shared == [batch[::3] for batch in whole]


def test_an_epoch_holds_no_sample_twice_and_drops_the_rest():
    batches = list(global_sampler())
    seen = [index.prompt for batch in batches for index in samples_of(batch)]
    assert len(global_sampler()) == len(batches) == 5  # 22 // 4
    assert len(set(seen)) == len(seen) == 20


def test_each_batch_pairs_within_itself():
    for batch in global_sampler(keys=[i // 2 for i in range(22)]):
        samples, kl_set = samples_of(batch), kl_set_of(batch)
        assert all(index.prompt == index.response for index in samples)
        assert [index.prompt for index in kl_set] == [index.prompt for index in samples]
        assert sorted(index.response for index in kl_set) == sorted(index.prompt for index in samples)
        assert [index.place for index in samples] == [index.place for index in kl_set] == list(range(4))
        assert all(index.weight == 1 for index in batch)


@pytest.mark.parametrize("shuffle", [True, False, "batches"])
def test_a_fraction_of_the_kl_set(shuffle):
    """Pairs of the whole set, drawn anew for other samples, and the same for the same ones."""
    whole = list(global_sampler(40, gbs=8, steps=10, shuffle=shuffle))
    some = list(global_sampler(40, gbs=8, steps=10, shuffle=shuffle, kl_fraction=0.4))
    drawn = set()
    for batch, part in zip(whole, some, strict=True):
        assert samples_of(part) == samples_of(batch)
        chosen = kl_set_of(part)
        assert len(chosen) == 3 and [index.place for index in chosen] == [0, 1, 2]
        pairs = [(index.prompt, index.response) for index in kl_set_of(batch)]
        assert [pair for pair in pairs if pair in {index[:2] for index in chosen}] == [index[:2] for index in chosen]
        drawn.add(tuple(pairs.index(index[:2]) for index in chosen))
    assert len(drawn) > 1
    # an epoch later the same batches come, in another order only if they are shuffled
    if shuffle is not True:
        assert sorted(some[:5]) == sorted(some[5:])


@pytest.mark.parametrize(("fraction", "size"), [(1.0, 8), (0.4, 3), (0.01, 1), (0.0, 0)])
def test_size_of_the_kl_set(fraction, size):
    assert kl_set_size(8, fraction) == size
    assert {len(kl_set_of(batch)) for batch in global_sampler(gbs=8, steps=2, kl_fraction=fraction)} == {size}


def test_order_without_shuffling():
    expected = [
        [
            *(DocumentIndex(first + i, first + i, i) for i in range(3)),
            *(DocumentIndex(first + i, first + (i + 1) % 3, i, in_kl_set=True) for i in range(3)),
        ]
        for first in (0, 3)
    ]
    assert list(global_sampler(7, gbs=3, shuffle=False, steps=4)) == [*expected, *expected]  # two epochs
    assert list(global_sampler(7, gbs=3, shuffle=False, steps=2, per_epoch=1)) == [expected[0], expected[0]]


def test_order_depends_on_seed_and_epoch():
    first = list(global_sampler())
    assert first == list(global_sampler())
    second = list(global_sampler(start=5, steps=10))
    assert first != second
    # A seed's next epoch is not the next seed's first.
    assert second != list(global_sampler(seed=4))


def test_shuffled_batches_are_those_of_the_first_epoch():
    keys = [i // 2 for i in range(22)]
    first, second, third = (
        list(global_sampler(keys=keys, shuffle="batches", start=5 * epoch, steps=5 * epoch + 5)) for epoch in range(3)
    )
    assert first == list(global_sampler(keys=keys))  # dealt as with shuffle=True
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third != first
    other = list(global_sampler(keys=keys, shuffle="batches", start=5, steps=10, seed=4))
    assert sorted(other) != sorted(second)
    # of a part of the epoch, the same part
    parts = [list(global_sampler(keys=keys, shuffle="batches", per_epoch=3, start=s, steps=s + 3)) for s in (0, 3)]
    assert parts[0] == first[:3] and sorted(parts[1]) == sorted(parts[0])


@pytest.mark.parametrize("shuffle", [True, "batches"])
@pytest.mark.parametrize("start", [1, 4, 5, 7, 13, 20])
def test_resume_continues_the_uninterrupted_series(start, shuffle):
    series = list(global_sampler(steps=20, shuffle=shuffle))
    assert len(series) == 20
    assert list(global_sampler(steps=20, start=start, shuffle=shuffle)) == series[start:]
    assert len(global_sampler(steps=20, start=start, shuffle=shuffle)) == 20


def test_too_little_training_data_names_both_numbers():
    with pytest.raises(DataError, match="3 usable records.*batch of 4"):
        global_sampler(3)


@given(st.integers(1, 50), st.integers(1, 12))
def test_validation_counts_every_sample_once(num_samples, gbs):
    batches = list(ValidationBatchSampler(range(num_samples), global_batch_size=gbs))
    assert len(batches) == -(-num_samples // gbs)
    assert all(len(samples_of(batch)) == len(kl_set_of(batch)) == gbs for batch in batches)
    assert all([index.place for index in samples_of(batch)] == list(range(gbs)) for batch in batches)
    real = [[index.prompt for index in samples_of(batch) if index.weight] for batch in batches]
    assert sum(real, []) == list(range(num_samples))
    assert max(map(len, real)) - min(map(len, real)) <= 1
    without = list(ValidationBatchSampler(range(num_samples), global_batch_size=gbs, kl_set=False))
    assert without == [samples_of(batch) for batch in batches]


@given(st.integers(1, 40), st.integers(1, 8))
def test_validation_pairs_the_real_samples_of_a_batch(num_samples, gbs):
    sampler = ValidationBatchSampler(range(num_samples), global_batch_size=gbs)
    assert len(list(sampler)) == len(sampler)
    for batch in sampler:
        samples = {index.prompt for index in samples_of(batch) if index.weight}
        pairs = [index for index in kl_set_of(batch) if index.weight]
        assert {index.prompt for index in pairs} == {index.response for index in pairs} == samples
        assert len(pairs) == len(samples)
        assert {index.prompt for index in batch} == samples
