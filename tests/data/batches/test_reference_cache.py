"""Log-probs on disk: found again, added to, and refused when they were computed from something else."""

import json

import pytest
import torch

from nemo_kto.data.batches.reference_cache import LogprobTable, ReferenceCache
from nemo_kto.errors import CheckpointError, ConfigError

KEY = {"reference model": "abc", "model.data.seq_length": 64, "reference adapter": None}


def documents(*pairs):
    return torch.tensor(pairs).T


def make(folder, key=KEY):
    return ReferenceCache(folder, key=key, num_samples={"train": 100, "validation": 7})


def test_a_table_knows_what_was_added():
    table = LogprobTable(100)
    assert len(table) == 0 and table.knows(torch.tensor([5, 0])).tolist() == [False, False]
    prompts, responses = documents((3, 3), (99, 0), (0, 99))
    table.add(table.names(prompts, responses), torch.tensor([-1.0, -2.0, -3.0]))
    assert len(table) == 3
    assert table.look_up(*documents((0, 99), (3, 3), (99, 0), (3, 3))).tolist() == [-3.0, -1.0, -2.0, -1.0]
    unknown = table.names(*documents((0, 98), (3, 3), (99, 99), (0, 0)))
    assert table.knows(unknown).tolist() == [False, True, False, False]
    with pytest.raises(AssertionError, match="not filled"):
        table.look_up(*documents((0, 98)))


def test_the_first_of_equal_names_counts():
    table = LogprobTable(10)
    table.add(torch.tensor([4, 2, 4]), torch.tensor([1.0, 2.0, 3.0]))
    table.add(torch.tensor([2, 3]), torch.tensor([5.0, 6.0]))
    assert table.look_up(*documents((0, 4), (0, 2), (0, 3))).tolist() == [1.0, 2.0, 6.0]
    assert len(table) == 3


def test_names_of_large_data_do_not_collide():
    table = LogprobTable(3_000_000_000)
    prompts, responses = documents((2_999_999_999, 0), (2_999_999_998, 2_999_999_999))
    assert table.names(prompts, responses).tolist() == [
        2_999_999_999 * 3_000_000_000,
        2_999_999_999**2 + 2_999_999_998,
    ]


def test_parts_are_read_back(tmp_path):
    cache = make(tmp_path / "cache")
    cache.check()
    cache.create()
    names, values = torch.tensor([3, 1]), torch.tensor([-0.1, -0.2])
    cache.write_part({"train": [(names, values), (torch.tensor([9]), torch.tensor([-0.3]))], "validation": []})
    cache.write_part({"train": [], "validation": [(names, 2 * values)]})
    again = make(tmp_path / "cache")
    again.check()
    again.read()
    assert torch.equal(
        again.tables["train"].look_up(*documents((0, 1), (0, 3), (0, 9))), torch.tensor([-0.2, -0.1, -0.3])
    )
    assert len(again.tables["validation"]) == 2
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".json", ".safetensors"}


def test_of_two_jobs_that_make_one_folder_the_second_is_refused(tmp_path):
    """Both have found it empty; whoever comes second must not add numbers of something else."""
    first, second = make(tmp_path), make(tmp_path, {**KEY, "tokenizer": "other"})
    first.check()
    second.check()
    first.create()
    with pytest.raises(ConfigError, match="another tokenizer"):
        second.create()
    first.create()  # again is no harm


def test_the_part_that_was_written_first_counts(tmp_path):
    cache = make(tmp_path)
    cache.create()
    for value in (-1.0, -2.0, -3.0):
        cache.write_part({"train": [(torch.tensor([4]), torch.tensor([value]))], "validation": []})
    again = make(tmp_path)
    again.read()
    assert again.tables["train"].look_up(*documents((0, 4))).tolist() == [-1.0]


def test_what_was_being_written_when_the_run_was_killed_is_not_read(tmp_path):
    cache = make(tmp_path)
    cache.create()
    (tmp_path / "part-1.partial").write_bytes(b"half of a file")
    cache.read()
    assert len(cache.tables["train"]) == 0


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"reference model": "abd"}, ["reference model"]),
        (
            {"model.data.seq_length": 65, "reference adapter": "x"},
            ["model.data.seq_length and another reference adapter"],
        ),
        ({"tokenizer": "new"}, ["tokenizer"]),
    ],
)
def test_other_origins_are_refused_by_name(tmp_path, changes, names):
    make(tmp_path).create()
    with pytest.raises(ConfigError) as error:
        make(tmp_path, {**KEY, **changes}).check()
    for name in (*names, str(tmp_path), "model.kto.reference.cache_dir"):
        assert name in str(error.value)


def test_origins_that_are_missing_now_count_too(tmp_path):
    make(tmp_path, {**KEY, "tokenizer": "old"}).create()
    with pytest.raises(ConfigError, match="another tokenizer"):
        make(tmp_path).check()


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="no cache of reference log-probs, and not empty"):
        make(tmp_path).check()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "key.partial").touch()  # of a run that was killed
    make(tmp_path / "empty").check()


def test_damaged_files_are_named(tmp_path):
    cache = make(tmp_path)
    cache.create()
    (tmp_path / "part-1.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"part-1.safetensors cannot be read"):
        cache.read()
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(CheckpointError, match="key.json cannot be read"):
        cache.check()


def test_the_key_says_in_words_what_it_is(tmp_path):
    make(tmp_path).create()
    assert json.loads((tmp_path / "key.json").read_text()) == KEY
