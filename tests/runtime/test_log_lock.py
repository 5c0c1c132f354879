"""One run at a time in a log folder, whatever becomes of the one before."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nemo_kto.errors import ConfigError
from nemo_kto.runtime import log_lock, processes
from nemo_kto.runtime.log_lock import log_folder_held
from nemo_kto.runtime.processes import ProcessName, this_process
from tests.waiting import HANG, wait_until

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
import signal, sys
from pathlib import Path
from nemo_kto.runtime.log_lock import log_folder_held
with log_folder_held(Path(sys.argv[1]), "the_key") as own:
    (own / "source").mkdir()
    (own / "source" / "config.json").touch()
    print("held", flush=True)
    signal.pause()
"""


def holder(log_dir: Path) -> subprocess.Popen[str]:
    """Return a process that holds the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(log_dir)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_it_comes_and_goes(tmp_path: Path) -> None:
    with log_folder_held(tmp_path / "new" / "log", "the_key") as own:
        assert own.is_dir() and own.parent == tmp_path / "new" / "log"
        found = json.loads((own / "owner.json").read_text())
        assert found["pid"] == os.getpid() and found["host"]
    assert list((tmp_path / "new" / "log").iterdir()) == []


def test_it_goes_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), log_folder_held(tmp_path, "the_key"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    first = holder(tmp_path)
    try:
        with (
            pytest.raises(ConfigError, match=rf"Another run \(process {first.pid} on .* is writing to {tmp_path}\."),
            log_folder_held(tmp_path, "the_key"),
        ):
            pass
        first.send_signal(signal.SIGSTOP)  # it may go on at any time
        with pytest.raises(ConfigError, match=f"process {first.pid} "), log_folder_held(tmp_path, "the_key"):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]
    finally:
        first.kill()
        first.wait(HANG)


def test_a_killed_one_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the lock nor what it had kept there, and it is said."""
    first = holder(tmp_path)
    first.kill()  # and not waited for: a zombie is dead, too
    wait_until(lambda: ProcessName(**_of(first.pid)).is_gone)
    with log_folder_held(tmp_path, "the_key") as own:
        assert [path.name for path in own.iterdir()] == ["owner.json"]
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == []
    assert f"(process {first.pid} on " in caplog.text and "is gone" in caplog.text
    first.wait(HANG)


def _of(pid: int) -> dict[str, object]:
    found = processes._look_at(pid)
    return {**dataclasses.asdict(this_process()), "pid": pid, "born": 0 if found is None else found[1]}


def test_a_number_that_is_used_again_is_another_process() -> None:
    this = this_process()
    assert not this.is_gone
    assert dataclasses.replace(this, born=this.born - 1).is_gone
    assert not dataclasses.replace(this, born=this.born - 1, machine="another").is_gone  # who knows


def lock_of_another_machine(log_dir: Path) -> Path:
    """Return a lock that is held elsewhere."""
    lock = log_dir / "lock"
    lock.mkdir(parents=True)
    name = {**dataclasses.asdict(this_process()), "host": "node7", "machine": "another", "lock": "theirs"}
    (lock / "owner.json").write_text(json.dumps(name))
    return lock


def test_one_elsewhere_that_is_silent_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_lock, "_SILENCE", 0.2)
    lock_of_another_machine(tmp_path)
    with log_folder_held(tmp_path, "the_key") as own:
        assert json.loads((own / "owner.json").read_text())["pid"] == os.getpid()
    assert "node7). Waiting up to" in caplog.text and "on node7) is gone" in caplog.text


def test_one_elsewhere_that_touches_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock may be what it likes."""
    monkeypatch.setattr(log_lock, "_SILENCE", HANG)
    lock = lock_of_another_machine(tmp_path)
    ended = threading.Event()

    def touch() -> None:
        moment = 1e9
        while not ended.wait(_LITTLE):
            moment += 1
            os.utime(lock / "owner.json", (moment, moment))

    monkeypatch.setattr(log_lock, "_LONG_AGO", float("inf"))
    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="on node7"), log_folder_held(tmp_path, "the_key"):
            pass
    finally:
        ended.set()
        thread.join()


_LITTLE = 0.05


def test_one_elsewhere_of_yesterday_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_lock, "_SILENCE", 10 * HANG)
    lock = lock_of_another_machine(tmp_path)
    before = (lock / "owner.json").stat().st_mtime - 86400
    os.utime(lock / "owner.json", (before, before))
    with log_folder_held(tmp_path, "the_key"):
        pass


def test_one_that_was_faster_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two find a dead run's lock; the second to act finds the first's in its place."""
    first = holder(tmp_path / "theirs")
    dead = holder(tmp_path / "log")
    dead.kill()
    dead.wait(HANG)
    take = log_lock._take_from_the_dead

    def take_late(lock: Path, *, now: float) -> None:
        judged = log_lock._holder(lock)
        monkeypatch.setattr(log_lock, "_holder", lambda path: found.pop(0) if found else holder_of(path))
        holder_of, found = log_lock_holder, [judged]
        lock.rename(tmp_path / "taken away")
        (tmp_path / "theirs" / "lock").rename(lock)
        take(lock, now=now)
        monkeypatch.undo()

    log_lock_holder = log_lock._holder
    monkeypatch.setattr(log_lock, "_take_from_the_dead", take_late)
    try:
        with pytest.raises(ConfigError, match=f"process {first.pid} "), log_folder_held(tmp_path / "log", "the_key"):
            pass
    finally:
        first.kill()
        first.wait(HANG)


def quick_holder(log_dir: Path) -> subprocess.Popen[str]:
    """Return a process that holds the lock and looks at it all the time."""
    program = "from nemo_kto.runtime import log_lock\nlog_lock._TOUCH = 0.05\n" + HOLD
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(log_dir)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_lock_that_is_taken_over_ends_its_run(tmp_path: Path) -> None:
    process = quick_holder(tmp_path / "log")
    with log_folder_held(tmp_path / "other", "the_key") as other:
        (tmp_path / "log").rename(tmp_path / "away")
        (tmp_path / "log").mkdir()
        other.rename(tmp_path / "log" / "lock")
        _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 1
    assert errors.startswith(f"error: Another run has taken over {tmp_path / 'log' / 'lock'}. This run ends")


def test_a_lock_that_was_lost_with_its_folder_is_made_anew(tmp_path: Path) -> None:
    log_dir = tmp_path / "log"
    process = quick_holder(log_dir)
    try:
        before = (log_dir / "lock" / "owner.json").read_text()
        log_dir.rename(tmp_path / "away")
        log_dir.mkdir()
        wait_until((log_dir / "lock" / "owner.json").exists, process=process)
        assert (log_dir / "lock" / "owner.json").read_text() != before
        with pytest.raises(ConfigError, match=f"process {process.pid} "), log_folder_held(log_dir, "the_key"):
            pass
    finally:
        process.kill()
        process.wait(HANG)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is in the way"), log_folder_held(tmp_path, "the_key"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="log cannot be written: .* name another place in the_key"),
        log_folder_held(tmp_path / "file" / "log", "the_key"),
    ):
        pass
