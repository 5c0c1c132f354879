"""Files to loaders: counts, positions, layouts, validation, and errors that name the split."""

import logging
import resource

import pytest
import torch

from nemo_kto.data.datamodule import KTODataModule
from nemo_kto.errors import DataError

SETTINGS = {
    "format": "auto",
    "max_length": 32,
    "append_eod": True,
    "global_batch_size": 4,
    "shuffle": True,
    "seed": 1,
    "num_workers": 0,
}


def rows(count):
    return [
        {
            "prompt": f"say {i}",
            "response": " yes" * (1 + i % 3),
            "preference": ("chosen", "rejected", "rejected")[i % 3],
        }
        for i in range(count)
    ]


@pytest.fixture
def make(tokenizer, write_jsonl):
    """Builds and prepares a module over `train` and `validation` numbers of records."""

    def build(train=10, validation=0, **changes):
        files = {}
        if train:
            files["train_files"] = [write_jsonl(*rows(train), name="train.jsonl")]
        if validation:
            files["validation_files"] = [write_jsonl(*rows(validation), name="validation.jsonl")]
        module = KTODataModule(**{"train_files": [], "tokenizer": tokenizer, **SETTINGS, **files, **changes})
        module.prepare()
        module.set_position(dp_rank=0, dp_size=1, num_steps=2, steps_per_epoch=2, start_step=lambda: 0)
        return module

    return build


def prompts(loader):
    return [[prompt.tolist() for prompt, _ in batch.samples] for batch in loader]


def test_splits_and_their_counts(make, write_jsonl, caplog):
    caplog.set_level(logging.INFO, logger="nemo_kto")
    long = {"prompt": "say", "response": " hello" * 40, "preference": "chosen"}
    module = make(validation=2, train_files=[write_jsonl(*rows(6), long, name="long.jsonl")])
    assert set(module.splits) == {"train", "validation"}
    train = module.splits["train"]
    assert (len(train.samples), train.num_desirable, train.num_undesirable, train.num_overlong) == (6, 2, 4, 1)
    assert caplog.messages[0] == (
        "train data: 7 records, 6 kept (2 desirable, 4 undesirable), 1 dropped because they exceed 32 tokens"
    )


def test_several_files_make_one_split(make, write_jsonl):
    trl = {"prompt": "say", "completion": " hello", "label": True}
    module = make(train_files=[write_jsonl(*rows(4), name="a.jsonl"), write_jsonl(trl, name="b.jsonl")])
    assert len(module.splits["train"].samples) == 5


def test_train_batches(make, tokenizer):
    loader = make().train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    for batch in batches:
        assert len(batch.samples) == len(batch.kl_samples) == 4 and torch.equal(batch.weights, torch.ones(4))
        responses = sorted(response.tolist() for _, response in batch.samples)
        assert responses == sorted(response.tolist() for _, response in batch.kl_samples)
        assert all(response[-1] == tokenizer.eos_token_id for _, response in batch.samples)
        for (prompt, _), (kl_prompt, _) in zip(batch.samples, batch.kl_samples, strict=True):
            assert torch.equal(prompt, kl_prompt)


def test_ranks_share_the_batches_of_one_rank(make):
    module = make()
    whole = prompts(module.train_dataloader())
    parts = []
    for rank in range(2):
        module.set_position(dp_rank=rank, dp_size=2, num_steps=2, steps_per_epoch=2, start_step=lambda: 0)
        parts.append(prompts(module.train_dataloader()))
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


def test_loader_follows_the_position(make):
    module = make()
    step = 0
    module.set_position(dp_rank=0, dp_size=1, num_steps=4, steps_per_epoch=2, start_step=lambda: step)
    loader = module.train_dataloader()
    whole = prompts(loader)
    assert len(whole) == 4 and whole[2:] != whole[:2]
    step = 1
    assert prompts(loader) == whole[1:]


@pytest.mark.parametrize("global_batch_size", [2, 4, 8])
def test_validation_scores_each_record_once(make, global_batch_size):
    module = make(train=8, validation=7, global_batch_size=global_batch_size)
    batches = list(module.val_dataloader())
    real = [
        prompt.tolist() for batch in batches for (prompt, _), w in zip(batch.samples, batch.weights, strict=True) if w
    ]
    assert real == [sample.prompt.tolist() for sample in module.splits["validation"].samples]
    assert sum(batch.weights.sum().item() for batch in batches) == 7
    assert {len(batch.samples) for batch in batches} == {global_batch_size}


