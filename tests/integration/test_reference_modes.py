"""The ways to hold the reference: one result, no weights where none are needed, and a cache that survives kills."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file

from tests.distributed_harness import RankFailure, free_port
from tests.integration.assets import make_model_folder, read_series, refusal_on_rank, settings, train_on_rank
from tests.integration.test_matrix import ADAPTERS, CP2, PP2, SP2

Series = dict[str, dict[int, float]]

MODEL_KINDS = {"full": {}, "adapters": ADAPTERS}
CACHED = {"model__kto__reference__mode": "cached"}
NAMES = ("train/loss", "train/grad_norm", "train/kl", "train/rewards/chosen", "train/rewards/rejected", "val/loss")


@pytest.fixture(scope="module")
def run(train: Callable[..., Path], root: Path) -> Callable[..., Series]:
    """Return `run(world_size, **changes)`: ten steps, two epochs, with two validations."""

    def get(world_size: int, **changes: Any) -> Series:
        log_dir = train(
            world_size,
            model__data__data_prefix__validation=str(root / "validation.jsonl"),
            trainer__kto__val_check_interval=5,
            model__micro_batch_size=2,
            **changes,
        )
        return read_series(log_dir)

    return get


@pytest.fixture(scope="module")
def expected(run: Callable[..., Series]) -> dict[str, Series]:
    """Return the series of a reference in CPU memory."""
    return {kind: run(1, **changes, model__kto__reference__mode="cpu_swap") for kind, changes in MODEL_KINDS.items()}


def assert_same(actual: Series, expected: Series) -> None:
    for name in NAMES:
        assert len(actual[name]) == (10 if name.startswith("train") else 2)
        assert actual[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("full", "resident"),
        ("full", "cached"),
        ("adapters", "adapter_off"),
        ("adapters", "resident"),
        ("adapters", "cached"),
    ],
)
def test_all_modes_give_the_same_series(
    run: Callable[..., Series], expected: dict[str, Series], kind: str, mode: str
) -> None:
    actual = run(1, **MODEL_KINDS[kind], model__kto__reference__mode=mode)
    assert_same(actual, expected[kind])
    assert actual["train/loss"][0] == 0.5 and actual["train/loss"][9] < 0.45


WHOLE_FIRST = ["full", pytest.param("adapters", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", WHOLE_FIRST)
@pytest.mark.parametrize(
    "layout",
    [{**SP2, **PP2}, pytest.param(CP2, marks=pytest.mark.slow), pytest.param({}, marks=pytest.mark.slow)],
    ids=["tp2sp_pp2", "cp2", "dp2"],
)
def test_caching_gives_the_same_under_other_layouts(
    run: Callable[..., Series], expected: dict[str, Series], kind: str, layout: dict[str, Any]
) -> None:
    actual = run(4 if len(layout) > 1 else 2, **MODEL_KINDS[kind], **layout, **CACHED)
    assert actual["train/loss"][0] == 0.5  # bit-equal: the rows that were cached are those that are trained on
    for name in NAMES:
        assert actual[name] == pytest.approx(expected[kind][name], rel=1e-5, abs=2e-5), name


def cached_documents(folder: Path) -> dict[str, set[int]]:
    """Return split -> names of the documents in a cache."""
    found: dict[str, set[int]] = {"train": set(), "validation": set()}
    for file in folder.glob("part-*.safetensors"):
        for name, tensor in load_file(file).items():
            split, kind = name.split(".")
            found[split].update(tensor.tolist() if kind == "names" else ())
    return found


def test_pairs_of_later_epochs(run: Callable[..., Series], tmp_path: Path) -> None:
    """Dealt anew they are other pairs, which are computed too; with the batches of the first epoch there are none."""
    for shuffle, pairs in ((True, 80), ("batches", 40)):
        live = run(1, model__data__shuffle=shuffle)
        cached = run(
            1, model__data__shuffle=shuffle, **CACHED, model__kto__reference__cache_dir=str(tmp_path / f"{shuffle}")
        )
        assert_same(cached, live)
        documents = cached_documents(tmp_path / f"{shuffle}")
        own = {name for name in documents["train"] if name // 40 == name % 40}
        assert len(own) == 40
        # two epochs of 40 pairs; by chance a few meet again
        assert pairs - 5 <= len(documents["train"]) - len(own) <= pairs
        assert len(documents["validation"]) == 2 * 11


# a cache made beforehand


@pytest.mark.parametrize(("shuffle", "passes"), [(True, 5 * 3), ("batches", 5 * 2), (False, 5 * 2)])
def test_what_caching_costs(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], shuffle: Any, passes: int
) -> None:
    """Two epochs of five batches: 1 + 2 passes over the data, or 2; of the validation data as much as is scored."""
    values = as_training(root, tmp_path / "log", tmp_path / "cache", model__data__shuffle=shuffle)
    values |= {"model.data.data_prefix.validation": str(root / "validation.jsonl"), "trainer.kto.limit_val_batches": 1}
    ((_, scored),) = run_ranks(cache_on_rank, 1, free_port(), values)
    assert scored == passes + 2


def cache_on_rank(port: int, overrides: dict[str, Any], parts: int | None = None) -> tuple[int, int]:
    """Run `nemo-kto cache-reference` on one rank; return batches and passes scored, or die after `parts` parts."""
    from nemo_kto.commands import train as training
    from nemo_kto.commands.cache_reference import cache_reference
    from nemo_kto.data.batches.reference_cache import ReferenceCache
    from nemo_kto.kto import fill_cache, megatron_gpt_kto_model
    from nemo_kto.kto.scoring import RowScorer

    scored, passes, written = 0, 0, 0
    original, original_write, original_score = fill_cache.fill, ReferenceCache.write_part, RowScorer.score

    def fill(cache: Any, work: Any, *arguments: Any, **keywords: Any) -> None:
        nonlocal scored
        scored = fill_cache.count_batches(work)
        original(cache, work, *arguments, **keywords)

    def score(self: RowScorer, rows: Any) -> Any:
        nonlocal passes
        passes += 1
        return original_score(self, rows)

    def write_part(self: ReferenceCache, found: Any) -> None:
        nonlocal written
        original_write(self, found)
        written += 1
        if written == parts:
            os.kill(os.getpid(), signal.SIGKILL)

    fill_cache.BATCHES_PER_PART = 2
    megatron_gpt_kto_model.fill = fill
    RowScorer.score = score  # type: ignore[method-assign]
    if parts is not None:
        ReferenceCache.write_part = write_part  # type: ignore[method-assign]
    training.train = lambda config, callbacks: cache_reference(config)
    train_on_rank(port, overrides)
    return scored, passes


def as_training(root: Path, log_dir: Path, cache: Path, **changes: Any) -> dict[str, Any]:
    keys = {**CACHED, "model__kto__reference__cache_dir": str(cache), "model__micro_batch_size": 2, **changes}
    return settings(root, log_dir, **keys)


def test_a_killed_job_goes_on_and_training_scores_nothing(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    """Killed on two pipeline stages after two parts of two batches; finished, and trained from, by one process."""
    killed, whole = (as_training(root, tmp_path / "log", tmp_path / name) for name in ("killed", "whole"))
    pipeline = {**killed, "model.pipeline_model_parallel_size": 2}
    with pytest.raises(RankFailure, match="died"):
        run_ranks(cache_on_rank, 2, free_port(), pipeline, 2)
    before = cached_documents(tmp_path / "killed")["train"]
    assert len(before) == 64  # samples and pairs of four batches of eight
    (again,) = run_ranks(cache_on_rank, 1, free_port(), killed)
    (complete,) = run_ranks(cache_on_rank, 1, free_port(), whole)
    assert (again, complete) == ((6, 7), (10, 15))
    assert cached_documents(tmp_path / "killed") == cached_documents(tmp_path / "whole")
    assert run_ranks(cache_on_rank, 1, free_port(), killed) == [(0, 0)]

    series = []
    for name in ("killed", "whole"):
        values = as_training(root, tmp_path / f"log of {name}", tmp_path / name)
        assert run_ranks(train_without_scoring, 1, free_port(), values) == [True]
        series.append(read_series(tmp_path / f"log of {name}"))
    for metric in ("train/loss", "train/grad_norm", "train/kl"):
        assert series[0][metric] == pytest.approx(series[1][metric], rel=1e-5, abs=1e-5)


class FindsReferenceWeights(Callback):
    """Looks, after training, for tensors that still are the embedding or an output layer as training started."""

    def __init__(self, folder: Path) -> None:
        self.weights = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        self.found = 0

    def on_train_end(self, *_: Any) -> None:
        """Count the tensors, whatever holds them."""
        rows, columns = self.weights.shape
        gc.collect()
        for thing in gc.get_objects():
            if torch.is_tensor(thing) and thing.dim() == 2 and thing.shape[1] == columns and len(thing) >= rows:
                self.found += thing is not self.weights and torch.equal(thing[:rows].detach(), self.weights)


def train_without_scoring(port: int, overrides: dict[str, Any]) -> bool:
    """Train; return whether no reference weights are left. Scoring the reference is an error."""
    from nemo_kto.kto import megatron_gpt_kto_model

    def fill(*_: Any, **__: Any) -> None:
        raise AssertionError("the cache is complete")

    megatron_gpt_kto_model.fill = fill
    return count_reference_weights(port, overrides) == 0


def count_reference_weights(port: int, overrides: dict[str, Any]) -> int:
    finder = FindsReferenceWeights(Path(overrides["pretrained_checkpoint.restore_from_path"]))
    train_on_rank(port, overrides, callbacks=[finder])
    return finder.found


@pytest.mark.parametrize(
    ("kind", "mode", "number"), [("full", "resident", 1), ("full", "cached", 0), ("adapters", "resident", 1)]
)
def test_reference_weights_in_memory(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], kind: str, mode: str, number: int
) -> None:
    """Also when the cache is filled at the start of training; with adapters the model itself has the frozen ones."""
    changes = {**MODEL_KINDS[kind], "model__kto__reference__mode": mode, "trainer__kto__max_steps": 2}
    values = settings(root, tmp_path, **changes)
    assert run_ranks(count_reference_weights, 1, free_port(), values) == [number]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__data__seq_length": 12}, ["another model.data.seq_length"]),
        ({"model__data__append_eod": False}, ["append_eod", "train data"]),
        ({"trainer__precision": "bf16"}, ["trainer.precision"]),
        ({"model__kto__preference_average_log_probs": True}, ["preference_average_log_probs"]),
        ({"model__kto__reference__checkpoint": "other"}, ["reference model"]),
        ({"model__data__data_prefix__validation": "validation.jsonl"}, ["validation data"]),
        ({"model__tokenizer__path": "tokenizer"}, ["tokenizer"]),
    ],
)
def test_a_cache_of_something_else_is_refused(
    root: Path, tmp_path: Path, cache: Path, run_ranks: Callable[..., Any], changes: dict[str, Any], words: list[str]
) -> None:
    from tests.integration.assets import make_tokenizer

    if "model__kto__reference__checkpoint" in changes:
        changes = {"model__kto__reference__checkpoint": str(make_model_folder(tmp_path / "other", seed=5))}
    if "model__data__data_prefix__validation" in changes:
        changes = {"model__data__data_prefix__validation": str(root / "validation.jsonl")}
    if "model__tokenizer__path" in changes:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{{ messages[0].content }}"
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        changes = {"model__tokenizer__path": str(tmp_path / "tokenizer")}
    values = as_training(root, tmp_path / "log", cache, **changes)
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), values)
    assert kind == "ConfigError" and str(cache) in message and "model.kto.reference.cache_dir" in message, message
    for word in words:
        assert word in message


def test_an_adapter_of_another_scale_is_another_reference(
    root: Path, tmp_path: Path, train: Callable[..., Path], run_ranks: Callable[..., Any]
) -> None:
    """The same tensors; only alpha differs."""
    short = {**ADAPTERS, "trainer__kto__max_steps": 1}
    adapter = train(1, **short, export__enabled=True) / "hf"
    cached = {**short, **CACHED, "model__kto__reference__cache_dir": str(tmp_path / "cache")}
    cached["model__kto__reference__checkpoint"] = str(adapter)
    train(1, **cached)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 16}))
    values = settings(root, tmp_path / "log", **cached, model__peft__lora_tuning__alpha=16)
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), values)
    assert kind == "ConfigError" and "another scale of the reference adapter" in message, message
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 4, "alpha_pattern": {"o_proj": 9}}))
    values = settings(root, tmp_path / "log", **cached, model__peft__lora_tuning__alpha_pattern={"o_proj": 9})
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), values)
    assert kind == "ConfigError" and "another scale of the reference adapter" in message, message
    config.write_text(json.dumps({**json.loads(config.read_text()), "alpha_pattern": {}}))
    weights = adapter / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), settings(root, tmp_path / "log", **cached))
    assert kind == "ConfigError" and "with another reference adapter." in message, message


@pytest.fixture(scope="module")
def cache(root: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]) -> Path:
    """Return a complete cache."""
    folder = tmp_path_factory.mktemp("cache") / "reference"
    run_ranks(cache_on_rank, 1, free_port(), as_training(root, folder.with_name("log"), folder))
    return folder


def test_another_seed_and_a_longer_run_add_what_is_missing(
    root: Path, tmp_path: Path, cache: Path, run_ranks: Callable[..., Any]
) -> None:
    longer = as_training(root, tmp_path, cache, trainer__kto__max_steps=15)
    assert run_ranks(cache_on_rank, 1, free_port(), longer) == [(5, 5)]
    assert run_ranks(cache_on_rank, 1, free_port(), {**longer, "model.seed": 5}) == [(15, 15)]
    assert run_ranks(cache_on_rank, 1, free_port(), longer) == [(0, 0)]


def test_a_run_whose_time_is_over_while_caching_stops_and_goes_on(
    root: Path, tmp_path: Path, train: Callable[..., Path]
) -> None:
    values = {**CACHED, "trainer__kto__max_steps": 2}
    train(2, log_dir=tmp_path, **values, exp_manager__max_time_per_run="00:00:00:00")
    assert cached_documents(tmp_path / "reference")["train"] == set() and "train/loss" not in read_series(tmp_path)
    assert len(read_series(train(2, log_dir=tmp_path, **values))["train/loss"]) == 2


class Killed(Callback):
    """Ends the rank without warning in its fifth step."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Die."""
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_in_training(port: int, overrides: dict[str, Any]) -> None:
    train_on_rank(port, overrides, callbacks=[Killed()])


