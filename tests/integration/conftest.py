"""What the runs on ranks of this process share: three models, feedback, and how to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed_harness import free_port
from tests.integration.assets import KINDS, make_model_folder, settings, train_on_rank, write_feedback


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models `hf`, `tied` and those of all kinds, train.jsonl and validation.jsonl."""
    folder = tmp_path_factory.mktemp("assets")
    make_model_folder(folder / "hf")
    make_model_folder(folder / "tied", tied=True)
    for kind in KINDS:
        make_model_folder(folder / kind, kind=kind)
    write_feedback(folder / "train.jsonl", number=40, seed=1)
    write_feedback(folder / "validation.jsonl", number=11, seed=2)
    return folder


@pytest.fixture(scope="session")
def train(root: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]) -> Callable[..., Path]:
    """Return `train(world_size, **changes)`: trains and returns the log folder, `log_dir` or a new one."""

    def run(world_size: int, *, log_dir: Path | None = None, **changes: Any) -> Path:
        log_dir = log_dir or tmp_path_factory.mktemp("run")
        run_ranks(train_on_rank, world_size, free_port(), settings(root, log_dir, **changes))
        return log_dir

    return run
