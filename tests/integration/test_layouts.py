"""The plain layouts over ten steps and all micro-batch sizes, and what must hold for single batches.

Every other layout: tests/integration/test_matrix.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.assets import assert_alike, read_series, write_feedback

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"model__tensor_model_parallel_size": 2}),
    "pp2": (2, {"model__pipeline_model_parallel_size": 2}),
    "tp2pp2": (4, {"model__tensor_model_parallel_size": 2, "model__pipeline_model_parallel_size": 2}),
    "cp2": (2, {"model__context_parallel_size": 2}),
}
CASES = [
    # of the other sizes one layout that divides the batch tells enough for `make test`
    pytest.param(layout, size, marks=() if size == 2 or layout in ("one", "dp2") else pytest.mark.slow)
    for layout, size in itertools.product(LAYOUTS, (1, 2, 4))
    if layout != "cp2"
]


@pytest.fixture(scope="module")
def run(train: Callable[..., Path]) -> Callable[..., Any]:
    """Return `run(layout, **changes)`: the series of a run under that layout."""

    def get(layout: str, **changes: Any) -> dict[str, dict[int, float]]:
        world_size, sizes = LAYOUTS[layout]
        return read_series(train(world_size, **sizes, **changes))

    return get


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


def test_the_run_learns_something(series: Any) -> None:
    metrics = series("one", 1)
    assert max(metrics["train/kl"].values()) > 0 and abs(metrics["train/rewards/margins"][9]) > 0.01


@pytest.mark.parametrize("mode", ["cpu_swap", "resident"])
@pytest.mark.parametrize(
    # the cells of the matrix look at the first loss too
    "layout",
    ["one", "tp2pp2", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("dp2", "tp2", "pp2", "cp2"))],
)
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


def test_mean_log_probs_are_over_all_tokens_of_a_response(run: Any) -> None:
    """Under context parallelism a response's tokens lie on several ranks."""
    changes = {"model__kto__preference_average_log_probs": True, "trainer__kto__max_steps": 4}
    alone, shared = run("one", **changes), run("cp2", **changes)
    for name in ("train/loss", "train/logps/chosen", "train/grad_norm"):
        assert shared[name] == pytest.approx(alone[name], rel=1e-5)


def test_one_sample_a_rank(run: Any) -> None:
    changes = {"model__global_batch_size": 2, "trainer__kto__max_steps": 4}
    alone, shared = run("one", **changes), run("dp2", **changes)
    for name in ("train/loss", "train/grad_norm"):
        assert shared[name] == pytest.approx(alone[name], rel=1e-5)


@pytest.fixture(scope="module")
def scoped(run: Callable[..., Any], root: Path) -> Callable[..., dict[str, dict[int, float]]]:
    """Return `scoped(layout, **changes)`: four steps and a validation of 11 samples with a baseline a micro-batch."""
    changes = {
        "model__micro_batch_size": 2,
        "model__kto__kl_scope": "micro_batch",
        "model__data__data_prefix__validation": str(root / "validation.jsonl"),
        "trainer__kto__max_steps": 4,
        "trainer__kto__val_check_interval": 4,
    }
    return partial(run, **changes)


@pytest.fixture(scope="module")
def scoped_on_one(scoped: Callable[..., Any]) -> dict[str, dict[int, float]]:
    """Return the series of one process."""
    series: dict[str, dict[int, float]] = scoped("one")
    return series


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("dp2", {"model__kto__log_prob_forward_micro_batch_size": 4}),
        ("tp2", {"model__kto__reference__mode": "cached"}),
        *(pytest.param(layout, {}, marks=pytest.mark.slow) for layout in ("pp2", "tp2pp2", "cp2")),
    ],
)
def test_micro_batch_kl_scope_does_not_depend_on_the_layout(
    scoped: Any, scoped_on_one: Any, layout: str, changes: dict[str, Any]
) -> None:
    """Nor on the micro-batches of the KL set's passes, or on how the reference is held."""
    assert_alike(scoped(layout, **changes), scoped_on_one)


def test_micro_batch_kl_scope_has_baselines_of_its_own(series: Any, scoped_on_one: Any) -> None:
    assert scoped_on_one["train/loss"][0] == 0.5
    # after the first step the weights are the same still
    assert scoped_on_one["train/kl"][1] != pytest.approx(series("one", 2)["train/kl"][1], rel=0.01)
