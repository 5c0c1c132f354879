"""Files to loaders: counts, positions, layouts, validation, and errors that name the split."""

import json
import logging
import multiprocessing
import resource
from dataclasses import fields

import numpy as np
import pytest
import torch

from nemo_kto.data.batches.datamodule import DataSettings, KTODataModule
from nemo_kto.data.reading.sources import Source
from nemo_kto.errors import DataError
from tests.waiting import HANG

SETTINGS = {"max_length": 32, "global_batch_size": 4, "seed": 1}


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
def make(tokenizer, write_jsonl, tmp_path):
    """Builds and prepares a module; `train` and `validation` are numbers of records, or files and sources."""

    def sources(split, entries):
        if isinstance(entries, int):
            entries = [write_jsonl(*rows(entries), name=f"{split}.jsonl")] if entries else []
        return [entry if isinstance(entry, Source) else Source(str(entry)) for entry in entries]

    def build(train=10, validation=0, **changes):
        settings = DataSettings(
            train=sources("train", train),
            validation=sources("validation", validation),
            **{"cache_dir": tmp_path / "tokens", **SETTINGS, **changes},
        )
        module = KTODataModule(settings, tokenizer)
        module.prepare()
        module.set_position(dp_rank=0, dp_size=1, num_steps=2, steps_per_epoch=2, start_step=lambda: 0)
        return module

    return build


def prompts(loader):
    return [[prompt.tolist() for prompt, _ in batch.samples] for batch in loader]


def test_splits_and_their_counts(make, write_jsonl, caplog):
    caplog.set_level(logging.INFO, logger="nemo_kto")
    long = {"prompt": "say", "response": " hello" * 40, "preference": "chosen"}
    module = make(validation=2, train=[write_jsonl(*rows(6), long, name="long.jsonl")])
    assert set(module.splits) == {"train", "validation"}
    train = module.splits["train"]
    assert (len(train), train.num_desirable, train.num_undesirable, train.num_overlong) == (6, 2, 4, 1)
    assert [message.split(" ")[0] for message in caplog.messages[:2]] == ["Tokenizing", "Tokenized"]
    assert caplog.messages[2] == (
        "train data: 6 samples (2 desirable, 4 undesirable), 1 dropped because they exceed 32 tokens"
    )


def test_several_files_make_one_split(make, write_jsonl):
    trl = {"prompt": "say", "completion": " hello", "label": True}
    module = make(train=[write_jsonl(*rows(4), name="a.jsonl"), write_jsonl(trl, name="b.jsonl")])
    assert len(module.splits["train"]) == 5


def test_labels_of_what_is_validated(make):
    # ten samples in batches of 3, 3 and 4; the first of every three is desirable
    module = make(validation=10)
    assert module.validated(1).tolist() == [True, False, False]
    assert module.validated(3).tolist() == [True, False, False] * 3 + [True]
    assert make(validation=10, kl_group_size=2).validated(1).tolist() == [True, False, False, True]


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
    assert {len(batch) for part in parts for batch in part} == {2}
    assert [sorted(first + second) for first, second in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]


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
    assert real == [sample.prompt.tolist() for sample in module.splits["validation"]]
    assert sum(batch.weights.sum().item() for batch in batches) == 7
    assert {len(batch.samples) for batch in batches} == {global_batch_size}


def test_absent_splits(make):
    module = make()
    assert module.val_dataloader() == []
    with pytest.raises(DataError, match="No training data was given"):
        make(train=0, validation=2).train_dataloader()


def test_loader_without_position(make, tokenizer, tmp_path):
    module = make()
    fresh = KTODataModule(DataSettings(train=[], cache_dir=tmp_path, **SETTINGS), tokenizer)
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
    module = make(train=[write_jsonl(*data)], global_batch_size=2, max_positions=max_positions)
    module.set_position(dp_rank=0, dp_size=1, num_steps=1, steps_per_epoch=1, start_step=lambda: 0)
    (batch,) = module.train_dataloader()
    assert max(len(prompt) + len(response) for prompt, response in batch.kl_samples) == longest


