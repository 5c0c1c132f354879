"""What is said of a run: numbers of its data counted by hand, and the run.json that a run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_kto.data.batches.samples import Samples, fit
from nemo_kto.data.batches.statistics import summarize
from nemo_kto.data.tokens.store import StoreWriter, TokenStore, make_chunk
from nemo_kto.data.tokens.tokenization import EncodedRecord
from nemo_kto.runs.facts import write_facts
from nemo_kto.weights.model_card import read_facts
from tests.distributed_harness import free_port
from tests.integration.assets import make_model_folder, settings, train_on_rank, write_feedback

SECRET = "correct-horse-battery-staple"
MOST_BINS = 30


@pytest.fixture
def samples_of(tmp_path: Path) -> Callable[..., Samples]:
    """Return samples of (prompt tokens, response tokens, whether desirable)."""

    def make(rows: list[tuple[int, int, bool]], **options: Any) -> Samples:
        records = [
            EncodedRecord([1] * prompt, [2] * response, good, merged=False, verbatim=False, spelled=False)
            for prompt, response, good in rows
        ]
        with StoreWriter(tmp_path / "store") as writer:
            writer.add(make_chunk(records))
        return fit(
            TokenStore(tmp_path / "store"), **{"max_length": 1000, "overlong": "drop", **options}, bos_token_id=None
        )

    return make


# numbers of the data


def test_samples_and_sources_by_hand(samples_of: Callable[..., Samples]) -> None:
    rows = [(3, 2, True), (4, 2, True), (5, 9, False), (3, 1, False), (9, 40, True), (4, 4, False)]
    samples = samples_of(rows, max_length=40)  # the fifth is too long
    found = summarize(samples, ["a.jsonl", "b.jsonl", "none.jsonl"], np.array([0, 1, 0, 1, 1]))
    assert found["sources"] == [
        {"path": "a.jsonl", "samples": 2, "desirable": 1},
        {"path": "b.jsonl", "samples": 3, "desirable": 1},
        {"path": "none.jsonl", "samples": 0, "desirable": 0},
    ]
    numbers = ("samples", "desirable", "undesirable", "overlong", "truncated", "bad")
    assert [found[name] for name in numbers] == [5, 2, 3, 1, 0, 0]
    # few lengths: a bin for each. Prompts of 3, 4, 5, 3, 4 tokens
    assert found["prompt_lengths"] == {"edges": [3, 4, 5, 6], "desirable": [1, 1, 0], "undesirable": [1, 1, 1]}
    # responses of 2, 2, 9, 1, 4
    responses = found["response_lengths"]
    assert responses["edges"] == list(range(1, 11))
    assert responses["desirable"] == [0, 2, 0, 0, 0, 0, 0, 0, 0]
    assert responses["undesirable"] == [1, 0, 0, 1, 0, 0, 0, 0, 1]
    assert json.loads(json.dumps(found)) == found


def test_a_cut_sample_counts_with_what_is_left(samples_of: Callable[..., Samples]) -> None:
    samples = samples_of([(3, 2, True), (3, 40, False)], max_length=10, overlong="truncate_response")
    found = summarize(samples, ["a.jsonl"], np.zeros(2, dtype=np.int64))
    assert (found["truncated"], found["response_lengths"]["edges"][-1]) == (1, 8)


def test_one_bin_when_all_lengths_are_equal(samples_of: Callable[..., Samples]) -> None:
    found = summarize(samples_of([(7, 5, True), (7, 5, False), (7, 5, True)]), ["a"], np.zeros(3, dtype=np.int64))
    assert found["prompt_lengths"] == {"edges": [7, 8], "desirable": [2], "undesirable": [1]}
    assert found["response_lengths"] == {"edges": [5, 6], "desirable": [2], "undesirable": [1]}


def test_histograms_cover_all_lengths(samples_of: Callable[..., Samples]) -> None:
    """Lengths from 1 to 800, most of them short: at most 30 bins of whole tokens, with every sample in one of them."""
    generator = np.random.default_rng(0)
    lengths = np.concatenate([[1, 800], generator.geometric(0.02, 300).clip(1, 800)])
    rows = [(1, int(length), index % 3 == 0) for index, length in enumerate(lengths)]
    found = summarize(samples_of(rows), ["a"], np.zeros(len(rows), dtype=np.int64))["response_lengths"]
    edges = found["edges"]
    assert len(edges) == MOST_BINS + 1 and edges[0] == 1 and edges[-1] == 801
    assert all(low < high for low, high in zip(edges, edges[1:], strict=False))
    for name, wanted in (("desirable", True), ("undesirable", False)):
        mine = [length for _, length, good in rows if good == wanted]
        expected = [sum(low <= n < high for n in mine) for low, high in zip(edges, edges[1:], strict=False)]
        assert found[name] == expected and sum(found[name]) == len(mine)


# what a run leaves behind


def test_facts_are_read_again(tmp_path: Path) -> None:
    write_facts(tmp_path, {"name": "new", "config": {}})
    assert read_facts(tmp_path) == {"name": "new", "config": {}}
    assert read_facts(tmp_path / "empty") == {}


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]
) -> tuple[Path, dict[str, Any], list[Path]]:
    """Return the root, run.json and log folders of a run of two ranks on 30 thumbs up and 10 down, `auto` weights."""
    root = tmp_path_factory.mktemp("facts")
    make_model_folder(root / "hf")
    write_feedback(root / "train.jsonl", number=40, seed=1, labels=[True, True, True, False])
    write_feedback(root / "validation.jsonl", number=9, seed=2, labels=[False, True])
    changes = {
        "model__kto__desirable_loss_weight": "auto",
        "model__kto__undesirable_loss_weight": "auto",
        "model__tensor_model_parallel_size": 2,
        "model__data__data_prefix__validation": str(root / "validation.jsonl"),
        "exp_manager__name": "thumbs",
        "exp_manager__create_checkpoint_callback": True,
        "exp_manager__wandb_logger_kwargs": {"project": "kto"},
        "trainer__kto__max_steps": 2,
    }
    run_ranks(train_with_secrets, 2, free_port(), settings(root, root / "log", **changes))
    (checkpoint,) = (root / "log" / "checkpoints").glob("*-last")
    return root, json.loads((root / "log" / "run.json").read_text()), [root / "log", checkpoint / "hf"]


def train_with_secrets(port: int, overrides: dict[str, Any]) -> None:
    """Train where the environment holds keys, as on most people's machines."""
    import os

    os.environ.update(WANDB_API_KEY=SECRET, HF_TOKEN=SECRET, AWS_SECRET_ACCESS_KEY=SECRET)
    train_on_rank(port, overrides)


