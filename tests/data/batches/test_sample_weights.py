"""Weights of samples and the files they come from, from a record's field to a batch."""

from __future__ import annotations

import json
import pickle

import pytest

from nemo_kto.data.batches.datamodule import DataSettings, KTODataModule
from nemo_kto.data.reading.chunks import parse_chunk, read_chunks
from nemo_kto.data.reading.records import BadRecord
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import Source, parse_source
from tests.integration.assets import make_tokenizer


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def record(prompt, **more):
    return {"prompt": prompt, "completion": " sky", "label": True, **more}


def read(path, **reader):
    chunks = read_chunks(parse_source(path, RowReader(**reader)), 10)
    return [found for chunk in chunks for found in parse_chunk(chunk)]


def prepared(tmp_path, train, **changes):
    settings = DataSettings(
        train=[Source(str(path)) for path in train],
        **{"max_length": 64, "cache_dir": tmp_path / "tokens", "global_batch_size": 4, "seed": 1, **changes},
    )
    data = KTODataModule(settings, make_tokenizer())
    data.prepare()
    data.set_position(dp_rank=0, dp_size=1, num_steps=1, steps_per_epoch=1, start_step=int)
    return data


def test_a_record_has_weight_one_unless_it_says_otherwise(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        record("red", weight=2),
        record("sea"),
        record("sun", weight=None),
        record("dog", weight=0),
    )
    assert [found.weight for found in read(path)] == [2.0, 1.0, 1.0, 0.0]


def test_both_answers_of_a_pair_have_its_weight(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "chosen": " a", "rejected": " b", "weight": 0.25})
    assert [(found.desirable, found.weight) for found in read(path)] == [(True, 0.25), (False, 0.25)]


def test_the_column_can_have_another_name_or_be_left_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", record("red", trust=0.5, weight="3 kg"))
    assert [found.weight for found in read(path, fields={"weight": "trust"})] == [0.5]
    assert [found.weight for found in read(path, fields={"weight": "none"})] == [1.0]


@pytest.mark.parametrize("value", [-1, "2 kg", "-1", "nan", True, float("nan"), float("inf"), [1], {}])
def test_other_weights_are_refused(tmp_path, value):
    (bad,) = read(write(tmp_path / "a.jsonl", record("red", weight=value)))
    assert isinstance(bad, BadRecord) and bad.field == "weight"
    assert "a.jsonl:1: field 'weight' must be a number of at least 0" in str(bad)


def test_weights_reach_the_batch(tmp_path):
    """Four samples, and in validation three and a place that is filled up."""
    rows = [
        record(word, weight=weight) for word, weight in zip(["red", "sea", "sun", "dog"], [2, 0.5, 0, 1], strict=True)
    ]
    train, validation = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *rows[:3])
    data = prepared(tmp_path, [train], shuffle=False, validation=[Source(str(validation))])
    (batch,), (held_out,) = data.train_dataloader(), data.val_dataloader()
    assert batch.loss_weights.tolist() == [2.0, 0.5, 0.0, 1.0] and batch.weights.tolist() == [1.0] * 4
    assert held_out.loss_weights.tolist() == [2.0, 0.5, 0.0, 0.0] and held_out.weights.tolist() == [1.0, 1.0, 1.0, 0.0]
    copy = pickle.loads(pickle.dumps(batch))
    assert copy.loss_weights.tolist() == batch.loss_weights.tolist() and len(copy.kl_samples) == 4
    assert data.splits["train"].class_totals == (3.5, 0.0)


def test_weights_are_part_of_a_run_but_not_of_what_the_reference_scores(tmp_path):
    rows = [record(word) for word in ["red", "sea", "sun", "dog"]]
    one = prepared(tmp_path, [write(tmp_path / "a.jsonl", *rows)])
    other = prepared(tmp_path, [write(tmp_path / "b.jsonl", *[{**row, "weight": 2} for row in rows])])
    assert one.digest("train") == other.digest("train")
    assert one.digest("train", weights=True) != other.digest("train", weights=True)


def test_without_a_kl_set_nothing_is_paired(tmp_path):
    data = prepared(
        tmp_path, [write(tmp_path / "a.jsonl", *map(record, ["red", "sea", "sun", "dog"]))], kl_fraction=0.0
    )
    (batch,) = data.train_dataloader()
    assert batch.kl_samples == [] and batch.kl_rows() == [] and batch.kl_pairs.shape == (0, 2)
    copy = pickle.loads(pickle.dumps(batch))
    assert len(copy.samples) == 4 and copy.kl_samples == []


def test_each_sample_knows_its_file(tmp_path):
    """A folder of two files, then a file; what is kept for validation knows its files too."""
    (tmp_path / "folder").mkdir()
    one = write(tmp_path / "folder" / "a.jsonl", record("red"), record("sea"))
    two = write(tmp_path / "folder" / "b.jsonl", record("sun"))
    three = write(tmp_path / "c.jsonl", record("dog"), record("cat"), record("sky"))
    data = prepared(tmp_path, [tmp_path / "folder", three], validation_fraction=0.34)
    found = {}
    for split in ("train", "validation"):
        names, file_of = data.files_of(split)
        assert names == [str(one), str(two), str(three)]
        samples = data.splits[split]
        found |= {int(samples[i].prompt[0]): names[file_of[i]] for i in range(len(samples))}
    token = make_tokenizer().convert_tokens_to_ids
    expected = {"red": one, "sea": one, "sun": two, "dog": three, "cat": three, "sky": three}
    assert found == {token(word): str(path) for word, path in expected.items()}
