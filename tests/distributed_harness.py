"""Runs a function on several real ranks: processes that stay up between tests, with process groups for each job.

Importing torch and Megatron takes a process several seconds, so workers are kept; a pool whose job failed or ran out
of time is ended (only its own processes, by handle) and replaced by a fresh one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

DEFAULT_TIMEOUT = 180.0


class RankFailure(AssertionError):
    """A rank raised; the message holds its traceback."""


class RankPool:
    """`world_size` worker processes that run one job after another."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.world_size = world_size
        self._pipes = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, theirs), daemon=False
            )  # Megatron saves through a process of its own
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> list[Any]:
        """Return what `function(*arguments)` returned on each rank; raise the first rank's failure."""
        with tempfile.TemporaryDirectory() as rendezvous:
            for pipe in self._pipes:
                pipe.send((function, arguments, str(Path(rendezvous) / "store"), timeout))
            results, failures = [], []
            for rank, pipe in enumerate(self._pipes):
                # once a rank has failed the others hang in their next collective: do not wait for them
                if not pipe.poll(timeout if not failures else 2.0):
                    failures.append(f"rank {rank} did not answer within {timeout:.0f} s")
                    continue
                try:
                    succeeded, value = pipe.recv()
                except EOFError:
                    succeeded, value = False, f"rank {rank} died"
                (results if succeeded else failures).append(value)
        if failures:
            self.close()
            raise RankFailure("\n".join(failures))
        return results

    def close(self) -> None:
        """End the workers and the processes they started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):  # not there any more, or too young to lead a group
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process in self._processes:
            process.join()


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(rank: int, world_size: int, pipe: Any) -> None:
    os.setsid()  # Megatron's checkpoint writer starts processes that do not notice when this one is killed
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, store, timeout = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, _run_job(rank, world_size, function, arguments, store, timeout)))
        except BaseException:
            pipe.send((False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}"))


def _run_job(
    rank: int, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...], store: str, timeout: float
) -> Any:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    try:
        return function(*arguments)
    finally:
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
