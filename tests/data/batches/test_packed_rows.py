"""Packed rows by hand, and batches from pairs."""

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_kto.data.batches.dataset import KTODataset, KTOItem, collate_documents
from nemo_kto.data.batches.dealing import DocumentIndex
from nemo_kto.data.batches.packed_rows import PackedRow, pack_documents
from nemo_kto.data.tokens.tokenization import TokenizedSample, prompt_key


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def sample(prompt, response, desirable=True):
    return TokenizedSample(ids(*prompt), ids(*response), desirable, prompt_key(ids(*prompt)))


def assert_row(row: PackedRow, **expected):
    for name, value in expected.items():
        actual = getattr(row, name)
        assert (actual.tolist() if isinstance(actual, torch.Tensor) else actual) == value, name


def test_pack_by_hand():
    row = pack_documents([(ids(1, 2, 3), ids(4, 5)), (ids(6), ids(7)), (ids(8), ids(9, 10, 11))])
    assert_row(
        row,
        tokens=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        position_ids=[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3],
        cu_seqlens=[0, 5, 7, 11],
        lengths=(5, 2, 4),
        max_seqlen=5,
        response_positions=[2, 3, 5, 7, 8, 9],
        response_tokens=[4, 5, 7, 9, 10, 11],
        document_ids=[0, 0, 1, 2, 2, 2],
        response_lengths=(2, 1, 3),
        num_documents=3,
    )
    assert row.padded(11) is row
    assert_row(
        row.padded(4),
        tokens=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0],
        position_ids=[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 0],
        cu_seqlens=[0, 5, 7, 11, 12],
        lengths=(5, 2, 4, 1),
        max_seqlen=5,
        response_positions=[2, 3, 5, 7, 8, 9],
        response_tokens=[4, 5, 7, 9, 10, 11],
        document_ids=[0, 0, 1, 2, 2, 2],
        response_lengths=(2, 1, 3, 0),
    )
    assert_row(
        row.padded(4).shard(1, 3),
        tokens=[5, 6, 7, 8],
        position_ids=[4, 0, 1, 0],
        cu_seqlens=[0, 5, 7, 11, 12],
        lengths=(5, 2, 4, 1),
        response_positions=[1, 3],
        response_tokens=[7, 9],
        document_ids=[1, 2],
        response_lengths=(0, 1, 1, 0),
    )
    assert_row(
        row.padded(12).shard(0, 6),
        tokens=[1, 2],
        response_positions=[],
        document_ids=[],
        response_lengths=(0, 0, 0, 0),
    )
    assert row.shard(0, 1) is row
    assert row.padded(4).cu_seqlens.dtype == row.cu_seqlens.dtype == torch.int32
    for name in ("tokens", "position_ids", "response_positions", "response_tokens", "document_ids"):
        assert getattr(row, name).dtype == torch.int64, name


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6))
def test_each_response_token_follows_its_position_within_its_document(lengths):
    documents = [(torch.arange(p) + 100 * i, torch.arange(r) + 100 * i + 50) for i, (p, r) in enumerate(lengths)]
    row = pack_documents(documents)
    assert torch.equal(row.tokens[row.response_positions + 1], row.response_tokens)
    assert torch.equal(row.response_tokens // 100, row.document_ids)
    assert torch.equal(row.tokens[row.response_positions] // 100, row.document_ids)
    assert row.response_tokens.numel() == sum(r for _, r in lengths)
    assert row.max_seqlen == row.position_ids.max() + 1 == row.cu_seqlens.diff().max()
    assert (row.position_ids[row.cu_seqlens[:-1].long()] == 0).all()


def test_row_moves_as_a_whole():
    row = pack_documents([(ids(1), ids(2))]).to("meta")
    assert {value.device.type for value in vars_of(row).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert row.max_seqlen == 2


def vars_of(row: PackedRow) -> dict:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}


def test_dataset_looks_up_documents():
    dataset = KTODataset([sample([1], [2, 3]), sample([4, 5], [6], desirable=False)])
    assert len(dataset) == 2
    item = dataset[DocumentIndex(1, 1, 0, weight=0.0)]
    assert (item.prompt.tolist(), item.response.tolist()) == ([4, 5], [6])
    assert (item.desirable, item.index.weight) == (False, 0.0)
    other = dataset[DocumentIndex(1, 0, 0, in_kl_set=True)]
    assert (other.prompt.tolist(), other.response.tolist()) == ([4, 5], [2, 3])


def test_kl_response_is_cut_to_the_length_the_model_knows():
    samples = [sample([1], [2, 3, 4, 5]), sample([6, 7, 8, 9], [10])]
    pair = DocumentIndex(1, 0, 0, in_kl_set=True)
    assert KTODataset(samples)[pair].response.tolist() == [2, 3, 4, 5]
    cut = KTODataset(samples, max_positions=5)
    assert cut[pair].response.tolist() == [2]
    assert cut[DocumentIndex(0, 0, 0, in_kl_set=True)].response.tolist() == [2, 3, 4, 5]
    assert cut[DocumentIndex(1, 1, 0)].response.tolist() == [10]


def test_moving_a_batch_leaves_its_documents_where_they_are():
    items = [
        KTOItem(ids(1), ids(2), True, DocumentIndex(0, 0, 0)),
        KTOItem(ids(1), ids(3), True, DocumentIndex(0, 1, 0, in_kl_set=True)),
    ]
    batch = collate_documents(items).to("meta", non_blocking=True)
    assert (
        batch.desirable.is_meta and batch.weights.is_meta and batch.kl_weights.is_meta and batch.loss_weights.is_meta
    )
    assert not batch.pairs.is_meta and not batch.places.is_meta
    (row,) = batch.kl_rows()
    assert_row(row, tokens=[1, 3])


def test_batch_and_its_rows():
    items = [
        KTOItem(ids(1), ids(2), True, DocumentIndex(8, 8, 4), 2.0),
        KTOItem(ids(3), ids(4, 5), False, DocumentIndex(3, 3, 0)),
        KTOItem(ids(6), ids(7), True, DocumentIndex(5, 5, 2, weight=0.0, row=1)),
        KTOItem(ids(1), ids(4, 5), True, DocumentIndex(8, 3, 1, in_kl_set=True)),
        KTOItem(ids(3), ids(7), False, DocumentIndex(3, 5, 0, in_kl_set=True, weight=0.0, row=1)),
    ]
    for batch in (collate_documents(items), pickle.loads(pickle.dumps(collate_documents(items)))):
        assert torch.equal(batch.desirable, torch.tensor([True, False, True]))
        assert batch.pairs.tolist() == [[8, 8], [3, 3], [5, 5]] and batch.kl_pairs.tolist() == [[8, 3], [3, 5]]
        assert batch.places.tolist() == [4, 0, 2] and batch.kl_places.tolist() == [1, 0]
        assert torch.equal(batch.weights, torch.tensor([1.0, 1.0, 0.0])) and batch.weights.dtype == torch.float32
        assert torch.equal(batch.kl_weights, torch.tensor([1.0, 0.0]))
        assert torch.equal(batch.loss_weights, torch.tensor([2.0, 1.0, 0.0]))
        first, last = batch.sample_rows()
        assert_row(first, tokens=[1, 2, 3, 4, 5], cu_seqlens=[0, 2, 5])
        assert_row(last, tokens=[6, 7], cu_seqlens=[0, 2])
        assert [row.tokens.tolist() for row in batch.kl_rows()] == [[1, 4, 5], [3, 7]]
