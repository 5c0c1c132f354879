"""trainer.deterministic: the same command gives the same bits, and what computes otherwise is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from nemo_kto.errors import ConfigError
from nemo_kto.runtime.determinism import make_deterministic
from tests.distributed_harness import free_port
from tests.integration.assets import read_series, settings, train_on_rank

SAME = {
    "trainer__deterministic": True,
    "export__enabled": True,
    "trainer__kto__max_steps": 4,
    "model__tensor_model_parallel_size": 1,
}


class Watch(Callback):
    """Notes what a step is computed with."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note it."""
        model = pl_module.models[0]
        self.seen = {
            "torch": torch.are_deterministic_algorithms_enabled(),
            "Megatron": model.config.deterministic_mode and model.embedding.word_embeddings.deterministic_mode,
            "cuBLAS": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            "NCCL": os.environ.get("NCCL_ALGO"),
            "Transformer Engine": os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO"),
        }


def watched_run(port: int, overrides: dict[str, Any]) -> dict[str, Any]:
    watch = Watch()
    train_on_rank(port, overrides, callbacks=[watch])
    return watch.seen


def test_two_runs_have_the_same_bits(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    for name in ("first", "second"):
        seen = run_ranks(watched_run, 2, free_port(), settings(root, tmp_path / name, **SAME))
        assert (
            seen
            == [{"torch": True, "Megatron": True, "cuBLAS": ":4096:8", "NCCL": "^NVLS", "Transformer Engine": "0"}] * 2
        )
    first, second = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("first", "second"))
    before = load_file(root / "hf" / "model.safetensors")
    assert first.keys() == second.keys() == before.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert not torch.equal(tensor, before[name]), name
    one, other = (read_series(tmp_path / name) for name in ("first", "second"))
    for name in ("train/loss", "train/grad_norm", "train/kl", "train/rewards/margins"):
        assert one[name] == other[name] and len(one[name]) == 4


def refused_environment() -> str:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":0:0"
    with pytest.raises(ConfigError) as caught:
        make_deterministic()
    return str(caught.value)


def test_an_environment_that_asks_for_other_bits_is_refused(run_ranks: Callable[..., Any]) -> None:
    (message,) = run_ranks(refused_environment, 1)
    assert "CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, and it is :0:0" in message