@pytest.mark.parametrize(
    "changes",
    [
        {**CACHED, **ADAPTERS},
        {"model__kto__reference__sync_every_n_steps": 2, "model__kto__reference__mode": "cpu_swap"},
    ],
    ids=["cached adapters", "moving reference"],
)
def test_killed_in_training_it_goes_on_exactly(
    root: Path, tmp_path: Path, train: Callable[..., Path], run_ranks: Callable[..., Any], changes: dict[str, Any]
) -> None:
    checkpoints = {"exp_manager__create_checkpoint_callback": True, "trainer__kto__save_interval": 3}
    values = settings(root, tmp_path / "killed", **changes, **checkpoints)
    with pytest.raises(RankFailure, match="died"):
        run_ranks(killed_in_training, 2, free_port(), values)
    train(2, log_dir=tmp_path / "killed", **changes, **checkpoints)
    actual, expected = read_series(tmp_path / "killed"), read_series(train(2, **changes))
    for name in ("train/loss", "train/grad_norm", "train/kl"):
        assert actual[name] == expected[name], name


# another reference


def test_another_architecture_is_refused_by_its_fields(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    other = make_model_folder(tmp_path / "other")
    config = other / "config.json"
    changed = {"rms_norm_eps": 1e-3, "num_hidden_layers": 3, "sliding_window": 5, "a_key_of_mine": 1}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    values = settings(root, tmp_path / "log", model__kto__reference__checkpoint=str(other))
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), values)
    assert kind == "ConfigError" and "num_hidden_layers (3, not 4)" in message and "rms_norm_eps (0.001" in message
    assert "sliding_window" not in message and "a_key_of_mine" not in message  # a llama model has no such fields


