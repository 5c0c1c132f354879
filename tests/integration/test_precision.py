"""bfloat16 and float16: exact where float32 is exact, near it elsewhere, and nothing small is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed_harness import free_port
from tests.integration.assets import read_series, refusal_on_rank, settings, train_on_rank

TENSOR = {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True}
PIPELINE = {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2}
OVERLAP = {"model__optim__overlap_grad_sync": True, "model__optim__overlap_param_sync": True}
CONTEXT = {"model__context_parallel_size": 2}
EXPERTS = {**CONTEXT, "model__expert_model_parallel_size": 2}
LAYOUTS = {"one": (1, {}), "tp2sp": (2, TENSOR), "pp2vpp2": (2, PIPELINE), "dp2_overlap": (2, OVERLAP)}


@pytest.fixture(scope="module")
def run(train: Callable[..., Path]) -> Callable[..., Path]:
    """Return `run(layout, precision, **changes)`: the log folder of a run of five steps."""

    def get(layout: str, precision: str, **changes: Any) -> Path:
        world_size, sizes = LAYOUTS[layout]
        changes = {"trainer__kto__max_steps": 5, "model__micro_batch_size": 2, **sizes, **changes}
        return train(world_size, trainer__precision=precision, **changes)

    return get


@pytest.mark.parametrize(
    ("layout", "precision", "near"),
    [
        *((layout, "bf16", 0.03) for layout in LAYOUTS),
        ("one", "16-mixed", 0.004),
        *(pytest.param(layout, "16-mixed", 0.004, marks=pytest.mark.slow) for layout in LAYOUTS if layout != "one"),
    ],
)
def test_half_precision_follows_float32(run: Any, layout: str, precision: str, near: float) -> None:
    """Log-ratios of equal weights are exactly zero; then the distance is that of the dtype's 8 or 11 bits."""
    actual, expected = (read_series(run(*which)) for which in ((layout, precision), ("one", "32")))
    assert actual["train/loss"][0] == 0.5
    assert actual["train/rewards/margins"][0] == actual["train/kl"][0] == 0.0
    for name in ("train/loss", "train/grad_norm"):
        assert actual[name] != expected[name]
        assert actual[name] == pytest.approx(expected[name], rel=near), name


LORA = {
    "model__peft__peft_scheme": "lora",
    "model__peft__lora_tuning__target_modules": ["all"],
    "model__peft__lora_tuning__adapter_dim": 4,
    "model__optim__lr": 1e-2,
}
DORA = {"model__peft__lora_tuning__dora": True}


@pytest.mark.parametrize("kind", [{}, DORA], ids=["lora", "dora"])
def test_adapters_in_half_precision(run: Any, kind: dict[str, Any]) -> None:
    """However the reference is held, it is scored to the same bits; float32 is near."""
    series = [
        read_series(run("one", "bf16", **LORA, **kind, model__kto__reference__mode=mode))
        for mode in ("adapter_off", "resident", "cached")
    ]
    assert series[0]["train/loss"][0] == 0.5
    for name in ("train/loss", "train/grad_norm", "train/kl"):
        assert series[0][name] == series[1][name] == series[2][name], name
    full = read_series(run("one", "32", **LORA, **kind))
    for name in ("train/loss", "train/grad_norm"):
        assert series[0][name] != full[name]
        assert series[0][name] == pytest.approx(full[name], rel=0.05), name


@pytest.mark.parametrize(
    ("model", "world_size", "layout", "near"),
    [
        ("tied", 2, PIPELINE, 0.03),
        ("experts", 2, EXPERTS, 0.1),  # a token whose experts are nearly equal may get others
        pytest.param("hf", 4, {**TENSOR, **CONTEXT}, 0.03, marks=pytest.mark.slow),
    ],
)
def test_more_models_and_layouts_in_bfloat16(
    train: Callable[..., Path], root: Path, model: str, world_size: int, layout: dict[str, Any], near: float
) -> None:
    settings = {
        "pretrained_checkpoint__restore_from_path": str(root / model),
        "trainer__kto__max_steps": 5,
        "model__micro_batch_size": 2,
    }
    actual = read_series(train(world_size, **settings, **layout, trainer__precision="bf16"))
    expected = read_series(train(1, **settings))
    assert actual["train/loss"][0] == 0.5 and actual["train/kl"][0] == 0.0
    for name in ("train/loss", "train/grad_norm"):
        assert actual[name] == pytest.approx(expected[name], rel=near), name


