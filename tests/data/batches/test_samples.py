"""Which samples a split has: too long ones, portions of sources, prompts kept apart."""

import numpy as np
import pytest

from nemo_kto.data.batches.samples import fit, mix, split_by_prompt
from nemo_kto.data.reading.records import BadRecord
from nemo_kto.data.reading.sources import Source
from nemo_kto.data.tokens.store import StoreWriter, TokenStore, make_chunk
from nemo_kto.data.tokens.tokenization import EncodedRecord

BOS = 7


@pytest.fixture
def store_of(tmp_path):
    """Writes a store of (prompt, response) lists of ids; every other sample is desirable."""

    def write(*pairs, name="store", bad=0):
        records = [
            EncodedRecord(list(prompt), list(response), i % 2 == 0, merged=False, verbatim=False, spelled=False)
            for i, (prompt, response) in enumerate(pairs)
        ]
        with StoreWriter(tmp_path / name) as writer:
            writer.add(make_chunk([*records, *[BadRecord("f", 1, None, "x")] * bad]))
        return TokenStore(tmp_path / name)

    return write


def tokens(samples):
    return [(sample.prompt.tolist(), sample.response.tolist()) for sample in samples]


SHORT = ([1, 2], [3])
LONG = ([1, 2, 3], [4, 5, 6])
BOTH_LONG = ([1] * 6, [2] * 6)


@pytest.mark.parametrize(
    ("overlong", "kept", "num_overlong", "num_truncated"),
    [
        ("drop", [SHORT], 2, 0),
        # the prompt loses its beginning; of the last, the response alone is too long
        ("truncate_prompt_left", [SHORT, ([3], [4, 5, 6])], 1, 1),
        ("truncate_response", [SHORT, ([1, 2, 3], [4])], 1, 1),
    ],
)
def test_samples_of_too_many_tokens(store_of, overlong, kept, num_overlong, num_truncated):
    samples = fit(store_of(SHORT, LONG, BOTH_LONG), max_length=4, overlong=overlong, bos_token_id=BOS)
    assert tokens(samples) == kept
    assert (samples.num_overlong, samples.num_truncated) == (num_overlong, num_truncated)
    assert samples.lengths.tolist() == [len(p) + len(r) for p, r in kept]
    assert samples.last_tokens.tolist() == [r[-1] for _, r in kept]
    # a prompt that lost tokens is still the same prompt to the KL pairs
    whole = fit(store_of(SHORT, LONG, name="whole"), max_length=9, overlong="drop", bos_token_id=BOS)
    assert samples.prompt_keys.tolist() == whole.prompt_keys.tolist()[: len(samples)]


@pytest.mark.parametrize(("limit", "prompt"), [(6, [BOS, 4, 5]), (4, [BOS]), (9, [BOS, 1, 2, 3, 4, 5])])
def test_a_cut_prompt_keeps_its_bos(store_of, limit, prompt):
    store = store_of(([BOS, 1, 2, 3, 4, 5], [8, 8, 8]))
    (sample,) = fit(store, max_length=limit, overlong="truncate_prompt_left", bos_token_id=BOS)
    assert sample.prompt.tolist() == prompt and sample.response.tolist() == [8, 8, 8]
    (without,) = fit(store, max_length=6, overlong="truncate_prompt_left", bos_token_id=None)
    assert without.prompt.tolist() == [3, 4, 5]


def test_counts_and_columns_over_several_stores(store_of):
    first = fit(store_of(SHORT, LONG, bad=2), max_length=9, overlong="drop", bos_token_id=None)
    second = fit(store_of(LONG, SHORT, BOTH_LONG, name="b"), max_length=9, overlong="drop", bos_token_id=None)
    both = mix([(Source("a"), first), (Source("b"), second)], seed=0)
    assert tokens(both) == [SHORT, LONG, LONG, SHORT]
    assert (both.num_bad, both.num_overlong, both.num_desirable, both.num_undesirable) == (2, 1, 2, 2)
    assert both.column("prompt").tolist() == [2, 3, 3, 2]
    keys = both.prompt_keys.tolist()
    assert keys[0] == keys[3] != keys[1] == keys[2]
    assert [sample.desirable for sample in both] == [True, False, True, False]


@pytest.mark.parametrize(
    ("source", "counts"),
    [
        (Source("a"), [1] * 10),
        (Source("a", weight=3), [3] * 10),
        (Source("a", weight=0.3), (3, {1})),
        (Source("a", weight=0.001), (1, {1})),
        (Source("a", weight=1.5), (15, {1, 2})),
        (Source("a", max_records=4), (4, {1})),
        (Source("a", max_records=4, weight=2), (8, {2})),
        (Source("a", max_records=99), [1] * 10),
    ],
)
def test_portions(store_of, source, counts):
    store = store_of(*[([i + 1], [1]) for i in range(10)])
    samples = fit(store, max_length=9, overlong="drop", bos_token_id=None)
    taken = [mix([(source, samples)], seed=seed).place for seed in (0, 0, 1)]
    times = np.bincount(taken[0], minlength=10)
    if isinstance(counts, list):
        assert times.tolist() == counts
    else:
        assert times.sum() == counts[0] and set(times.tolist()) - {0} == counts[1]
        assert taken[0].tolist() != taken[2].tolist()
    assert taken[0].tolist() == taken[1].tolist()


@pytest.mark.parametrize("fraction", [0.0001, 0.1, 0.25, 0.9999])
def test_no_prompt_is_on_both_sides(store_of, fraction):
    """40 prompts with one to four samples each, 100 in all."""
    pairs = [([100 + i], [j + 1]) for i in range(40) for j in range(1 + i % 4)]
    samples = fit(store_of(*pairs), max_length=9, overlong="drop", bos_token_id=None)
    train, validation = split_by_prompt(samples, fraction, seed=3)
    prompts = [{prompt[0] for prompt, _ in tokens(side)} for side in (train, validation)]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 40 and all(prompts)
    assert len(train) + len(validation) == 100
    assert abs(len(validation) - 100 * fraction) <= 4  # a prompt's samples stay together


def test_a_split_hardly_changes_when_data_is_added(store_of):
    pairs = [([100 + i], [1]) for i in range(110)]
    sides = []
    for count in (100, 110):
        samples = fit(store_of(*pairs[:count], name=str(count)), max_length=9, overlong="drop", bos_token_id=None)
        sides.append({prompt[0] for prompt, _ in tokens(split_by_prompt(samples, 0.2, seed=3)[1])})
    assert len(sides[0]) == 20 and len(sides[1]) == 22 and len(sides[0] - sides[1]) <= 4


def test_a_writer_that_fails_leaves_no_store(tmp_path):
    with pytest.raises(ZeroDivisionError), StoreWriter(tmp_path / "s") as writer:
        writer.add(make_chunk([]))
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError):
        TokenStore(tmp_path / "s")
