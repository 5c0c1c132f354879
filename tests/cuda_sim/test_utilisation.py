"""Model FLOPs utilisation of a run on simulated GPUs whose peak is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from lightning.pytorch import Callback
from transformers import AutoConfig

from nemo_kto.network.flops import ModelFlops
from nemo_kto.network.projections import LoRASettings
from tests.cuda_sim.test_same_series import BF16, LORA
from tests.distributed_harness import free_port
from tests.integration.assets import read_series, settings, train_on_rank

PEAK = 1e9
STEPS = 2

Lengths = list[tuple[int, int]]
"""Tokens of documents, and those of their responses."""


class Seen(Callback):
    """Notes the documents of this rank's batches: of samples, and of the KL set."""

    def __init__(self) -> None:
        self.steps: list[tuple[Lengths, Lengths]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.steps.append((lengths(batch.samples), lengths(batch.kl_samples)))


def lengths(documents: Any) -> Lengths:
    return [(len(prompt) + len(response), len(response)) for prompt, response in documents]


def seen_run(port: int, overrides: dict[str, Any], peak: float | None) -> list[tuple[Lengths, Lengths]]:
    """Train on devices of this peak."""
    from nemo_kto.kto import utilisation

    seen = Seen()
    with mock.patch.object(utilisation, "peak_flops", lambda name: peak):
        train_on_rank(port, overrides, callbacks=[seen])
    return seen.steps


def summed(count: Callable[..., int], documents: Lengths) -> int:
    tokens, responses = zip(*documents, strict=True)
    return count(tokens, sum(responses))


@pytest.mark.parametrize(
    ("ranks", "replicas", "changes", "adapters", "reference_passes"),
    [
        pytest.param(1, 1, {"model__kto__reference__mode": "resident"}, False, 1, id="live"),
        pytest.param(2, 2, {"model__kto__reference__mode": "cached"}, False, 0, id="DP2 cached"),
        pytest.param(2, 1, {**LORA, "model__tensor_model_parallel_size": 2}, True, 1, id="TP2 LoRA"),
    ],
)
def test_a_step_is_counted_once_whatever_the_layout(
    root: Path,
    tmp_path: Path,
    gpu_ranks: Any,
    ranks: int,
    replicas: int,
    changes: dict[str, Any],
    adapters: bool,
    reference_passes: int,
) -> None:
    values = settings(root, tmp_path, trainer__accelerator="gpu", trainer__kto__max_steps=STEPS, **BF16, **changes)
    seen = gpu_ranks(seen_run, ranks, free_port(), values, PEAK)
    config = AutoConfig.from_pretrained(root / "hf")
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    lora = LoRASettings(projections=projections, layers=(0, 1, 2, 3), rank=4, alpha=4) if adapters else None
    series = read_series(tmp_path)
    for step in range(STEPS):
        samples = [document for rank in seen[:replicas] for document in rank[step][0]]
        kl_set = [document for rank in seen[:replicas] for document in rank[step][1]]
        assert len(samples) == len(kl_set) == 8
        flops = summed(ModelFlops(config, lora).forward, samples + kl_set)
        flops += summed(ModelFlops(config, lora).backward, samples)
        flops += reference_passes * summed(ModelFlops(config).forward, samples + kl_set)
        seconds = series["train/step_time"][step]
        assert series["train/mfu"][step] == pytest.approx(flops / seconds / (ranks * PEAK), rel=1e-6)


def test_without_a_known_peak_nothing_is_logged(root: Path, tmp_path: Path, gpu_ranks: Any) -> None:
    """Nor in float32, which the peak is not of."""
    for name, peak, precision in (("unknown", None, BF16), ("float32", PEAK, {})):
        values = settings(root, tmp_path / name, trainer__accelerator="gpu", trainer__kto__max_steps=1, **precision)
        gpu_ranks(seen_run, 1, free_port(), values, peak)
        assert "train/mfu" not in read_series(tmp_path / name)