def test_float16_and_experts_are_refused(root: Path, tmp_path: Path, run_ranks: Any) -> None:
    changes = {"pretrained_checkpoint__restore_from_path": str(root / "experts"), "trainer__precision": "16-mixed"}
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), settings(root, tmp_path, **changes))
    assert kind == "ConfigError" and "trainer.precision=16-mixed" in message and "bf16-mixed" in message


@pytest.mark.parametrize("layout", [pytest.param("one", marks=pytest.mark.slow), "dp2_overlap"])
def test_updates_below_the_resolution_of_bfloat16_add_up(run: Any, root: Path, layout: str) -> None:
    """Each step moves a weight of about 0.2 by less than half of its last bit; only float32 copies remember that."""
    small = {
        "model__optim__lr": 1e-4,
        "model__optim__sched__name": "Constant",
        "model__optim__weight_decay": 0.0,
        "trainer__kto__max_steps": 20,
        "export__enabled": True,
    }
    folders = {precision: run(layout, precision, **small) / "hf" for precision in ("32", "bf16")}
    start, exact, rounded = (
        load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
        for folder in (root / "hf", folders["32"], folders["bf16"])
    )
    moved = (exact - start).abs() > 1e-3
    assert moved.float().mean() > 0.1
    resolution = exact.abs() * 2**-8
    assert torch.all((rounded - exact).abs() <= 1.5 * resolution + 2e-4)


def overflowing(port: int, overrides: dict[str, Any]) -> None:
    """Train with a first loss scale under which gradients cannot be represented."""
    from nemo_kto.runtime import optimizer

    original, optimizer._FIRST_LOSS_SCALE = optimizer._FIRST_LOSS_SCALE, 2.0**24
    try:
        train_on_rank(port, overrides)
    finally:
        optimizer._FIRST_LOSS_SCALE = original


def test_float16_skips_steps_until_the_loss_scale_fits(root: Path, tmp_path: Path, run_ranks: Any) -> None:
    """The loss stays at one half as long as nothing is updated; from the second overflow on each halves the scale."""
    values = settings(root, tmp_path / "log", trainer__precision="16-mixed", trainer__kto__max_steps=30)
    run_ranks(overflowing, 1, free_port(), values)
    series = read_series(tmp_path / "log")
    updated = sorted(series["train/grad_norm"])
    first = updated[0]
    assert first > 1 and updated == list(range(first, 30))
    assert {series["train/loss"][step] for step in range(first + 1)} == {0.5}
    assert series["train/loss"][first + 1] != 0.5
    assert series["train/lr"][first] == series["train/lr"][0]
    scales = series["train/loss_scale"]
    assert [scales[step] for step in range(first + 1)] == [2.0**24, *(2.0 ** (24 - step) for step in range(first))]
    assert scales[29] == scales[first]


def test_the_loss_scale_survives_a_stop(root: Path, tmp_path: Path, run_ranks: Any) -> None:
    """A run stopped before its first update, and again after it, is the uninterrupted one."""
    saving = {"exp_manager__create_checkpoint_callback": True, "model__optim__sched__name": "Constant"}
    for log_dir, stops in (("stopped", (3, 22, 26)), ("whole", (26,))):
        for steps in stops:
            changes = {**saving, "trainer__precision": "16-mixed", "trainer__kto__max_steps": steps}
            run_ranks(overflowing, 1, free_port(), settings(root, tmp_path / log_dir, **changes))
    stopped, whole = read_series(tmp_path / "stopped"), read_series(tmp_path / "whole")
    assert min(whole["train/grad_norm"]) > 3
    for name in ("train/loss", "train/grad_norm", "train/loss_scale"):
        assert stopped[name] == whole[name]


@pytest.mark.parametrize(
    ("layout", "precision", "kind"),
    [
        pytest.param("one", "bf16", {}, marks=pytest.mark.slow),
        ("dp2_overlap", "bf16", {}),
        ("dp2_overlap", "bf16", {**LORA, **DORA}),
        ("one", "16-mixed", {}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    run: Any, tmp_path: Path, layout: str, precision: str, kind: dict[str, Any]
) -> None:
    saving = {"exp_manager__create_checkpoint_callback": True, "model__optim__sched__name": "Constant", **kind}
    for steps in (2, 4):
        resumed = run(layout, precision, **saving, log_dir=tmp_path / "log", trainer__kto__max_steps=steps)
    whole = run(layout, precision, **saving, trainer__kto__max_steps=4)
    for name in ("train/loss", "train/grad_norm"):
        assert read_series(resumed)[name] == read_series(whole)[name]
