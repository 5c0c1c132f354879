"""Moments in bfloat16, and state in the host's memory: the same for every layout, and nothing is lost by a stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed_harness import free_port, heard
from tests.integration.assets import assert_alike, read_series, settings, train_on_rank, without_times

ON_HOST = {"model__optim__offload_fraction": 1.0}
BFLOAT16 = {"model__optim__states": "bfloat16"}
BOTH = {**BFLOAT16, "model__optim__offload_fraction": 0.5}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {"model__optim__overlap_grad_sync": True, "model__optim__overlap_param_sync": True}),
    "tp2": (2, {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True}),
    "pp2": (2, {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2}),
    "cp2": (2, {"model__context_parallel_size": 2}),
}
SAVING = {
    "exp_manager__create_checkpoint_callback": True,
    "trainer__kto__save_interval": 2,
    "model__optim__sched__name": "Constant",
}
FEW_ADAPTERS = {
    "model__peft__peft_scheme": "lora",
    "model__peft__lora_tuning__adapter_dim": 4,
    "model__peft__lora_tuning__target_modules": ["attention_qkv"],
    "model__peft__lora_tuning__layer_selection": [1, 2],  # the second stage of two has none
    "model__optim__lr": 1e-2,
}


@pytest.fixture(scope="module")
def run(train: Callable[..., Path], root: Path) -> Callable[..., dict[str, dict[int, float]]]:
    """Return `run(ranks, **changes)`: the series of a run of five steps."""

    def get(ranks: int, **changes: Any) -> dict[str, dict[int, float]]:
        values = {"trainer__kto__max_steps": 5, "model__micro_batch_size": 2, **changes}
        values["model__data__data_prefix__validation"] = str(root / "validation.jsonl")
        values["pretrained_checkpoint__restore_from_path"] = str(root / values.pop("model", "hf"))
        return without_times(read_series(train(ranks, **values)))

    return get


@pytest.mark.parametrize("precision", ["32", "bf16", pytest.param("16-mixed", marks=pytest.mark.slow)])
def test_where_the_state_lies_changes_no_bit(run: Any, precision: str) -> None:
    changes = {"trainer__precision": precision, "trainer__kto__gradient_clip_val": 0.05}
    plain = run(1, **changes)
    for fraction in (0.5, 1.0):
        assert run(1, **changes, model__optim__offload_fraction=fraction) == plain


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("dp2", BOTH),
        ("tp2", BFLOAT16),
        ("tp2", ON_HOST),
        pytest.param("pp2", BOTH, marks=pytest.mark.slow),
        pytest.param("cp2", BOTH, marks=pytest.mark.slow),
        ("dp2", {**BOTH, "model": "experts", "model__expert_model_parallel_size": 2}),
    ],
)
def test_every_layout_trains_alike(run: Any, layout: str, changes: dict[str, Any]) -> None:
    ranks, sizes = LAYOUTS[layout]
    alone = {name: value for name, value in changes.items() if name != "model__expert_model_parallel_size"}
    assert_alike(run(ranks, **sizes, **changes), run(1, **alone))


@pytest.mark.parametrize(
    ("precision", "changes", "near"),
    [("32", BFLOAT16, 2e-3), ("bf16", BFLOAT16, 5e-3)],
)
def test_moments_in_bfloat16_are_near(run: Any, precision: str, changes: dict[str, Any], near: float) -> None:
    """Their 8 bits are felt, and no more than that: a run that lost them would go elsewhere by the fifth step."""
    actual, expected = run(1, trainer__precision=precision, **changes), run(1, trainer__precision=precision)
    assert actual["train/loss"] != expected["train/loss"]
    assert actual["train/loss"] == pytest.approx(expected["train/loss"], rel=near)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {**BOTH, "trainer__precision": "bf16"}),
        (2, {**BOTH, **FEW_ADAPTERS, "model__pipeline_model_parallel_size": 2}),
        (1, {**BOTH, "trainer__precision": "16-mixed", "exp_manager__checkpoint_callback_params__async_save": True}),
    ],
    ids=["bf16 DP2", "few adapters PP2", "float16, saved in the background"],
)
def test_a_resumed_run_is_the_whole_one(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], ranks: int, changes: dict[str, Any]
) -> None:
    """To the last bit: a checkpoint holds bfloat16 moments as float32, which gives the same bfloat16 again."""
    for name, lengths in (("whole", [5]), ("parts", [2, 5])):
        for steps in lengths:
            values = settings(root, tmp_path / name, **SAVING, **changes, trainer__kto__max_steps=steps)
            run_ranks(train_on_rank, ranks, free_port(), values)
    whole, parts = (without_times(read_series(tmp_path / name)) for name in ("whole", "parts"))
    assert parts == whole and len(whole["train/loss"]) == 5


def noted(port: int, overrides: dict[str, Any]) -> list[str]:
    """Train; return what is said about the optimizer."""
    said = heard()
    train_on_rank(port, overrides)
    return [sentence for sentence in said if "model.optim" in sentence]


def test_without_a_gpu_it_is_said_that_nothing_is_saved(root: Path, tmp_path: Path, run_ranks: Any) -> None:
    values = settings(root, tmp_path, **ON_HOST, trainer__kto__max_steps=1)
    first, second = run_ranks(noted, 2, free_port(), values)
    assert first == [
        "model.optim.offload_fraction=1.0 saves nothing without a GPU: all is in the host's memory already."
    ]
    assert second == []