def test_what_a_run_says_of_itself(run: tuple[Path, dict[str, Any], list[Path]]) -> None:
    root, facts, _ = run
    assert facts["name"] == "thumbs" and facts["accelerator"] == "cpu" and facts["chat_template"] is False
    assert facts["layout"] == "2 processes: tensor 2 x pipeline 1 x data 1"
    assert facts["started"].endswith("+00:00")
    assert facts["config"]["pretrained_checkpoint"]["restore_from_path"] == str(root / "hf")
    assert facts["config"]["trainer"]["kto"]["max_steps"] == 2
    train, validation = facts["data"]["train"], facts["data"]["validation"]
    assert train["sources"] == [{"path": str(root / "train.jsonl"), "samples": 40, "desirable": 30}]
    assert (train["desirable"], train["undesirable"]) == (30, 10)
    assert (validation["samples"], validation["desirable"], validation["undesirable"]) == (9, 4, 5)


def test_loss_weights_are_those_that_were_settled(run: tuple[Path, dict[str, Any], list[Path]]) -> None:
    """30 thumbs up and 10 down: the weighted numbers get a ratio of 4/3, the end of the paper's range next to 3."""
    kto = run[1]["config"]["model"]["kto"]
    assert (kto["desirable_loss_weight"], kto["undesirable_loss_weight"]) == (1.0, pytest.approx(2.25))


def test_versions_are_those_of_the_packages(run: tuple[Path, dict[str, Any], list[Path]]) -> None:
    versions = run[1]["versions"]
    for package in ("megatron-core", "lightning", "transformers", "nemo_toolkit"):
        assert versions[package] == version(package)
    assert torch.__version__.startswith(versions["torch"].split("+")[0])
    assert len(versions["python"].split(".")) == 3 and "nemo_kto" in versions


def test_no_secret_is_written(run: tuple[Path, dict[str, Any], list[Path]]) -> None:
    """Of the environment; what is given to loggers is checked with the configuration."""
    for folder in run[2]:
        for file in folder.rglob("*.json"):
            assert SECRET not in file.read_text(), file


def test_checkpoints_carry_the_same_facts(run: tuple[Path, dict[str, Any], list[Path]]) -> None:
    _, facts, (_, source) = run
    carried = read_facts(source)
    assert {name: carried[name] for name in facts} == facts
