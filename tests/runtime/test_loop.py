"""When a run stops by itself. Validation, checkpoints and resuming at the right steps: tests/integration."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import psutil
import torch.distributed as dist

from nemo_kto.runtime.loop import GracefulStop, StartUpTime


def ask_with_one_late_rank(late_rank: int | None) -> bool:
    late = dist.get_rank() == late_rank
    return GracefulStop(timedelta(days=-1 if late else 1)).agreed()


def ask_with_one_signalled_rank() -> tuple[bool, bool]:
    """Return what the ranks agree on before and after rank 1 receives SIGTERM."""
    stop, trainer = GracefulStop(), SimpleNamespace(is_global_zero=False)
    stop.on_train_start(trainer, None)  # type: ignore[arg-type]
    try:
        before = stop.agreed()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before, stop.agreed()
    finally:
        stop.teardown(trainer, None, "fit")  # type: ignore[arg-type]


def test_one_late_rank_stops_all(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(ask_with_one_late_rank, 2, 1) == [True, True]
    assert run_ranks(ask_with_one_late_rank, 2, None) == [False, False]


def test_one_signalled_rank_stops_all(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(ask_with_one_signalled_rank, 2) == [(False, True)] * 2


def test_start_up_time_counts_from_the_process_once(monkeypatch: Any, capsys: Any) -> None:
    """A later run of the same process, as in a notebook, counts from its own start."""
    monkeypatch.setattr(StartUpTime, "_runs", 0)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 1000.0)
    monkeypatch.setattr(time, "time", lambda: 1100.0)
    first, second = StartUpTime(), StartUpTime()
    monkeypatch.setattr(time, "time", lambda: 1120.0)
    for callback in (first, first, second):
        callback.on_train_batch_end(SimpleNamespace(is_global_zero=True))
    assert capsys.readouterr().out.split("\n") == ["", "First step after 120 s", "", "First step after 20 s", ""]