def test_absent_splits(make):
    module = make()
    assert module.val_dataloader() == []
    with pytest.raises(DataError, match="No training data was given"):
        make(train=0, validation=2).train_dataloader()


def test_loader_without_position(make, tokenizer):
    module = make()
    fresh = KTODataModule(train_files=[], tokenizer=tokenizer, **SETTINGS)
    fresh.splits = module.splits
    with pytest.raises(AssertionError, match="set_position"):
        fresh.train_dataloader()


@pytest.mark.parametrize(("max_positions", "longest"), [(None, 41), (36, 36)])
def test_kl_pairs_are_cut_only_where_the_model_ends(make, write_jsonl, max_positions, longest):
    """A prompt of 20 tokens joins a response of 21, EOS included: more than the 32 that a sample may have."""
    data = [
        {"prompt": "hello" * 20, "response": " yes", "preference": "chosen"},
        {"prompt": "say", "response": " yes" * 20, "preference": "rejected"},
    ]
    module = make(train_files=[write_jsonl(*data)], global_batch_size=2, max_positions=max_positions)
    module.set_position(dp_rank=0, dp_size=1, num_steps=1, steps_per_epoch=1, start_step=lambda: 0)
    (batch,) = module.train_dataloader()
    assert max(len(prompt) + len(response) for prompt, response in batch.kl_samples) == longest


@pytest.fixture
def few_file_descriptors():
    """As many as a process has by default on some systems, and fewer than the tensors of a few batches."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_worker_processes_yield_the_same_batches(make, few_file_descriptors):
    batches = {}
    for num_workers in (0, 2):
        module = make(train=1600, global_batch_size=64, num_workers=num_workers)
        module.set_position(dp_rank=0, dp_size=1, num_steps=25, steps_per_epoch=25, start_step=lambda: 0)
        batches[num_workers] = list(module.train_dataloader())
    assert len(batches[2]) == 25
    for ours, theirs in zip(batches[0], batches[2], strict=True):
        for mine, other in zip(ours.samples + ours.kl_samples, theirs.samples + theirs.kl_samples, strict=True):
            assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])
        assert torch.equal(ours.desirable, theirs.desirable) and torch.equal(ours.weights, theirs.weights)


def test_strings_for_a_chat_model_are_warned_about(make, tokenizer, caplog):
    assert tokenizer.chat_template
    make()
    assert "although the tokenizer has a chat template" in caplog.text


def test_files_are_read_once(make, tmp_path):
    module = make()
    (tmp_path / "train.jsonl").unlink()
    module.setup("fit")
    assert len(module.splits["train"].samples) == 10


def test_errors_name_the_split_and_come_early(make, tmp_path):
    with pytest.raises(DataError, match=r"train data: .*none.jsonl: no such file"):
        make(train_files=[tmp_path / "none.jsonl"])
    with pytest.raises(DataError, match=r"validation data: No trainable record is left"):
        make(validation=2, train=0, max_length=1)
    with pytest.raises(DataError, match="3 usable records.*batch of 4"):
        make(train=3)


def test_a_batch_of_one_is_warned_about(make, caplog):
    make(global_batch_size=1)
    assert "no response can be paired" in caplog.text
    caplog.clear()
    make()
    assert "no response can be paired" not in caplog.text


def test_global_batches_hold_the_ranks_shares_of_the_whole_run(make):
    module = make(train=10, validation=5)
    shares = {"train": [], "validation": []}
    for rank in range(2):
        module.set_position(dp_rank=rank, dp_size=2, num_steps=4, steps_per_epoch=2, start_step=lambda: 3)
        whole = {split: list(module.global_batches(split)) for split in shares}
        assert [len(batches) for batches in whole.values()] == [4, 2]  # from the first step on
        for split, batches in whole.items():
            shares[split].append([module.rank_batch(split, batch).pairs.tolist() for batch in batches])
    for split, (first, second) in shares.items():
        joined = [one + other for one, other in zip(first, second, strict=True)]
        assert joined == [[[pair.sample, pair.kl] for pair in batch] for batch in whole[split]]
    # what a loader deals
    module.set_position(dp_rank=1, dp_size=2, num_steps=4, steps_per_epoch=2, start_step=int)
    for dealt, batch in zip(module.train_dataloader(), whole["train"], strict=True):
        made = module.rank_batch("train", batch)
        assert dealt.pairs.tolist() == made.pairs.tolist()
        for one, other in zip(dealt.samples + dealt.kl_samples, made.samples + made.kl_samples, strict=True):
            assert [part.tolist() for part in one] == [part.tolist() for part in other]
