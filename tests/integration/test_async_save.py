"""Checkpoints written while training goes on: as whole as the others at every moment, and as good to resume from."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from nemo_kto.runtime.checkpoint import BackgroundCheckpointIO
from nemo_kto.runtime.checkpoint_folders import is_finished, newest_whole
from tests.distributed_harness import free_port
from tests.integration.assets import read_series, settings, train_on_rank
from tests.waiting import HANG

SAVING = {
    "exp_manager__create_checkpoint_callback": True,
    "exp_manager__checkpoint_callback_params__async_save": True,
    "model__optim__sched__name": "Constant",
    "trainer__kto__save_interval": 2,
}

Writer = Callable[..., None]


def pass_on(original: Writer, *args: Any, **kwargs: Any) -> None:
    """Write as if nothing had been changed."""
    original(*args, **kwargs)


@contextmanager
def writing(*, choose: Callable[[], Writer] = lambda: pass_on) -> Iterator[None]:
    """Have the process of each save call `choose()(original, *arguments)` instead of `original(*arguments)`.

    It does so when training waits for it, and not before: however fast either is, a checkpoint is under way for as
    long as training lets it be.
    """
    schedule = AsyncCallsQueue.schedule_async_request
    finalize = BackgroundCheckpointIO.maybe_finalize_save_checkpoint
    waited_for = multiprocessing.get_context("fork").Event()  # one at a time is under way

    def schedule_held(self: Any, request: Any) -> int:
        original = request.async_fn
        if original is not None:
            waited_for.clear()
            request = request._replace(async_fn=partial(write, choose(), original))
        return schedule(self, request)

    def write(writer: Writer, original: Writer, *args: Any, **kwargs: Any) -> None:
        waited_for.wait(HANG)
        writer(original, *args, **kwargs)

    def finalize_and_release(self: Any, blocking: bool = False) -> bool:
        if blocking:
            waited_for.set()
        return finalize(self, blocking)

    AsyncCallsQueue.schedule_async_request = schedule_held
    BackgroundCheckpointIO.maybe_finalize_save_checkpoint = finalize_and_release  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCallsQueue.schedule_async_request = schedule
        BackgroundCheckpointIO.maybe_finalize_save_checkpoint = finalize  # type: ignore[method-assign]


class Witness(Callback):
    """Notes before each step which checkpoint a killed run would go on from, and whether one is being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[str | None, bool]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Look at the folder."""
        last = newest_whole(self.folder)[0]
        unfinished = any(not is_finished(path) for path in self.folder.glob("*-last"))
        self.seen.append((last.name if last else None, unfinished))


def held_run(port: int, overrides: dict[str, Any]) -> list[tuple[str | None, bool]]:
    """Train with writers that take until training waits for them; return what the witness saw."""

    witness = Witness(Path(overrides["exp_manager.explicit_log_dir"]) / "checkpoints")
    with writing():
        train_on_rank(port, overrides, callbacks=[witness])
    return witness.seen


def test_what_a_checkpoint_replaces_stays_until_it_is_whole(root: Path, tmp_path: Path, run_ranks: Any) -> None:
    """One is begun every second step, and waited for by the next: none is ever missing in between."""
    changes = {**SAVING, "model__optim__overlap_param_sync": True, "trainer__kto__max_steps": 8}
    seen, _ = run_ranks(held_run, 2, free_port(), settings(root, tmp_path / "log", **changes))
    newest = [None, None, "megatron_gpt-step=2-last", "megatron_gpt-step=4-last"]
    assert seen == [(name, begun > 0) for begun, name in enumerate(newest) for _ in range(2)]
    folders = [path.name for path in (tmp_path / "log" / "checkpoints").iterdir()]
    assert folders == ["megatron_gpt-step=8-last"]
    assert is_finished(tmp_path / "log" / "checkpoints" / folders[0])


def test_a_run_resumed_from_it_is_the_uninterrupted_one(root: Path, tmp_path: Path, run_ranks: Any) -> None:
    for steps in (4, 8):
        values = settings(root, tmp_path / "log", **SAVING, trainer__kto__max_steps=steps)
        run_ranks(train_on_rank, 2, free_port(), values)
    run_ranks(train_on_rank, 2, free_port(), settings(root, tmp_path / "whole", **SAVING, trainer__kto__max_steps=8))
    for name in ("train/loss", "train/grad_norm"):
        assert read_series(tmp_path / "log")[name] == read_series(tmp_path / "whole")[name]


def failing_run(port: int, overrides: dict[str, Any]) -> str:
    """Train; the writers of the first three checkpoints of rank 1 die. Return the error."""
    from nemo_kto.errors import CheckpointError

    dies = iter([dist.get_rank() == 1] * 3)

    def fail(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        os._exit(1)

    with writing(choose=lambda: fail if next(dies, False) else pass_on):
        try:
            train_on_rank(port, overrides)
        except CheckpointError as error:
            return str(error)
    return "no error"


def test_a_writer_that_dies_is_reported_and_leaves_nothing_that_looks_whole(
    root: Path, tmp_path: Path, run_ranks: Any
) -> None:
    """No rank waits for it in vain, and a checkpoint that lacks a part does not count."""
    tensor = {"model__tensor_model_parallel_size": 2}  # both ranks have something to write
    values = settings(root, tmp_path / "log", **SAVING, **tensor, trainer__kto__max_steps=8)
    for message in run_ranks(failing_run, 2, free_port(), values):
        assert (
            "step=6-last could not be written: a process that wrote a part of it was ended with exit code 1."
            in message
        )
        assert "So it was at steps 2, 4, 6. No checkpoint is left to go on from." in message
    assert newest_whole(tmp_path / "log" / "checkpoints")[0] is None


def diverging_run(port: int, overrides: dict[str, Any]) -> str:
    """Train at a ruinous learning rate with writers that are never in time; return the error."""
    from nemo_kto.errors import DivergenceError

    with writing():
        try:
            train_on_rank(port, overrides)
        except DivergenceError as error:
            return str(error)
    return "no error"


def test_a_run_that_diverges_finishes_the_checkpoint_under_way(root: Path, tmp_path: Path, run_ranks: Any) -> None:
    changes = {**SAVING, "trainer__kto__save_interval": 1, "model__optim__lr": 1e30, "trainer__kto__max_steps": 4}
    (message,) = run_ranks(diverging_run, 1, free_port(), settings(root, tmp_path / "log", **changes))
    assert "gradient of step 2 is not finite" in message
    last = newest_whole(tmp_path / "log" / "checkpoints")[0]
    assert last is not None and last.name == "megatron_gpt-step=1-last"
