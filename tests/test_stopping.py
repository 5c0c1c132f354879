"""How a process ends when it is told to. Of training: tests/faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG, wait_until

ROOT = Path(__file__).resolve().parents[1]

COMMAND = """
import signal, sys
from nemo_kto import stopping
from nemo_kto.errors import run_guarded
stopping.take_signals()
"""

WAITS = """
def wait():
    print("ready", flush=True)
    while True:
        signal.pause()

"""


def default_signals() -> None:
    """Undo what a shell does to the signals of processes in its background."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def start(program: str, **variables: str) -> subprocess.Popen[str]:
    """Start a program and return once it has said that it is ready."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPATH": str(ROOT), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    assert process.stdout is not None
    # byte by byte: what `readline` takes of the lines behind it would be lost to `communicate`
    said = b""
    while not said.endswith(b"\n") and (byte := os.read(process.stdout.fileno(), 1)):
        said += byte
    assert said == b"ready\n"
    return process


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code, output and errors."""
    output, errors = process.communicate(timeout=HANG)
    return process.returncode, output, errors


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_with_nothing_to_be_finished_a_command_ends_at_once(number: signal.Signals, name: str) -> None:
    process = start(COMMAND + WAITS + "run_guarded(wait)")
    process.send_signal(number)
    assert end_of(process) == (75, "", f"Stopped by {name}; run the same command to continue.\n")


def test_another_rank_says_nothing() -> None:
    process = start(COMMAND + WAITS + "run_guarded(wait)", LOCAL_RANK="1")
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (75, "", "")


def test_what_is_open_is_closed_on_the_way_out() -> None:
    closing = (
        "def act():\n    try:\n        wait()\n    finally:\n        print('closed', flush=True)\nrun_guarded(act)"
    )
    process = start(COMMAND + WAITS + closing)
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[:2] == (75, "closed\n")


def test_a_main_thread_that_is_lost_in_a_library_is_not_waited_for() -> None:
    """No signal gets it out of a mutex, and Python's handlers run in the main thread only."""
    lost = """
import ctypes
stopping._GRACE = 0
mutex = ctypes.create_string_buffer(64)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
print("ready", flush=True)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
    process = start(COMMAND + lost)
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (75, "", "Stopped by SIGTERM; run the same command to continue.\n")


FINISHES = """
import select
stopping.finish_first("after this step")
print("ready", flush=True)
while not stopping.requested():
    select.select([], [], [], 0.01)
print(stopping.requested(), flush=True)
"""


def test_what_is_under_way_is_finished() -> None:
    process = start(COMMAND + FINISHES)
    process.send_signal(signal.SIGTERM)
    code, output, errors = end_of(process)
    assert (code, output) == (0, "SIGTERM\n")
    assert errors == "SIGTERM received: the run stops after this step. Ctrl-C twice stops it at once.\n"


def test_a_second_ctrl_c_ends_everything() -> None:
    process = start(COMMAND + "stopping._AGAIN = 0\n" + FINISHES + WAITS + "wait()")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "Ctrl-C\n"
    process.send_signal(signal.SIGINT)
    code, _, errors = end_of(process)
    assert code == 130
    assert errors.splitlines() == [
        "Ctrl-C received: the run stops after this step. Ctrl-C again stops it at once.",
        "Stopped at once by the second Ctrl-C: what was done since the last checkpoint is lost.",
    ]


def test_the_same_ctrl_c_sent_twice_is_one() -> None:
    """As by `timeout`, to the process and to its group."""
    process = start(COMMAND + f"stopping._AGAIN = {HANG}\n" + FINISHES + WAITS + "wait()")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["Ctrl-C\n", "ready\n"]
    process.send_signal(signal.SIGINT)
    assert process.poll() is None
    process.kill()
    assert "second" not in end_of(process)[2]


def test_what_is_ignored_stays_ignored() -> None:
    """As Ctrl-C is in the background of a shell."""
    ignoring = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    process = start(ignoring + COMMAND + WAITS + "run_guarded(wait)")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[2].startswith("Stopped by SIGTERM")


def test_a_forked_process_behaves_as_any_other() -> None:
    """A pool of a library ends its processes by SIGTERM: they have to die, and the run has to go on."""
    forks = """
import multiprocessing
stopping.finish_first("after this step")
print("ready", flush=True)
process = multiprocessing.get_context("fork").Process(target=signal.pause)
process.start()
process.terminate()
process.join()
print(process.exitcode, stopping.requested(), flush=True)
"""
    assert end_of(start(COMMAND + forks)) == (0, "-15 None\n", "")


def test_signals_are_kept_for_a_process_until_it_takes_them() -> None:
    """Between its start and its first line it would die of them."""
    child = (
        "print('started', flush=True); sys.stdin.readline(); " + "stopping.take_signals(); run_guarded(signal.pause)"
    )
    starts = f"""
import subprocess
with stopping.held_back():
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal, sys\\nfrom nemo_kto import stopping\\n"
         "from nemo_kto.errors import run_guarded\\n" {child!r}],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
assert child.stdout.readline() == "started\\n"
child.terminate()
print("ready", flush=True)
child.stdin.write("go\\n")
child.stdin.close()
print(child.wait(), flush=True)
"""
    code, output, errors = end_of(start(COMMAND + starts))
    assert (code, output) == (0, "75\n"), errors


def test_a_program_of_its_own_gets_its_signals_back() -> None:
    """And while it trains a second Ctrl-C is the KeyboardInterrupt that it knows."""
    program = """
import select, signal
from nemo_kto import stopping
stopping._AGAIN = 0
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
stopping.finish_first("after this step")
print("ready", flush=True)
try:
    while not stopping.requested():
        select.select([], [], [], 0.01)
    print(stopping.requested(), flush=True)
    signal.pause()
except KeyboardInterrupt:
    print("interrupted", flush=True)
stopping.give_back()
print(before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)), flush=True)
"""
    process = start(program)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "Ctrl-C\n"
    process.send_signal(signal.SIGINT)
    assert end_of(process)[:2] == (0, "interrupted\nTrue\n")


def test_a_rank_ends_with_the_process_that_has_started_it() -> None:
    starts = """
import os, subprocess
child = subprocess.Popen(
    [sys.executable, "-c", "import signal; from nemo_kto import stopping; stopping.take_signals(); "
     "print(signal.SIGTERM, flush=True); signal.pause()"],
    env={**os.environ, stopping.PARENT_VARIABLE: str(os.getpid())}, stdout=subprocess.PIPE,
)
child.stdout.readline()
print("ready", flush=True)
print(child.pid, flush=True)
signal.pause()
"""
    process = start(COMMAND + starts)
    assert process.stdout is not None
    child = Path(f"/proc/{int(process.stdout.readline())}/stat")
    process.kill()
    process.wait(HANG)

    def gone() -> bool:
        try:
            return child.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until(gone)


def test_other_commands_end_with_one_line() -> None:
    process = start("import signal\nfrom nemo_kto.errors import run_guarded\n" + WAITS + "run_guarded(wait)")
    process.send_signal(signal.SIGINT)
    assert end_of(process) == (130, "", "Interrupted.\n")
