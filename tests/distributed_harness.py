"""Runs a function on several real ranks: processes forked, for each job, from one that has imported everything.

Importing torch, Megatron and NeMo takes a process several seconds; forking none. What a job leaves behind (threads of
its process groups, patches, processes of the checkpoint writer) ends with its processes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

DEFAULT_TIMEOUT = 180.0
_STARTING = 120.0
"""Seconds the imports may take."""


class RankFailure(AssertionError):
    """A rank raised; the message holds its traceback."""


class RankServer:
    """The process the ranks are forked from; it starts none until asked."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def run(self, function: Callable[..., Any], world_size: int, arguments: tuple[Any, ...], timeout: float) -> Any:
        """Return what `function(*arguments)` returned on each rank; raise if one failed or took too long."""
        self._pipe.send((function, world_size, arguments, timeout))
        if not self._pipe.poll(timeout + _STARTING):
            raise RankFailure(f"no answer within {timeout + _STARTING:.0f} s")
        results, failures = self._pipe.recv()
        if failures:
            raise RankFailure("\n".join(failures))
        return results

    def close(self) -> None:
        """End the process: it leaves when its pipe is closed."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    import nemo_kto.commands.train  # noqa: F401  everything a rank needs

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(_run_ranks(*job))


def _run_ranks(
    function: Callable[..., Any], world_size: int, arguments: tuple[Any, ...], timeout: float
) -> tuple[list[Any], list[str]]:
    """Return (results by rank, failures)."""
    context = multiprocessing.get_context("fork")
    ranks = []
    results, failures = [], []
    with tempfile.TemporaryDirectory() as rendezvous:
        store = str(Path(rendezvous) / "store")
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(theirs, rank, world_size, function, arguments, store, timeout)
            )
            process.start()
            theirs.close()
            ranks.append((process, ours))
        deadline = time.monotonic() + timeout
        for rank, (_, pipe) in enumerate(ranks):
            # once a rank has failed the others hang in their next collective: do not wait for them
            if not pipe.poll(max(0.0, deadline - time.monotonic()) if not failures else 2.0):
                failures.append(f"rank {rank} did not answer within {timeout:.0f} s")
                continue
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                succeeded, value = False, f"rank {rank} died"
            (results if succeeded else failures).append(value)
        for process, pipe in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            pipe.close()
    return results, failures


def _run_rank(
    pipe: Connection,
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    store: str,
    timeout: float,
) -> None:
    os.setsid()  # the leader of what it starts, which is ended with it
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}"))
    signal.pause()  # until it is ended: a rank that leaves early would break the others' last exchange
