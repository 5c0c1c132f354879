"""Numbers about feedback, counted by hand on a few samples."""

import pytest

from nemo_kto.data.batches.samples import fit
from nemo_kto.data.batches.statistics import describe, recommended_batch_size
from nemo_kto.data.reading.records import BadRecord
from nemo_kto.data.tokens.store import StoreWriter, TokenStore, make_chunk
from nemo_kto.data.tokens.tokenization import EncodedRecord


@pytest.fixture
def samples_of(tmp_path):
    """Samples of (prompt, response, desirable, merged), and records that are bad for the given reasons."""

    def make(rows, reasons=(), **settings):
        records = [
            EncodedRecord(p, r, good, merged=merged, verbatim=False, spelled=False) for p, r, good, merged in rows
        ]
        with StoreWriter(tmp_path / "store") as writer:
            writer.add(make_chunk([*records, *(BadRecord("f", 1, "response", reason) for reason in reasons)]))
        options = {"max_length": 100, "overlong": "drop", "bos_token_id": None, **settings}
        return fit(TokenStore(tmp_path / "store"), **options)

    return make


def test_counts(samples_of):
    rows = [
        ([1], [5, 5], True, False),
        ([1], [5, 5], True, False),  # a duplicate
        ([1], [5, 5], False, True),  # the same answer with the other label
        ([1, 2], [6], False, False),
        ([1, 2], [7], False, True),
        ([3] * 10, [8] * 20, True, False),
        ([4] * 50, [9] * 51, True, False),  # too long
    ]
    reasons = ["is empty; there is nothing to learn from.", "the response has no tokens.", "is missing."]
    found = describe(samples_of(rows, reasons), global_batch_size=2, seed=0)
    assert (found.samples, found.desirable, found.undesirable) == (6, 3, 3)
    assert (found.bad, found.empty_responses, found.overlong, found.truncated) == (3, 2, 1, 0)
    assert (found.duplicates, found.conflicts) == (1, 1)
    assert (found.prompts, found.shared_prompts, found.largest_group, found.boundary_merges) == (3, 2, 3, 2)
    assert found.tokens == 3 + 3 + 3 + 3 + 3 + 30
    # lengths in order: 1 1 1 2 2 10, and 1 1 2 2 2 20
    assert found.prompt_tokens == {"p50": 2, "p90": 10, "p99": 10, "max": 10}
    assert found.response_tokens == {"p50": 2, "p90": 20, "p99": 20, "max": 20}
    assert found.recommended_weights == (1.0, 1.0) and found.recommended_batch_size is None


def test_tokens_of_kl_pairs_and_padding(samples_of):
    """One batch of all four: every response is used once, so the KL pairs have as many tokens; three are padded."""
    rows = [([i], [9] * length, True, False) for i, length in enumerate((1, 1, 1, 5))]
    found = describe(samples_of(rows), global_batch_size=4, seed=0)
    assert (found.tokens, found.kl_tokens, found.kl_meetings) == (12, 12, 0)
    assert found.padding == 1 - 12 / (4 * 6)
    assert found.recommended_weights is None


def test_meetings_that_cannot_be_avoided(samples_of):
    """Three of four samples share a prompt; two of their KL responses must be to it."""
    rows = [([1], [5], True, False), ([1], [6], True, False), ([1], [7], False, False), ([2], [8], False, False)]
    assert describe(samples_of(rows), global_batch_size=4, seed=0).kl_meetings == 2


def test_too_few_samples_for_a_batch(samples_of):
    found = describe(samples_of([([1], [5], True, False)] * 3), global_batch_size=4, seed=0)
    assert (found.kl_meetings, found.kl_tokens, found.padding) == (None, None, None)
    assert found.global_batch_size == 4


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [(7, None), (8, 8), (1599, 8), (1600, 16), (6400, 64), (12_799, 64), (12_800, 128), (10**6, 128)],
)
def test_recommended_batch_size(num_samples, expected):
    """The largest up to 128 that leaves 100 steps."""
    assert recommended_batch_size(num_samples) == expected


@pytest.mark.parametrize(("num_desirable", "expected"), [(20, (1.0, 1.0)), (10, (3.0, 1.0)), (36, (1.0, 6.75))])
def test_recommended_weights(samples_of, num_desirable, expected):
    """Of 40: 10 against 30 needs 3; 36 against 4 needs 9 / (4/3) = 6.75."""
    rows = [([i], [5], i < num_desirable, False) for i in range(40)]
    found = describe(samples_of(rows), global_batch_size=None, seed=0)
    assert found.recommended_weights == pytest.approx(expected)
    assert found.global_batch_size == found.recommended_batch_size == 8
