"""When a run stops by itself. Validation, checkpoints and resuming at the right steps: tests/integration."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch.distributed as dist

from nemo_kto.runtime.loop import GracefulStop, StartUpTime, StopReason


def ask_with_one_late_rank(late_rank: int | None) -> bool:
    late = dist.get_rank() == late_rank
    return GracefulStop(timedelta(days=-1 if late else 1)).agreed()


def ask_with_one_signalled_rank() -> tuple[bool, bool]:
    """Return what the ranks agree on before and after rank 1 receives SIGTERM."""
    stop = GracefulStop()
    with stop.listening():
        before = stop.agreed()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before, stop.agreed()


def ask_for_file(file: Path) -> tuple[bool, bool, StopReason]:
    """Return what the ranks agree on before and after rank 0 makes a file, and why."""
    # only rank 0 looks: on the other machines it may be seen later
    stop = GracefulStop(file=file if dist.get_rank() == 0 else file.with_name("elsewhere"))
    before = stop.agreed()
    if dist.get_rank() == 0:
        file.touch()
    after = stop.agreed()
    if dist.get_rank() == 0:
        stop.remove_file()
    return before, after, stop.reason


def ask_late_and_signalled() -> StopReason:
    """Return why all stop when rank 0 is late and rank 1 was signalled."""
    stop = GracefulStop(timedelta(days=1 if dist.get_rank() else -1))
    with stop.listening():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        stop.agreed()
    return stop.reason


def test_one_late_rank_stops_all(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(ask_with_one_late_rank, 2, 1) == [True, True]
    assert run_ranks(ask_with_one_late_rank, 2, None) == [False, False]


def test_one_signalled_rank_stops_all(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(ask_with_one_signalled_rank, 2) == [(False, True)] * 2


def test_a_file_stops_all_once(run_ranks: Callable[..., Any], tmp_path: Path) -> None:
    assert run_ranks(ask_for_file, 2, tmp_path / "STOP") == [(False, True, StopReason.FILE)] * 2
    assert not (tmp_path / "STOP").exists()


def test_all_ranks_stop_for_the_same_reason(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(ask_late_and_signalled, 2) == [StopReason.SIGNAL] * 2


def test_start_up_time_counts_from_the_process_once(monkeypatch: Any, capsys: Any) -> None:
    """A later run of the same process, as in a notebook, counts from its own start."""
    monkeypatch.setattr(StartUpTime, "_runs", 0)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 1000.0)
    monkeypatch.setattr(time, "time", lambda: 1100.0)
    first, second = StartUpTime(), StartUpTime()
    monkeypatch.setattr(time, "time", lambda: 1120.0)
    for callback in (first, first, second):
        callback.on_train_batch_end(SimpleNamespace(is_global_zero=True))
    assert capsys.readouterr().out.split("\n") == ["First step after 120 s", "First step after 20 s", ""]
