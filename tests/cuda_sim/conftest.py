"""What the runs on the simulated device share: its ranks, and models and feedback to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_sim import simulated_cuda
from tests.cuda_sim.building import NoDevice, build
from tests.distributed_harness import RankServer
from tests.integration.assets import make_model_folder, write_feedback


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models `hf`, `experts` and `wide`, train.jsonl and validation.jsonl."""
    folder = tmp_path_factory.mktemp("assets")
    make_model_folder(folder / "hf")
    make_model_folder(folder / "experts", kind="experts")
    make_model_folder(folder / "wide", kind="wide", hidden_size=64, intermediate_size=128)  # one rank has blocks
    write_feedback(folder / "train.jsonl", number=40, seed=1)
    write_feedback(folder / "validation.jsonl", number=11, seed=2)
    return folder


@pytest.fixture(scope="session")
def gpu_ranks() -> Iterator[Callable[..., list[Any]]]:
    """Return `gpu_ranks(function, world_size, *arguments)`: like `run_ranks`, on simulated GPUs and their NCCL."""
    try:
        build()
    except NoDevice as reason:
        pytest.skip(f"no simulated GPU: {reason}")
    server = RankServer(simulated_cuda.install, backend="nccl")

    def run(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        return server.run(function, world_size, arguments)

    yield run
    server.close()
