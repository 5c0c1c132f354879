"""The mismatch permutation, and global batches that do not depend on the layout."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_kto.data.sampling import GlobalBatchSampler, PairIndex, ValidationBatchSampler, mismatch_permutation
from nemo_kto.errors import ConfigError, DataError

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


def global_sampler(
    num_samples=22, *, keys=None, gbs=4, rank=0, size=1, seed=3, shuffle=True, start=0, steps=5, per_epoch=None
):
    return GlobalBatchSampler(
        keys if keys is not None else list(range(num_samples)),
        global_batch_size=gbs,
        dp_rank=rank,
        dp_size=size,
        seed=seed,
        shuffle=shuffle,
        num_steps=steps,
        steps_per_epoch=per_epoch,
        start_step=lambda: start,
    )


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_joined_are_the_global_batch(size):
    keys = [i // 2 for i in range(22)]
    whole = list(global_sampler(keys=keys))
    ranks = [list(global_sampler(keys=keys, rank=rank, size=size)) for rank in range(size)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == whole


def test_an_epoch_holds_no_sample_twice_and_drops_the_rest():
    batches = list(global_sampler())
    seen = [pair.sample for batch in batches for pair in batch]
    assert len(global_sampler()) == len(batches) == 5  # 22 // 4
    assert len(set(seen)) == len(seen) == 20


def test_each_batch_pairs_within_itself():
    for batch in global_sampler(keys=[i // 2 for i in range(22)]):
        assert sorted(pair.kl for pair in batch) == sorted(pair.sample for pair in batch)
        assert all(pair.weight == 1 for pair in batch)


def test_order_without_shuffling():
    expected = [
        [PairIndex(0, 1), PairIndex(1, 2), PairIndex(2, 0)],
        [PairIndex(3, 4), PairIndex(4, 5), PairIndex(5, 3)],
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


@pytest.mark.parametrize("cls", ["train", "validation"])
def test_batch_that_ranks_cannot_share(cls):
    with pytest.raises(ConfigError, match="4 is not divisible by the data-parallel size 3"):
        if cls == "train":
            global_sampler(size=3)
        else:
            ValidationBatchSampler(range(9), global_batch_size=4, dp_rank=0, dp_size=3)


@given(st.integers(1, 50), st.integers(1, 6), st.sampled_from([1, 2, 3]))
def test_validation_counts_every_sample_once(num_samples, per_rank, dp_size):
    gbs = per_rank * dp_size
    ranks = [
        list(ValidationBatchSampler(range(num_samples), global_batch_size=gbs, dp_rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]
    assert all(len(batch) == per_rank for batches in ranks for batch in batches)
    batches = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert len(batches) == -(-num_samples // gbs)
    assert [pair.sample for batch in batches for pair in batch if pair.weight] == list(range(num_samples))
    real = [sum(pair.weight for pair in batch) for batch in batches]
    assert max(real) - min(real) <= 1


@given(st.integers(1, 40), st.integers(1, 8))
def test_validation_pairs_the_real_samples_of_a_batch(num_samples, gbs):
    sampler = ValidationBatchSampler(range(num_samples), global_batch_size=gbs, dp_rank=0, dp_size=1)
    assert len(list(sampler)) == len(sampler)
    for batch in sampler:
        real = [pair for pair in batch if pair.weight]
        assert sorted(pair.kl for pair in real) == sorted(pair.sample for pair in real)
        assert {pair.sample for pair in batch} == {pair.sample for pair in real}
