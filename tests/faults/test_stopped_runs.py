"""Training that is told to stop: with which exit code, with which checkpoint, and what it leaves behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from nemo_kto.runtime.checkpoint_folders import newest_whole
from tests.faults.commands import TP2, Command, training
from tests.integration.assets import read_series

BACKGROUND = {"exp_manager__checkpoint_callback_params__async_save": True}
WORKERS = {"model__data__num_workers": 2}


def last_of(log_dir: Path) -> str | None:
    newest, damaged = newest_whole(log_dir / "checkpoints", checksums=True)
    assert not damaged
    return None if newest is None else newest.name


@pytest.mark.parametrize(
    ("number", "moment", "changes", "stops_at"),
    [
        (signal.SIGTERM, "step 4", WORKERS, 5),
        pytest.param(signal.SIGINT, "step 4", TP2 | WORKERS, 5, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "save", TP2, 4, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "save", TP2 | BACKGROUND, 4, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "save", TP2 | BACKGROUND | WORKERS, 4, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_whole_group(
    root: Path, tmp_path: Path, number: signal.Signals, moment: str, changes: dict[str, Any], stops_at: int
) -> None:
    """The step is finished, and the checkpoint whole; a save that is under way, in processes of its own, too."""
    command = Command(tmp_path, training(root, tmp_path / "log", **changes), pause=moment)
    command.send_all(number)
    command.go_on()
    code, output, errors = command.end()
    name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    assert code == 75
    assert f"Stopped at step {stops_at} of 10 ({name}); run the same command to continue." in output
    assert errors.count(f"{name} received: the run stops after this step, with a checkpoint.") == 1
    assert "Error" not in errors and "error" not in errors
    assert last_of(tmp_path / "log") == f"megatron_gpt-step={stops_at}-last"
    assert set(read_series(tmp_path / "log")["train/loss"]) == set(range(stops_at))
    assert not (tmp_path / "log" / "lock").exists()


@pytest.mark.slow
def test_a_signal_to_one_rank_only(root: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, training(root, tmp_path / "log", **TP2), pause="step 4")
    os.kill(command.rank(1), signal.SIGTERM)
    command.go_on()
    code, output, _ = command.end()
    assert code == 75 and "Stopped at step 5 of 10 (another rank was told to)" in output
    assert last_of(tmp_path / "log") == "megatron_gpt-step=5-last"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_ranks_at_once(root: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, training(root, tmp_path / "log", **TP2), pause="step 4")
    while command.process.poll() is None:  # again and again, as people do; the first two seconds are one
        command.send_all(signal.SIGINT)
    code, output, errors = command.end()
    assert code == 130 and "Stopped at step" not in output
    assert errors.count("Stopped at once by the second Ctrl-C") == 1 and "Traceback" not in errors
    assert last_of(tmp_path / "log") == "megatron_gpt-step=3-last"


@pytest.mark.parametrize(
    "moment",
    ["import", pytest.param("load", marks=pytest.mark.slow), pytest.param("load of 1", marks=pytest.mark.slow)],
)
def test_before_training_it_ends_at_once(root: Path, tmp_path: Path, moment: str) -> None:
    command = Command(tmp_path, training(root, tmp_path / "log", **TP2), pause=moment)
    command.send_all(signal.SIGTERM)
    code, _, errors = command.end()
    assert code == 75
    assert errors.splitlines() == ["Stopped by SIGTERM; run the same command to continue."]


def test_a_stop_file_is_obeyed_once(root: Path, tmp_path: Path) -> None:
    """And the run goes on where it was, when it is run again; here up to a time that is over at once."""
    log_dir = tmp_path / "log"
    command = Command(tmp_path / "first", training(root, log_dir), pause="step 4")
    (log_dir / "STOP").touch()
    command.go_on()
    code, output, _ = command.end()
    assert code == 75
    assert f"Stopped at step 5 of 10 ({log_dir / 'STOP'})" in output
    assert f"{log_dir / 'STOP'} has been obeyed and is removed." in output
    assert not (log_dir / "STOP").exists()
    over = {"exp_manager__max_time_per_run": "00:00:00:00"}
    code, output, _ = Command(tmp_path / "second", training(root, log_dir, **over)).end()
    assert code == 75
    assert "Stopped after 5 of 10 steps (exp_manager.max_time_per_run); run the same command" in output
    assert last_of(log_dir) == "megatron_gpt-step=5-last"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step 4", "save"])
def test_a_killed_rank_leaves_nothing_behind(root: Path, tmp_path: Path, moment: str) -> None:
    """No process, no temporary folder; and the others say which it was."""
    log_dir = tmp_path / "log"
    changes = TP2 | WORKERS | (BACKGROUND if moment == "save" else {})
    command = Command(tmp_path / "first", training(root, log_dir, **changes), pause=moment)
    killed = command.rank(1)
    os.kill(killed, signal.SIGKILL)
    code, _, errors = command.end()
    assert code == 1
    (line,) = errors.splitlines()
    assert line.startswith(f"error: Rank 1 (process {killed} on ") and " was killed by SIGKILL " in line
    assert not (log_dir / "lock").exists()


@pytest.mark.slow
def test_a_killed_rank_0_leaves_nothing_that_the_next_run_does_not_remove(root: Path, tmp_path: Path) -> None:
    log_dir = tmp_path / "log"
    command = Command(tmp_path / "first", training(root, log_dir, **TP2 | WORKERS), pause="step 4")
    os.kill(command.process.pid, signal.SIGKILL)
    code, _, errors = command.end()
    assert code == -signal.SIGKILL
    (line,) = errors.splitlines()
    assert line.startswith(f"error: Rank 0 (process {command.process.pid} on ") and " after step 4." in line
    code, output, errors = Command(tmp_path / "second", training(root, log_dir, **TP2)).end()
    assert code == 0, errors
    assert f"(process {command.process.pid} on " in output + errors and "this one goes on there" in output + errors
    assert not list(log_dir.glob("lock*"))


def test_a_second_run_in_the_folder_is_refused(root: Path, tmp_path: Path) -> None:
    log_dir = tmp_path / "log"
    first = Command(tmp_path / "first", training(root, log_dir), pause="step 4")
    code, _, errors = Command(tmp_path / "second", training(root, log_dir)).end()
    assert code == 1
    assert f"error: Another run (process {first.process.pid} on " in errors and f"is writing to {log_dir}" in errors
    first.go_on()
    assert first.end()[0] == 0
