"""Optimizer's state in the host's memory: it lies there, updates are the same, and checkpoints know nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from nemo_kto.runtime import frugal_adam
from nemo_kto.runtime.optimizer import frugal_adams
from tests.cuda_sim.test_same_series import BF16, LORA, TP2_SP
from tests.distributed_harness import free_port
from tests.integration.assets import read_series, settings, train_on_rank, without_times

SAVING = {
    "exp_manager__create_checkpoint_callback": True,
    "trainer__kto__save_interval": 1,
    "model__optim__sched__name": "Constant",
}


class Places(Callback):
    """Notes of each state, after a step, the device, the dtype, and how many numbers have it."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, torch.dtype], int] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Look at the optimizer."""
        self.found = {}
        for adam in frugal_adams(trainer.strategy.optimizers[0]):
            for shard, state in adam.state.items():
                assert shard.is_cuda and not state["master_param"].is_pinned()  # only what passes through is
                for name in ("exp_avg", "exp_avg_sq", "master_param"):
                    place = (name, state[name].device.type, state[name].dtype)
                    self.found[place] = self.found.get(place, 0) + state[name].numel()


def placed(port: int, overrides: dict[str, Any], at_once: int) -> dict[tuple[str, str, torch.dtype], int]:
    """Train with so many numbers updated at once; return what `Places` has seen last."""
    frugal_adam.AT_ONCE = at_once
    places = Places()
    train_on_rank(port, overrides, callbacks=[places])
    return places.found


@pytest.fixture
def run(root: Path, tmp_path: Path, gpu_ranks: Any) -> Callable[..., tuple[list[Any], dict[str, dict[int, float]]]]:
    """Return `run(name, ranks, **changes)`: trains in a folder of that name; where state was, and the series."""

    def get(name: str, ranks: int, *, at_once: int = 2**23, **changes: Any) -> Any:
        values = {"trainer__accelerator": "gpu", "trainer__kto__max_steps": 4, "model__micro_batch_size": 2, **changes}
        overrides = settings(root, tmp_path / name, **values)
        found = gpu_ranks(placed, ranks, free_port(), overrides, at_once)
        return found, without_times(read_series(tmp_path / name))

    return get


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(1, {}, id="float32"),
        pytest.param(2, {**BF16, **TP2_SP}, id="bf16 TP2 SP"),
        pytest.param(2, {**BF16, **LORA}, id="bf16 LoRA DP2"),
    ],
)
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_the_host_has_it_and_no_bit_changes(run: Any, ranks: int, changes: dict[str, Any], fraction: float) -> None:
    """In pieces of a thousand numbers, so that gradients of some are under way while others are updated."""
    changes = {**changes, "trainer__kto__gradient_clip_val": 0.05}
    _, plain = run("plain", ranks, **changes)
    places, series = run("host", ranks, at_once=1000, **changes, model__optim__offload_fraction=fraction)
    assert series == plain
    for found in places:
        for name in ("exp_avg", "exp_avg_sq", "master_param"):
            on_host, on_device = (found.get((name, place, torch.float32), 0) for place in ("cpu", "cuda"))
            assert fraction - 0.01 < on_host / (on_host + on_device) <= fraction
        assert {dtype for _, _, dtype in found} == {torch.float32}


def test_moments_in_two_bytes_beside_float32_parameters(run: Any) -> None:
    halves = {"model__optim__states": "bfloat16", "model__optim__offload_fraction": 0.5}
    (found,), on_both = run("both", 1, **BF16, **halves)
    names = {(name, dtype) for name, _, dtype in found}
    assert names == {
        ("exp_avg", torch.bfloat16),
        ("exp_avg_sq", torch.bfloat16),
        ("master_param", torch.float32),
    }
    _, on_device = run("device", 1, **BF16, model__optim__states="bfloat16")
    assert on_both == on_device


def test_checkpoints_do_not_know_where_state_was(run: Any) -> None:
    """Two steps each on the host, on the device, and half of both."""
    parts = [(2, 1.0), (2, 0.0), (2, 0.5)]
    for number, (ranks, fraction) in enumerate(parts):
        steps = {"trainer__kto__max_steps": 2 * number + 2, "model__optim__offload_fraction": fraction}
        _, chain = run("chain", ranks, **BF16, **SAVING, **steps)
    _, whole = run("whole", 2, **BF16, **SAVING, trainer__kto__max_steps=6)
    assert chain == whole
