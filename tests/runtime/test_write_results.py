"""What forked writers tell their rank, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_kto.runtime import megatron_fixes
from nemo_kto.runtime.disk import reason_of
from nemo_kto.runtime.write_results import WriteResults, become_helper
from tests.waiting import HANG

FORK = multiprocessing.get_context("fork")


def test_messages_of_this_process_and_of_forked_ones() -> None:
    results = WriteResults()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    results.put("here")
    assert results.get_nowait() == "here"
    large = {f"file {number}": list(range(100)) for number in range(2000)}  # more than a pipe holds
    child = FORK.Process(target=results.put, args=(large,))
    child.start()
    child.join(HANG)
    assert results.get_nowait() == large
    results.put("short")  # nothing is left of what was longer
    assert results.get_nowait() == "short"
    with pytest.raises(queue.Empty):
        results.get_nowait()


def answer(connection: Connection, parent: int) -> None:
    become_helper(parent)
    connection.send(os.getpid())
    while True:
        connection.send(connection.recv())


def rank(connection: Connection) -> None:
    child = FORK.Process(target=answer, args=(connection, os.getpid()))
    child.start()
    child.join()


def test_a_helper_outlives_signals_to_the_group_and_ends_with_its_parent() -> None:
    ours, theirs = FORK.Pipe()
    parent = FORK.Process(target=rank, args=(theirs,))
    parent.start()
    assert parent.pid is not None and ours.poll(HANG)
    helper = psutil.Process(ours.recv())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        helper.send_signal(number)
        ours.send(number)
        assert ours.poll(HANG) and ours.recv() == number  # it still answers
    os.kill(parent.pid, signal.SIGKILL)
    parent.join(HANG)
    gone, alive = psutil.wait_procs([helper], timeout=HANG)
    for process in alive:
        process.kill()
    assert gone == [helper]


def test_a_helper_whose_parent_is_gone_already_ends() -> None:
    child = FORK.Process(target=become_helper, args=(os.getpid() + 1,))  # of another process
    child.start()
    child.join(HANG)
    assert child.exitcode == 1


def write_or_die(_: list[Any], number: int, bucket: str, answer: WriteResults, *__: Any) -> None:
    if bucket.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, bucket))
    if bucket == "leaves":
        os._exit(3)
    if bucket == "fails":
        answer.put((number, OSError(28, "No space left on device")))
    else:
        answer.put((number, [f"{bucket} written"]))


@pytest.mark.parametrize(
    ("buckets", "found"),
    [
        (["a", "b"], {0: ["a written"], 1: ["b written"]}),
        (["a", "SIGKILL"], "was ended by SIGKILL, as the system does when memory runs out"),
        (["SIGSEGV", "a"], "was ended by SIGSEGV"),
        (["leaves", "a"], "was ended with exit code 3"),
        (["fails", "a"], "no space is left on its file system"),
    ],
)
def test_a_process_that_writes_and_is_killed_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, buckets: list[str], found: Any
) -> None:
    monkeypatch.setattr(megatron_fixes, "_write_preloaded_data", write_or_die)
    results = WriteResults()
    megatron_fixes._write_parts([], False, 0, buckets, results)
    answer = results.get_nowait()
    if isinstance(found, dict):
        assert answer == found
    else:
        assert reason_of(answer, tmp_path).endswith(found)