@pytest.mark.parametrize("kind", WHOLE_FIRST)
def test_all_modes_agree_on_another_reference(
    root: Path, tmp_path: Path, run: Callable[..., Series], kind: str
) -> None:
    """What it computes is compared with transformers in tests/integration/test_oracle.py."""
    other = make_model_folder(tmp_path / "other", seed=7)
    changes = {**MODEL_KINDS[kind], "model__kto__reference__checkpoint": str(other)}
    first, *rest = (run(1, **changes, model__kto__reference__mode=mode) for mode in ("cpu_swap", "resident", "cached"))
    assert first["train/loss"][0] != 0.5
    for series in rest:
        assert_same(series, first)


def cache_what_is_not_finite(port: int, overrides: dict[str, Any]) -> tuple[str, str]:
    """Train with a reference whose log-probs have overflowed; return kind and message of the error."""
    from nemo_kto.kto.scoring import RowScorer

    RowScorer.score = lambda self, rows: torch.full((sum(row.num_documents for row in rows),), float("-inf"))  # type: ignore
    return refusal_on_rank(port, overrides)


def test_log_probs_that_are_not_finite_are_not_kept(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    values = settings(root, tmp_path, **CACHED, trainer__kto__max_steps=2)
    for kind, message in run_ranks(cache_what_is_not_finite, 2, free_port(), values):
        assert kind == "DivergenceError" and "32 documents of the train data" in message, message
    assert not list((tmp_path / "reference").glob("part-*"))
