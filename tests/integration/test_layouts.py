"""One result for every layout: real training runs on real gloo ranks against one process; the first step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed_harness import free_port
from tests.integration.assets import (
    make_model_folder,
    read_series,
    settings,
    train_on_rank,
    write_feedback,
)

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"model__tensor_model_parallel_size": 2}),
    "pp2": (2, {"model__pipeline_model_parallel_size": 2}),
    "tp2pp2": (4, {"model__tensor_model_parallel_size": 2, "model__pipeline_model_parallel_size": 2}),
}
TP2_SP = {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True}
VPP2 = {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2}
UNEVEN = {"model__pipeline_model_parallel_size": 2, "model__num_layers_in_first_pipeline_stage": 1}
DIVIDED_OPTIMIZER = {"model__optim__name": "distributed_fused_adam"}
MORE_LAYOUTS = {
    "tp2sp": (2, TP2_SP),
    "dp2_divided": (2, DIVIDED_OPTIMIZER),
    "tp2sp_dp2_divided": (4, {**TP2_SP, **DIVIDED_OPTIMIZER}),
    "pp2vpp2": (2, VPP2),
    "pp2uneven": (2, UNEVEN),
    "tp2sp_pp2vpp2": (4, {**TP2_SP, **VPP2}),
}
RECOMPUTE = {
    "selective": {"model__activations_checkpoint_granularity": "selective"},
    "uniform": {
        "model__activations_checkpoint_granularity": "full",
        "model__activations_checkpoint_method": "uniform",
        "model__activations_checkpoint_num_layers": 1,
    },
    "block": {
        "model__activations_checkpoint_granularity": "full",
        "model__activations_checkpoint_method": "block",
        "model__activations_checkpoint_num_layers": 1,
    },
}
EP2 = {"model__expert_model_parallel_size": 2}
WHOLE_EXPERTS = {"model__expert_tensor_parallel_size": 1}
EXPERT_LAYOUTS = {
    "ep2": (2, EP2),
    "tp2sp_ep2": (4, {**TP2_SP, **EP2}),
    "tp2sp_ep2_whole": (2, {**TP2_SP, **EP2, **WHOLE_EXPERTS}),
    "tp2sp_whole": (2, {**TP2_SP, **WHOLE_EXPERTS}),
    "etp2": (2, {"model__expert_tensor_parallel_size": 2}),
    "ep2_pp2": (4, {**EP2, "model__pipeline_model_parallel_size": 2}),
    "ep2_dp2_divided": (4, {**EP2, **DIVIDED_OPTIMIZER}),
    "tp2sp_ep2_whole_dp2_divided": (4, {**TP2_SP, **EP2, **WHOLE_EXPERTS, **DIVIDED_OPTIMIZER}),
}
OF_EXPERTS = ["dp2", "pp2vpp2", "ep2", "etp2", "tp2sp_ep2_whole", "ep2_dp2_divided"]
SLOW_OF_EXPERTS = sorted({"tp2sp", "pp2", "dp2_divided", "pp2uneven", *EXPERT_LAYOUTS} - {*OF_EXPERTS})
AUX_LOSS = {"model__moe_aux_loss_coeff": 0.1}
CASES = list(itertools.product(LAYOUTS, (1, 2, 4)))
RELATIVE = ("train/loss", "train/grad_norm", "train/logps/chosen", "train/logps/rejected", "val/loss")
SMALL = ("train/kl", "train/rewards/chosen", "train/rewards/rejected", "train/rewards/margins", "val/kl")
"""Differences of nearly equal log-probs: their error is that of the log-probs, not of their own size."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_model_folder(folder / "hf")
    make_model_folder(folder / "experts", experts=True)
    write_feedback(folder / "train.jsonl", number=40, seed=1)
    write_feedback(folder / "validation.jsonl", number=11, seed=2)
    return folder


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run(layout, **changes)`: the series of a run under that layout."""

    def train(layout: str, **changes: Any) -> dict[str, dict[int, float]]:
        log_dir = tmp_path_factory.mktemp("run")
        world_size, sizes = {**LAYOUTS, **MORE_LAYOUTS, **EXPERT_LAYOUTS}[layout]
        run_ranks(train_on_rank, world_size, free_port(), settings(root, log_dir, **sizes, **changes))
        return read_series(log_dir)

    return train


@pytest.fixture(scope="module")
def series(run: Callable[..., Any], root: Path) -> Callable[[str, int], dict[str, dict[int, float]]]:
    """Return the ten-step series of a layout and micro-batch size, run once each."""
    done: dict[tuple[str, int], Any] = {}

    def get(layout: str, micro_batch_size: int) -> dict[str, dict[int, float]]:
        if (layout, micro_batch_size) not in done:
            done[layout, micro_batch_size] = run(
                layout,
                model__micro_batch_size=micro_batch_size,
                model__data__data_prefix__validation=str(root / "validation.jsonl"),
                trainer__kto__val_check_interval=5,
                model__kto__reference__mode="cpu_swap" if micro_batch_size == 2 else "resident",
            )
        return done[layout, micro_batch_size]

    return get


@pytest.mark.parametrize(("layout", "micro_batch_size"), CASES)
def test_every_layout_trains_alike(series: Any, layout: str, micro_batch_size: int) -> None:
    actual = series(layout, micro_batch_size)
    assert len(actual["train/loss"]) == 10 and len(actual["val/loss"]) == 2
    assert_alike(actual, series("one", 1))


@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_divided_sequences_stages_and_optimizers_train_alike(series: Any, layout: str) -> None:
    assert_alike(series(layout, 2), series("one", 1))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("layout", ["one", pytest.param("tp2sp_pp2vpp2", marks=pytest.mark.slow)])
def test_recomputing_changes_nothing(run: Any, series: Any, layout: str, recompute: str) -> None:
    actual = run(layout, **RECOMPUTE[recompute], model__micro_batch_size=2, trainer__kto__max_steps=10)
    for name in ("train/loss", "train/grad_norm"):
        assert actual[name] == pytest.approx(series("one", 1)[name], rel=1e-5), name


@pytest.fixture(scope="module")
def mixture(run: Callable[..., Any], root: Path) -> Callable[..., dict[str, dict[int, float]]]:
    """Return `mixture(layout, **changes)`: the five-step series of a mixture of experts."""
    done: dict[tuple[Any, ...], Any] = {}

    def get(layout: str, **changes: Any) -> dict[str, dict[int, float]]:
        key = (layout, *changes.items())
        if key not in done:
            done[key] = run(
                layout,
                pretrained_checkpoint__restore_from_path=str(root / "experts"),
                model__micro_batch_size=2,
                model__data__data_prefix__validation=str(root / "validation.jsonl"),
                trainer__kto__max_steps=5,
                trainer__kto__val_check_interval=5,
                **changes,
            )
        return done[key]

    return get


@pytest.mark.parametrize(
    "layout", [*OF_EXPERTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW_OF_EXPERTS)]
)
def test_experts_train_alike_under_every_layout(mixture: Any, layout: str) -> None:
    actual = mixture(layout)
    assert actual["train/loss"][0] == 0.5 and "train/moe_aux_loss" not in actual
    assert len(actual["train/loss"]) == 5 and len(actual["val/loss"]) == 1
    assert_alike(actual, mixture("one"))


@pytest.mark.parametrize(
    "layout",
    [
        "tp2sp",  # rows of odd lengths are filled up, and what fills them must not count
        "ep2",
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("dp2", "pp2vpp2", "tp2sp_ep2")),
    ],
)
def test_balancing_the_experts_loads_does_not_depend_on_the_layout(mixture: Any, layout: str) -> None:
    actual, expected = mixture(layout, **AUX_LOSS), mixture("one", **AUX_LOSS)
    assert_alike(actual, expected)
    assert actual["train/moe_aux_loss"] == pytest.approx(expected["train/moe_aux_loss"], rel=1e-5)
    assert actual["train/loss"][0] == 0.5 and actual["train/loss"][4] != mixture("one")["train/loss"][4]


@pytest.mark.parametrize("recompute", ["selective", "uniform"])
def test_recomputing_experts_changes_nothing(mixture: Any, recompute: str) -> None:
    actual, expected = mixture("ep2", **AUX_LOSS, **RECOMPUTE[recompute]), mixture("one", **AUX_LOSS)
    for name in ("train/loss", "train/grad_norm", "train/moe_aux_loss"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-5), name


def assert_alike(actual: dict[str, dict[int, float]], expected: dict[str, dict[int, float]]) -> None:
    for name in RELATIVE:
        assert actual[name] == pytest.approx(expected[name], rel=1e-5), name
    for name in SMALL:
        assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=2e-5), name


def test_the_run_learns_something(series: Any) -> None:
    metrics = series("one", 1)
    assert max(metrics["train/kl"].values()) > 0 and abs(metrics["train/rewards/margins"][9]) > 0.01


@pytest.mark.parametrize("mode", ["cpu_swap", "resident"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_loss_is_one_half_to_the_last_bit(run: Any, layout: str, mode: str) -> None:
    """Policy equals reference, so each r = 0 and z = 0: every loss is 1 - sigmoid(0) = 0.5."""
    metrics = run(layout, model__kto__reference__mode=mode, trainer__kto__max_steps=1, model__micro_batch_size=2)
    assert metrics["train/loss"] == {0: 0.5}
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert metrics[f"train/{name}"] == {0: 0.0}, name
    # a reward other than zero would count as right or wrong by its sign; zeros all count as wrong
    assert metrics["train/rewards/accuracies"] == {0: 0.0}


@pytest.mark.parametrize("labels", [[True], [False]])
def test_a_batch_of_one_class(run: Any, tmp_path: Path, labels: list[bool]) -> None:
    file = write_feedback(tmp_path / "one_class.jsonl", number=16, seed=3, labels=labels)
    metrics = run("dp2", model__data__data_prefix__train=str(file), trainer__kto__max_steps=2)
    present, absent = ("chosen", "rejected") if labels[0] else ("rejected", "chosen")
    assert f"train/rewards/{present}" in metrics
    assert f"train/rewards/{absent}" not in metrics and "train/rewards/margins" not in metrics
    assert metrics["train/loss"][0] == 0.5


def test_one_sample_a_rank(run: Any) -> None:
    changes = {"model__global_batch_size": 2, "trainer__kto__max_steps": 4}
    alone, shared = run("one", **changes), run("dp2", **changes)
    for name in ("train/loss", "train/grad_norm"):
        assert shared[name] == pytest.approx(alone[name], rel=1e-5)


def test_micro_batch_kl_scope_differs_from_the_global_one(run: Any, series: Any) -> None:
    scoped = run("one", model__micro_batch_size=2, model__kto__kl_scope="micro_batch")
    assert scoped["train/loss"][0] == 0.5
    assert scoped["train/loss"][9] != series("one", 2)["train/loss"][9]
