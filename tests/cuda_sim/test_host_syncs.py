"""How often the host waits for the device in a training step: never more for more layers, parameters or rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback

from tests.cuda_sim.test_same_series import BF16, DORA, LORA, TP2_SP
from tests.distributed_harness import free_port
from tests.integration.assets import make_model_folder, settings, train_on_rank

PP2 = {"model__pipeline_model_parallel_size": 2}
BETWEEN_STAGES = ("torch.cuda.synchronize", "megatron/core/pipeline_parallel/p2p_communication.py _communicate")
"""Megatron's, after each batched exchange of a row between stages that are not interleaved (`batch_p2p_sync`)."""

Found = tuple[Counter[tuple[str, str]], int]


class Watch(Callback):
    """Counts in the second step; the first one makes what later ones find."""

    def __init__(self) -> None:
        from tests.cuda_sim.host_syncs import HostSyncs

        self.syncs = HostSyncs()

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            self.syncs.__enter__()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            self.syncs.__exit__(None, None, None)


def watched(port: int, overrides: dict[str, Any]) -> Found:
    """Return where the host waited, and how many copies from pinned memory did not wait; the GPU's peak is known."""
    from nemo_kto.kto import utilisation

    watch = Watch()
    with mock.patch.object(utilisation, "peak_flops", lambda name: 1e12):
        train_on_rank(port, overrides, callbacks=[watch])
    return watch.syncs.found, watch.syncs.uploads


def instrument() -> list[str]:
    """Return what is counted of things that wait, and of some that do not."""
    from tests.cuda_sim.host_syncs import HostSyncs

    here = torch.arange(4.0, device="cuda")
    pinned, ordinary = torch.ones(4, pin_memory=True), torch.ones(4)
    waiting: list[Callable[[], Any]] = [
        here.tolist,
        lambda: here[here > 1],
        lambda: here.cpu(),
        lambda: ordinary.to("cuda", non_blocking=True),
        lambda: pinned.to("cuda"),
        torch.cuda.synchronize,
        torch.cuda.Event().synchronize,
    ]
    free: list[Callable[[], Any]] = [
        lambda: pinned.to("cuda", non_blocking=True),
        lambda: pinned.copy_(here, non_blocking=True),
        lambda: here.__setitem__(here > 1, 0.0),
        lambda: here.clone().sum(),
        lambda: torch.cuda.current_stream().wait_stream(torch.cuda.Stream()),
    ]
    counts = []
    for action in waiting + free:
        with HostSyncs() as syncs:
            action()
        counts.append(" ".join(f"{what} {n}" for (what, _), n in syncs.found.items()))
    return counts


def test_the_instrument(gpu_ranks: Any) -> None:
    waits = [
        "copy cuda -> cpu 1",
        "aten.index.Tensor 1",
        "copy cuda -> cpu 1",
        "copy cpu -> cuda 1",
        "copy cpu -> cuda 1",
    ]
    assert gpu_ranks(instrument, 1)[0] == [
        *waits,
        "torch.cuda.synchronize 1",
        "Event.synchronize 1",
        *[""] * 5,
    ]


@pytest.fixture(scope="session")
def models(root: Path) -> Path:
    """Return the folder of models of 4 layers, `hf`, and of 8, `deep`."""
    make_model_folder(root / "deep", layers=8)
    return root


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(1, {**LORA, "model__kto__reference__mode": "cpu_swap"}, id="cpu_swap LoRA"),
        pytest.param(1, DORA, id="DoRA"),
        pytest.param(1, {**LORA, "model__peft__quantize_base": "int8"}, id="int8", marks=SLOW),
        pytest.param(1, {"model__kto__reference__mode": "cpu_swap"}, id="cpu_swap", marks=SLOW),
        pytest.param(1, {**BF16, "model__kto__reference__mode": "resident"}, id="resident bf16", marks=SLOW),
        pytest.param(1, {"model__kto__reference__mode": "cached"}, id="cached", marks=SLOW),
        pytest.param(2, TP2_SP, id="TP2 SP", marks=SLOW),
        pytest.param(2, {"model__context_parallel_size": 2}, id="CP2", marks=SLOW),
        pytest.param(2, PP2, id="PP2"),
        pytest.param(2, {**PP2, "model__virtual_pipeline_model_parallel_size": 2}, id="PP2 VPP2", marks=SLOW),
    ],
)
def test_the_host_waits_six_times_a_step(
    models: Path, tmp_path: Path, gpu_ranks: Any, ranks: int, changes: dict[str, Any]
) -> None:
    """For the metrics, the loss scale, the gradient norm, and three numbers of the progress bar; never for a layer."""
    for model, rows in (("hf", 2), ("deep", 4)):
        values = settings(
            models,
            tmp_path / model,
            trainer__accelerator="gpu",
            trainer__kto__max_steps=2,
            model__micro_batch_size=8 // rows,
            **changes,
        )
        values["pretrained_checkpoint.restore_from_path"] = str(models / model)
        for found, uploads in gpu_ranks(watched, ranks, free_port(), values):
            of_stages = found.pop(BETWEEN_STAGES, 0)
            assert sum(found.values()) <= 6, found
            assert of_stages <= 4 * rows + 1  # a row of each set and pass
            assert uploads
