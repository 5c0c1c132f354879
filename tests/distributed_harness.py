"""Runs a function on several real ranks: processes forked, for each job, from one that has imported everything.

Importing torch, Megatron and NeMo takes a process several seconds; forking none. What a job leaves behind (threads of
its process groups, patches, processes of the checkpoint writer) ends with its processes.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.waiting import HANG

_GRACE = 10.0
"""Seconds without an answer from any rank, once one has failed, after which the others count as hanging.

That the job has failed is known by then: only how many tracebacks its message holds depends on it.
"""

Rank = tuple[Any, Connection]
"""A rank's process, and the pipe that its answer comes from."""


class RankFailure(AssertionError):
    """A rank raised; the message holds its traceback."""


def heard(level: int = logging.NOTSET, *, logger: str = "nemo_kto") -> list[str]:
    """Return the list that everything goes to which the log says from now on, on this rank; for a job of its own."""
    said: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(logger).addHandler(handler)
    return said


class RankServer:
    """The process the ranks are forked from; it starts none until asked.

    Args:
        prepare: Called there before torch is imported; a top-level function of a file that does not import it.
        backend: Of the ranks' default group.
    """

    def __init__(self, prepare: Callable[[], None] | None = None, *, backend: str = "gloo") -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, prepare, backend))
        self._process.start()
        theirs.close()

    def run(self, function: Callable[..., Any], world_size: int, arguments: tuple[Any, ...]) -> list[Any]:
        """Return what `function(*arguments)` returned on each rank; raise if one failed or hangs."""
        self._pipe.send((function, world_size, arguments))
        # twice, as it has to import everything first and then notices itself which rank hangs; and its end is watched
        # too, as its ranks would keep a dead one's pipe open
        if not wait([self._pipe, self._process.sentinel], 2 * HANG):
            raise RankFailure("the process that starts the ranks hangs")
        if not self._pipe.poll():
            raise RankFailure("the process that starts the ranks died")
        results, failures = self._pipe.recv()  # EOFError: it died, and wrote why to stderr
        if failures:
            raise RankFailure("\n".join(failures))
        return results

    def close(self) -> None:
        """End the process: it leaves when its pipe is closed."""
        self._pipe.close()
        self._process.join(HANG)
        self._process.kill()


def free_port() -> int:
    """Return a TCP port that is free now. No rank listens on it: they have met in a file when Lightning wants one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(pipe: Connection, prepare: Callable[[], None] | None, backend: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if prepare is not None:
        prepare()
    import torch

    import nemo_kto.commands.train  # noqa: F401  everything a rank needs

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(_run_ranks(backend, *job))


def _run_ranks(
    backend: str, function: Callable[..., Any], world_size: int, arguments: tuple[Any, ...]
) -> tuple[list[Any], list[str]]:
    """Return (results by rank, failures)."""
    context = multiprocessing.get_context("fork")
    ranks: list[Rank] = []
    try:
        with tempfile.TemporaryDirectory() as rendezvous:
            store = str(Path(rendezvous) / "store")
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run_rank, args=(theirs, rank, world_size, function, arguments, backend, store)
                )
                process.start()
                theirs.close()
                ranks.append((process, ours))
            return _answers(ranks)
    finally:
        for process, pipe in ranks:
            _end(process)
            process.join()
            pipe.close()


def _answers(ranks: Sequence[Rank]) -> tuple[list[Any], list[str]]:
    """Return (results by rank, failures in the order in which they came), whichever rank answers first."""
    results: dict[int, Any] = {}
    failures: list[str] = []
    silent = dict(enumerate(ranks))
    while silent:
        # once a rank has failed the others may hang in their next collective: do not wait long for them
        ready = wait([pipe for _, pipe in silent.values()], _GRACE if failures else HANG)
        if not ready:
            for rank, (process, _) in silent.items():
                failures.append(f"rank {rank} {'did not answer' if process.is_alive() else 'died'}")
            break
        for rank in [rank for rank, (_, pipe) in silent.items() if pipe in ready]:
            process, pipe = silent.pop(rank)
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                succeeded, value = False, f"rank {rank} died"
            if succeeded:
                results[rank] = value
            else:
                failures.append(value)
                _end(process)  # most of those that wait for it notice, and say where they were
    return [results[rank] for rank in sorted(results)], failures


def _end(process: Any) -> None:
    """Kill a rank and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # one that has not come to lead a group yet


def _run_rank(
    pipe: Connection,
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    backend: str,
    store: str,
) -> None:
    os.setsid()  # the leader of what it starts, which is ended with it
    import torch.distributed as dist

    try:
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=HANG)
        )
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}"))
    signal.pause()  # until it is ended: a rank that leaves early would break the others' last exchange
