"""How a global batch is dealt to ranks and micro-batches: nothing is lost, work is even, order where it matters."""

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_kto.data.batches.dealing import Dealer, Division, DocumentIndex
from nemo_kto.errors import ConfigError


def documents(number, *, in_kl_set=False):
    return [DocumentIndex(i, (i + in_kl_set) % number, i, in_kl_set) for i in range(number)]


def deal(lengths, parts, *, dp_size=1, max_positions=None, **division):
    """Each rank's micro-batches of prompts of one token and responses that make up the rest of `lengths`."""
    prompts, responses = np.ones(len(lengths), dtype=np.int64), np.array(lengths) - 1
    shares = []
    for rank in range(dp_size):
        dealer = Dealer(
            Division(dp_rank=rank, dp_size=dp_size, **division), prompts, responses, max_positions=max_positions
        )
        dealt = dealer.share(parts)
        shares.append([list(row) for _, row in groupby(dealt, key=lambda index: (index.in_kl_set, index.row))])
    return shares


def places(share):
    return [[index.place for index in row] for row in share]


def tokens(row, lengths):
    return sum(lengths[index.response] for index in row)


LENGTHS = st.lists(st.integers(2, 300), min_size=1, max_size=6)


@given(LENGTHS, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.booleans())
def test_every_document_is_dealt_once(some, dp_size, size, by_length):
    lengths = some * dp_size * size
    whole = documents(len(lengths)) + documents(len(lengths), in_kl_set=True)
    shares = deal(lengths, whole, dp_size=dp_size, micro_batch_size=size, kl_micro_batch_size=1, by_length=by_length)
    found = [index._replace(row=0) for share in shares for row in share for index in row]
    assert sorted(found) == sorted(whole)
    for share in shares:
        assert [len(row) for row in share] == [size] * len(some) + [1] * len(some) * size
        assert [row[0].row for row in share] == [*range(len(some)), *range(len(some) * size)]


def test_by_hand():
    """The longest first, each to the group that is shortest by then."""
    lengths = [2, 9, 4, 8, 3, 5]
    whole = documents(6)
    assert places(deal(lengths, whole, micro_batch_size=3)[0]) == [[0, 3, 5], [1, 2, 4]]  # 8+5+2 and 9+4+3
    assert [places(share) for share in deal(lengths, whole, dp_size=3)] == [
        [[0], [1]],  # 9+2
        [[2], [5]],  # 5+4
        [[3], [4]],  # 8+3
    ]
    assert [places(share) for share in deal(lengths[:4], documents(4), dp_size=2, micro_batch_size=2)] == [
        [[0, 1]],  # 9+2
        [[2, 3]],  # 8+4
    ]


def test_order_is_kept_where_it_matters():
    shares = deal([2, 9, 4, 8, 3, 5], documents(6), dp_size=3, micro_batch_size=2, by_length=False)
    assert [places(share) for share in shares] == [[[0, 1]], [[2, 3]], [[4, 5]]]


def test_work_is_even():
    lengths = np.clip(np.random.default_rng(1).lognormal(5.5, 0.8, 128), 10, 2000).astype(int).tolist()

    def imbalance(**division):
        shares = deal(lengths, documents(128), dp_size=8, micro_batch_size=2, **division)
        loads = [sum(tokens(row, lengths) for row in share) for share in shares]
        return max(loads) * 8 / sum(loads)

    assert imbalance(by_length=False) > 1.2
    assert imbalance() < 1.01


@given(st.lists(st.integers(2, 120), min_size=4, max_size=30), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_a_number_of_tokens(some, dp_size, multiple):
    """No micro-batch has more tokens, unless a single document; the number of micro-batches suits everyone."""
    lengths = some[: len(some) // 4 * 4]
    shares = deal(lengths, documents(len(lengths)), dp_size=dp_size, multiple=multiple, micro_batch_tokens=100)
    assert sorted(index.place for share in shares for row in share for index in row) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) % multiple == 0
    rows = [row for share in shares for row in share]
    assert all(row and (len(row) == 1 or tokens(row, lengths) <= 100) for row in rows)


def test_no_more_micro_batches_than_are_needed():
    (share,) = deal([50, 50, 40, 60, 90, 10], documents(6), micro_batch_tokens=100)
    assert sorted(places(share)) == [[0, 1], [2, 3], [4, 5]]


def test_documents_of_the_kl_set_have_their_own_lengths():
    """A prompt of one token with another's response, cut to what the model knows."""
    lengths = [10, 90, 40, 60]
    (share,) = deal(lengths, documents(4, in_kl_set=True), micro_batch_tokens=100)
    assert sorted(places(share)) == [[0, 3], [1, 2]]  # responses of 1 (90) and 0 (10), of 2 (40) and 3 (60)
    (share,) = deal(lengths, documents(4, in_kl_set=True), micro_batch_tokens=100, max_positions=30)
    assert len(share) == 1  # 10 and three times 30


@pytest.mark.parametrize(
    "division", [{"dp_size": 3}, {"micro_batch_size": 3}, {"multiple": 3, "micro_batch_tokens": 9}]
)
def test_what_cannot_be_shared(division):
    with pytest.raises(ConfigError, match=r"4 documents .* cannot be divided by 3"):
        deal([5] * 4, documents(4), **division)