@pytest.fixture
def hardly_any_means(tmp_path, monkeypatch):
    """As many file descriptors as some systems give, and a temporary folder in whose path no socket has room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(folder))  # what workers inherit
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_worker_processes_yield_the_same_batches(make, hardly_any_means):
    batches = []
    for num_workers in (0, 2):
        module = make(train=1600, global_batch_size=64, num_workers=num_workers)
        module.set_position(dp_rank=0, dp_size=1, num_steps=25, steps_per_epoch=25, start_step=lambda: 0)
        loader = module.train_dataloader()
        loader.timeout = HANG if num_workers else 0
        batches.append(list(loader))
    assert len(batches[0]) == 25
    for ours, theirs in zip(*batches, strict=True):
        for mine, other in zip(ours.samples + ours.kl_samples, theirs.samples + theirs.kl_samples, strict=True):
            assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])
        for field in fields(ours)[2:]:
            mine, other = getattr(ours, field.name), getattr(theirs, field.name)
            same = torch.equal(mine, other) and mine.dtype == other.dtype if torch.is_tensor(mine) else mine == other
            assert same, field.name


def test_strings_for_a_chat_model_are_warned_about(make, tokenizer, caplog):
    assert tokenizer.chat_template
    make()
    assert "although the tokenizer has a chat template" in caplog.text


def test_files_are_read_once(make, tmp_path):
    module = make()
    (tmp_path / "train.jsonl").unlink()
    module.setup("fit")
    assert len(module.splits["train"]) == 10


def test_errors_name_the_split_and_come_early(make, tmp_path):
    with pytest.raises(DataError, match=r"train data: .*none.jsonl: no such file"):
        make(train=[tmp_path / "none.jsonl"])
    with pytest.raises(DataError, match=r"validation data: No trainable record is left"):
        make(validation=2, train=0, max_length=1)
    with pytest.raises(DataError, match="3 usable records.*batch of 4"):
        make(train=3)


def test_what_a_chat_template_leaves_out_is_said_once(make, write_jsonl, caplog):
    call = {"role": "assistant", "content": "say", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    messages = [{"role": "user", "content": "say"}, call, {"role": "user", "content": "hello"}]
    row = {"messages": [*messages, {"role": "assistant", "content": "yes"}], "label": True}
    path = write_jsonl(*[row] * 5)
    make(train=[path])
    said = [message for message in caplog.messages if "leaves out" in message]
    assert said == [
        "train data: in 5 records, the chat template leaves out a tool call of an earlier answer. "
        f'For example {path}:1: "add"'
    ]


def test_a_batch_of_one_is_warned_about(make, caplog):
    make(global_batch_size=1)
    assert "no response can be paired" in caplog.text
    caplog.clear()
    make()
    assert "no response can be paired" not in caplog.text


def placed(batch):
    """What a rank has of a global batch: (in the KL set, place, prompt, response) of each document."""
    parts = ((False, batch.places, batch.pairs), (True, batch.kl_places, batch.kl_pairs))
    return [
        (kl, place, *pair)
        for kl, places, pairs in parts
        for place, pair in zip(places.tolist(), pairs.tolist(), strict=True)
    ]


def test_global_batches_hold_the_ranks_shares_of_the_whole_run(make):
    module = make(train=10, validation=5)
    shares = {"train": [], "validation": []}
    for rank in range(2):
        module.set_position(dp_rank=rank, dp_size=2, num_steps=4, steps_per_epoch=2, start_step=lambda: 3)
        whole = {split: list(module.global_batches(split)) for split in shares}
        assert [len(batches) for batches in whole.values()] == [4, 2]  # from the first step on
        for split, batches in whole.items():
            shares[split].append([placed(module.rank_batch(split, batch)) for batch in batches])
    for split, (first, second) in shares.items():
        joined = [sorted(one + other) for one, other in zip(first, second, strict=True)]
        assert joined == [
            sorted((i.in_kl_set, i.place, i.prompt, i.response) for i in batch) for batch in whole[split]
        ]
    # what a loader deals
    module.set_position(dp_rank=1, dp_size=2, num_steps=4, steps_per_epoch=2, start_step=int)
    for dealt, batch in zip(module.train_dataloader(), whole["train"], strict=True):
        made = module.rank_batch("train", batch)
        assert placed(dealt) == placed(made)
        for one, other in zip(dealt.samples + dealt.kl_samples, made.samples + made.kl_samples, strict=True):
            assert [part.tolist() for part in one] == [part.tolist() for part in other]


BAD = {"prompt": "say", "response": "yes", "preference": "maybe"}


def test_bad_records_end_the_run(make, write_jsonl):
    path = write_jsonl(*rows(6), BAD, name="bad.jsonl")
    with pytest.raises(DataError, match=rf"train data: {path}:7: field 'preference' must be .*on_bad_record=skip"):
        make(train=[path])
    many = write_jsonl(*rows(6), *[BAD] * 20, name="many.jsonl")
    with pytest.raises(DataError) as caught:
        make(train=[many])
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0].strip() for line in lines[1:11]] == [f"{many}:{i}" for i in range(7, 17)]
    assert lines[0] == "train data: More than 10 records cannot be used:" and len(lines) == 12


def test_bad_records_may_be_skipped(make, write_jsonl, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="nemo_kto")
    listed = tmp_path / "logs" / "bad_records.jsonl"
    path = write_jsonl(BAD, *rows(6), "{", name="bad.jsonl")
    module = make(train=[path], on_bad_record="skip")
    module.list_bad_records(listed)
    assert len(module.splits["train"]) == 6
    assert "2 bad records skipped" in caplog.text
    first, second = (json.loads(line) for line in listed.read_text().splitlines())
    assert (first["source"], first["line"], first["field"]) == (str(path), 1, "preference")
    assert (second["line"], second["field"]) == (8, None) and "not valid JSON" in second["reason"]
    # found in the cache, they are as bad as before
    with pytest.raises(DataError, match="2 records cannot be used"):
        make(train=[path])
    make().list_bad_records(listed)  # another run in this folder
    assert not listed.exists()
    listed.parent.rmdir()
    listed.parent.write_text("")
    with pytest.raises(DataError, match="bad_records.jsonl cannot be written"):
        module.list_bad_records(listed)


def test_a_validation_split_shares_no_prompt_with_training(make, write_jsonl):
    """Two answers each to 50 prompts; a fifth of the samples is validated on."""
    data = [
        {"prompt": f"say {i}", "response": answer, "preference": preference}
        for i in range(50)
        for answer, preference in ((" yes", "chosen"), (" no", "rejected"))
    ]
    path = write_jsonl(*data, name="pairs.jsonl")
    kept = {}
    for seed in (1, 1, 2):
        splits = make(train=[path], validation_fraction=0.2, seed=seed).splits
        keys = {split: set(samples.prompt_keys.tolist()) for split, samples in splits.items()}
        assert [len(splits[split]) for split in ("train", "validation")] == [80, 20]
        assert not keys["train"] & keys["validation"] and len(keys["train"] | keys["validation"]) == 50
        assert kept.setdefault(seed, keys) == keys
    assert kept[1] != kept[2]


def test_one_prompt_cannot_be_split(make, write_jsonl):
    path = write_jsonl(*[{"prompt": "say", "response": f" {i}", "preference": "chosen"} for i in range(9)])
    with pytest.raises(DataError, match="all samples have the same prompt"):
        make(train=[path], validation_fraction=0.5)


def test_a_mixture(make, write_jsonl):
    """All of one file twice, a half of the second, three of the third."""
    paths = [
        write_jsonl(
            *[{"prompt": f"say {name} {i}", "response": " yes", "preference": "chosen"} for i in range(10)],
            name=f"{name}.jsonl",
        )
        for name in "abc"
    ]
    sources = [
        Source(str(paths[0]), weight=2),
        Source(str(paths[1]), weight=0.5),
        Source(str(paths[2]), max_records=3),
    ]
    module = make(train=sources)
    train = module.splits["train"]
    assert np.bincount(train.store_of).tolist() == [20, 5, 3]
    assert np.bincount(train.place[train.store_of == 0]).tolist() == [2] * 10
    assert len(set(train.place[train.store_of == 1].tolist())) == 5
    assert make(train=sources).digest("train") == module.digest("train") != make(train=sources, seed=2).digest("train")


def test_the_digest_is_of_the_tokens_not_of_the_file(make, write_jsonl, tmp_path):
    path = write_jsonl(*rows(8), name="one.jsonl")
    other = tmp_path / "two.json"
    other.write_text(
        json.dumps([{"completion": r["response"], "label": r["preference"], "prompt": r["prompt"]} for r in rows(8)])
    )
    assert make(train=[path]).digest("train") == make(train=[other]).digest("train")
    changed = rows(8)
    changed[3]["preference"] = "rejected" if changed[3]["preference"] == "chosen" else "chosen"
    assert make(train=[path]).digest("train") != make(train=[write_jsonl(*changed)]).digest("train")


def test_strings_that_spell_special_tokens_are_counted(make, write_jsonl, caplog):
    caplog.set_level(logging.INFO, logger="nemo_kto")
    make(train=[write_jsonl(*rows(4), {**rows(1)[0], "prompt": "<|user|>say"})])
    assert "1 samples are strings that spell special tokens" in caplog.text
