"""What forked writers tell their rank, and how they end."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import queue
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import async_utils

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


def write(_: list[Any], number: int, bucket: str, answer: Any, *__: Any) -> None:
    if bucket == "fails":
        answer.put((number, OSError(28, "No space left on device")))
    else:
        answer.put((number, [f"{bucket} written by {os.getpid()}"]))


def test_files_are_written_without_forking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(megatron_fixes, "_write_preloaded_data", write)
    results = WriteResults()
    megatron_fixes._write_parts([], False, 0, ["a", "b"], results)
    assert results.get_nowait() == {number: [f"{name} written by {os.getpid()}"] for number, name in enumerate("ab")}
    megatron_fixes._write_parts([], False, 0, ["a", "fails"], results)
    assert reason_of(results.get_nowait(), tmp_path).endswith("no space is left on its file system")


def end(how: str, results: WriteResults) -> None:
    faulthandler.disable()  # its report of a crash would be read as one of the tests
    if how == "written":
        results.put({0: ["all"]})
    if how == "leaves":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, "SIGKILL" if how == "written" else how))


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("SIGKILL", "was ended by SIGKILL, as the system does when memory runs out"),
        ("SIGSEGV", "was ended by SIGSEGV"),
        ("leaves", "was ended with exit code 3"),
        ("written", {0: ["all"]}),
    ],
)
def test_a_process_that_writes_in_the_background_and_is_killed_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, found: Any
) -> None:
    """Megatron's caller, as it is left when the process of a save has ended."""
    megatron_fixes.write_without_manager()
    results = WriteResults()
    monkeypatch.setattr(megatron_fixes, "_write_results", lambda: results)
    caller = async_utils.TemporalAsyncCaller()
    caller.process, caller.start_time = FORK.Process(target=end, args=(how, results)), 0.0
    caller.process.start()
    monkeypatch.setattr(dist, "get_rank", lambda: 0)  # for what Megatron logs
    caller.close()
    answer = results.get_nowait()
    assert answer == found if isinstance(found, dict) else reason_of(answer, tmp_path).endswith(found)
    with pytest.raises(queue.Empty):
        results.get_nowait()
