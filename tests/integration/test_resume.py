"""What a resumed run may change, and what it must not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from tests.distributed_harness import free_port
from tests.integration.assets import (
    make_model_folder,
    read_series,
    refusal_on_rank,
    settings,
    train_on_rank,
    without_times,
)

LEARNING_RATE = 1e-3
CONSTANT = {
    "model__optim__lr": LEARNING_RATE,
    "model__optim__sched__name": "Constant",
    "exp_manager__create_checkpoint_callback": True,
    "trainer__kto__save_interval": 1,
}

TP2_SP = {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True}
EP2 = {"model__expert_model_parallel_size": 2}


@pytest.fixture
def stopped(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> Path:
    """Return the log folder of a run of two steps."""
    values = settings(root, tmp_path / "log", **CONSTANT, trainer__kto__max_steps=2)
    run_ranks(train_on_rank, 1, free_port(), values)
    return tmp_path / "log"


def test_a_resumed_run_follows_its_own_optimizer_settings(
    root: Path, stopped: Path, run_ranks: Callable[..., Any]
) -> None:
    """Megatron would go on with the learning rates and betas of the checkpoint, without a word."""
    longer = {**CONSTANT, "trainer__kto__max_steps": 4, "model__optim__lr": 2 * LEARNING_RATE}
    run_ranks(train_on_rank, 1, free_port(), settings(root, stopped, **longer))
    rates = read_series(stopped)["train/lr"]
    assert rates == pytest.approx({0: LEARNING_RATE, 1: LEARNING_RATE, 2: 2 * LEARNING_RATE, 3: 2 * LEARNING_RATE})


@pytest.mark.parametrize(
    "objective",
    [
        {"model__kto__loss": "bco"},
        {
            "model__kto__humanline_clamp": [-0.06, 0.04],
            "model__kto__reference__sync_every_n_steps": 2,
            "model__kto__reference__sync_mixup_alpha": 1.0,
        },
    ],
    ids=["bco", "humanline"],
)
def test_what_an_objective_has_learned_goes_on(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], objective: dict[str, Any]
) -> None:
    """BCO's reward shift is of all steps before the stop too, and humanline's reference is one step behind again."""
    for name, lengths in (("whole", [5]), ("parts", [3, 5])):
        for steps in lengths:
            changes = {**CONSTANT, **objective, "trainer__kto__max_steps": steps}
            run_ranks(train_on_rank, 1, free_port(), settings(root, tmp_path / name, **changes))
    whole, parts = (without_times(read_series(tmp_path / name)) for name in ("whole", "parts"))
    assert parts == whole
    assert "train/delta" in whole or "train/unclamped" in whole


def test_betas_of_a_resumed_run_take_effect(root: Path, stopped: Path, run_ranks: Callable[..., Any]) -> None:
    losses = []
    for betas in ([0.9, 0.98], [0.0, 0.0]):
        log_dir = Path(shutil.copytree(stopped, stopped.with_name(f"log{betas[0]}")))
        longer = {**CONSTANT, "trainer__kto__max_steps": 4, "model__optim__betas": betas}
        run_ranks(train_on_rank, 1, free_port(), settings(root, log_dir, **longer))
        losses.append(read_series(log_dir)["train/loss"][3])
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model__global_batch_size": 4}, "model.global_batch_size (8, now 4)"),
        ({"model__seed": 7}, "model.seed (1234, now 7)"),
        ({"model__kto__ref_policy_kl_penalty": 0.1}, "model.kto.ref_policy_kl_penalty (0.5, now 0.1)"),
        ({"model__peft__peft_scheme": "lora"}, "model.peft.peft_scheme (none, now lora)"),
        ({"model__kto__reference__sync_every_n_steps": 5}, "sync_every_n_steps (None, now 5)"),
        ({"trainer__precision": "bf16"}, "trainer.precision (32, now bf16-mixed)"),
        ({"model__data__shuffle": False}, "model.data.shuffle (True, now False)"),
        ({"model__data__append_eod": False}, "model.data.data_prefix.train"),
        ({"pretrained_checkpoint__restore_from_path": "other"}, "pretrained_checkpoint.restore_from_path"),
        ({"exp_manager__resume_if_exists": False}, "exp_manager.resume_if_exists=false"),
    ],
)
def test_another_run_is_not_resumed(
    root: Path, stopped: Path, run_ranks: Callable[..., Any], changes: dict[str, Any], key: str
) -> None:
    if "pretrained_checkpoint__restore_from_path" in changes:
        changes = {"pretrained_checkpoint__restore_from_path": str(make_model_folder(stopped / "other", seed=1))}
    values = settings(root, stopped, **{**CONSTANT, "trainer__kto__max_steps": 4, **changes})
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), values)
    assert kind == "ConfigError" and key in message and "exp_manager.explicit_log_dir" in message, message


CHAINS = {
    "layouts": [
        (1, {}),
        (2, TP2_SP),
        (2, {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2}),
        (2, {}),
    ],
    "context": [
        (2, {"model__tensor_model_parallel_size": 2}),
        (4, {"model__pipeline_model_parallel_size": 2, "model__optim__overlap_param_sync": True}),
        (2, {"model__context_parallel_size": 2}),
        (1, {}),
    ],
    "experts": [
        (2, EP2),
        (2, TP2_SP),
        (1, {}),
        (2, {"model__pipeline_model_parallel_size": 2}),
    ],
    "adapters": [
        (1, {}),
        (2, TP2_SP),
        (2, {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2}),
        (4, {"model__pipeline_model_parallel_size": 2}),
        (2, {}),
    ],
    "magnitudes": [
        (2, {**TP2_SP, "model__optim__overlap_param_sync": True}),
        (1, {}),
        (2, {"model__pipeline_model_parallel_size": 2}),
    ],
    "moving reference": [
        (2, TP2_SP),
        (1, {}),
        (2, {"model__pipeline_model_parallel_size": 2, "model__optim__overlap_param_sync": True}),
        (2, {"model__kto__reference__mode": "cpu_swap"}),
    ],
    "optimizer elsewhere": [
        (1, {"model__optim__offload_fraction": 1.0}),
        (2, TP2_SP),
        (2, {"model__optim__offload_fraction": 0.5, "model__optim__overlap_param_sync": True}),
        (2, {"model__pipeline_model_parallel_size": 2, "model__optim__offload_fraction": 1.0}),
    ],
    "router biases": [(2, EP2), (1, {"model__kto__reference__mode": "cpu_swap"})],
    "experts, whole ones": [
        (2, EP2),
        (2, {**TP2_SP, **EP2, "model__expert_tensor_parallel_size": 1}),
        (1, {}),
        (2, {"model__pipeline_model_parallel_size": 2}),
    ],
}


SLOW = ("context", "experts", "experts, whole ones", "moving reference", "router biases")
FOLDERS = {"experts": "experts", "experts, whole ones": "experts", "router biases": "glm4_moe"}
"""Chain -> its model, if not the dense one."""
SETTINGS: dict[str, dict[str, Any]] = {
    "adapters": {
        "model__peft__peft_scheme": "lora",
        "model__peft__lora_tuning__target_modules": ["attention_qkv", "mlp"],
        "model__peft__lora_tuning__adapter_dim": 4,
        "model__peft__lora_tuning__adapter_dropout": 0.2,
        "model__peft__lora_tuning__layer_selection": [1, 2],  # the second stage of two has none
        "model__kto__reference__mode": "cached",  # beside the log folder: it is filled by the first part of the chain
    },
    "magnitudes": {
        "model__peft__peft_scheme": "lora",
        "model__peft__lora_tuning__target_modules": ["all"],
        "model__peft__lora_tuning__adapter_dim": 3,
        "model__peft__lora_tuning__dora": True,
        "model__peft__lora_tuning__modules_to_save": ["embed_tokens", "lm_head"],
        "model__peft__lora_tuning__rank_pattern": {"layers.[12].*": 5},
    },
    "moving reference": {
        "model__kto__reference__sync_every_n_steps": 3,  # in the middle of the chain's second part, and in its last
        "model__kto__reference__sync_mixup_alpha": 0.5,
    },
    "router biases": {"model__kto__reference__sync_every_n_steps": 3, "model__kto__reference__mode": "resident"},
}
"""Chain -> what its runs are set to besides."""


@pytest.mark.parametrize(
    "chain",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CHAINS],
)
def test_a_run_goes_on_under_one_layout_after_the_other(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], chain: str
) -> None:
    """Two steps under each, against as many in one process."""
    model = {"pretrained_checkpoint__restore_from_path": str(root / FOLDERS.get(chain, "hf"))}
    model |= SETTINGS.get(chain, {})
    for index, (world_size, changes) in enumerate(CHAINS[chain]):
        steps = {"trainer__kto__max_steps": 2 * index + 2}
        values = settings(root, tmp_path / "chain", **{**CONSTANT, **model, **changes, **steps})
        run_ranks(train_on_rank, world_size, free_port(), values)
    total = 2 * len(CHAINS[chain])
    alone = settings(root, tmp_path / "one", **CONSTANT, **model, trainer__kto__max_steps=total)
    run_ranks(train_on_rank, 1, free_port(), alone)
    actual, expected = read_series(tmp_path / "chain"), read_series(tmp_path / "one")
    for name in ("train/loss", "train/grad_norm"):
        assert len(actual[name]) == total
        assert actual[name] == pytest.approx(expected[name], rel=1e-5), name


class StepCounters(Callback):
    """Notes Adam's step counters before each step, and whether any two parameters share one."""

    def __init__(self) -> None:
        self.seen: list[tuple[set[float], bool]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Look at the optimizer."""
        states = trainer.strategy.optimizers[0].optimizer.state.values()
        counters = [state["step"] for state in states if state]
        places = {counter.data_ptr() for counter in counters}
        self.seen.append(({counter.item() for counter in counters}, len(places) == len(counters)))


def counted_run(port: int, overrides: dict[str, Any]) -> list[tuple[set[float], bool]]:
    """Train; return what `StepCounters` saw."""
    counters = StepCounters()
    train_on_rank(port, overrides, callbacks=[counters])
    return counters.seen


def test_adam_goes_on_counting(root: Path, stopped: Path, run_ranks: Callable[..., Any]) -> None:
    """A stale step, or one tensor counted up once for each parameter, silently changes the bias correction."""
    longer = settings(root, stopped, **CONSTANT, trainer__kto__max_steps=4)
    for seen in run_ranks(counted_run, 2, free_port(), longer):
        assert seen == [({2.0}, True), ({3.0}, True)]
