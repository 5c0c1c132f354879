"""Processes that stand by: they go on when they are called up, and otherwise end with the first one, in any way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_kto.runtime import standby
from tests.waiting import HANG, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
# ranks leave a file with their pid, and those that go on one with what they were given
SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.append({repository!r})
from nemo_kto.runtime import standby
folder, number, action = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rank = os.environ.get("LOCAL_RANK", "0")
with standby.standing_by(number):
    partial = folder / f"pid-{{rank}}.partial"
    partial.write_text(str(os.getpid()))
    partial.rename(folder / f"pid-{{rank}}")
    standby.wait_until_called()
    if rank != "0":
        (folder / f"called-{{rank}}").write_text(f"{{os.environ['LOCAL_RANK']}} {{os.environ.get('GIVEN')}} "
                                                 f"{{os.environ.get('LEFT_OUT')}}")
        sys.exit(7)
    while len(list(folder.glob("pid-?"))) < number:
        pass
    if action == "call":
        given = {{rank: {{"LOCAL_RANK": str(rank), "GIVEN": f"g{{rank}}"}} for rank in range(1, number)}}
        called = standby.call_up(given)
        print([process.wait() for process in called], standby.call_up(given))
    elif action == "raise":
        raise ValueError("on purpose")
    elif action == "exit":
        os._exit(3)
    elif action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def run(folder: Path, number: int, action: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(repository=str(REPOSITORY)))
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "SLURM_PROCID")}
    return subprocess.run(
        [sys.executable, str(script), str(folder), str(number), action],
        env={**clean, "LEFT_OUT": "yes", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )


def test_called_up_they_go_on_in_the_environment_they_are_given(tmp_path: Path) -> None:
    done = run(tmp_path, 3, "call")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[7, 7] None\n", "")
    assert (tmp_path / "called-1").read_text() == "1 g1 None"
    assert (tmp_path / "called-2").read_text() == "2 g2 None"


@pytest.mark.parametrize(
    ("action", "code"), [("return", 0), ("raise", 1), ("exit", 3), ("kill", -signal.SIGKILL)], ids=lambda value: value
)
def test_not_called_up_they_end(tmp_path: Path, action: str, code: int) -> None:
    done = run(tmp_path, 3, action)  # returns when nobody holds its output any more
    assert done.returncode == code
    for rank in (1, 2):
        pid = int((tmp_path / f"pid-{rank}").read_text())
        sleeper = subprocess.Popen(["sleep", "infinity"], text=True)
        try:
            wait_until(lambda pid=pid: is_gone(pid), process=sleeper)  # type: ignore[misc]
        finally:
            sleeper.kill()
            sleeper.wait()
    assert not list(tmp_path.glob("called-*"))


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_where_somebody_else_starts_processes_none_stand_by(tmp_path: Path, name: str) -> None:
    done = run(tmp_path, 1, "return", **{name: "0"})
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.glob("pid-*")] == ["pid-0"]


@pytest.fixture
def waiting() -> Iterator[dict[int, standby._Waiting]]:
    yield standby._waiting
    standby._dismiss()


@pytest.mark.parametrize("wanted", [(1,), (1, 2, 3)])
def test_all_or_none_are_called_up(
    waiting: dict[int, standby._Waiting], wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby, "_command", lambda: ["sleep", "infinity"])
    processes = [standby._start(rank) for rank in (1, 2)]
    waiting.update(enumerate(processes, start=1))
    assert standby.call_up({rank: {} for rank in wanted}) is None
    assert not waiting and all(one.process.returncode == -signal.SIGKILL for one in processes)


def test_one_that_has_ended_does_not_stand_by(
    waiting: dict[int, standby._Waiting], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby, "_command", lambda: ["true"])
    waiting[1] = standby._start(1)
    waiting[1].process.wait()
    assert standby.call_up({1: {}}) is None


def test_nobody_stands_by_unless_their_number_is_known() -> None:
    for number in (None, 1):
        with standby.standing_by(number):
            assert not standby._waiting
    standby.wait_until_called()  # the first process goes on
