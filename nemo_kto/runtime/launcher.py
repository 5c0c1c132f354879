"""Processes that a rank starts: the other ranks of its machine, and those that load its batches."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from nemo_kto import stopping
from nemo_kto.runtime import meeting
from nemo_kto.runtime.launch import Launch, is_slurm_task, meeting_place
from nemo_kto.runtime.write_results import become_helper

_LOOK = 0.5

_FOR_THIS_RANK = 15.0
"""Seconds after the end of another rank in which this one should have said why and ended too."""

_FOR_THE_OTHERS = 60.0
"""Seconds after the end of this rank in which the others should have ended too."""


class RankLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine, as Lightning does, where nobody else has.

    The port where they meet is taken before. When one of them ends so does this process, with one sentence that says
    which, and none of them stays when this one ends, however it does.

    Args:
        timeout: For what the ranks ask of each other.
        *arguments: Lightning's.
    """

    def __init__(self, timeout: timedelta, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._timeout = timeout

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Start the others if need be, then call `function`."""
        environment: Any = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            if self.num_processes * self.num_nodes > 1 and environment.node_rank() == 0:
                port = int(os.environ.get("MASTER_PORT", 0))
                environment._main_port = meeting.open_store(port, timeout=self._timeout)
            self._call_children_scripts()
            if self.procs:
                stopping.end_together(self._kill)
                atexit.register(self._wait)
                threading.Thread(target=self._watch, name="other ranks", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _call_children_scripts(self) -> None:
        os.environ[stopping.PARENT_VARIABLE] = str(os.getpid())
        try:
            # they take the signals in their first line, but those of a program of its own
            with stopping.held_back() if stopping.are_taken() else contextlib.nullcontext():
                super()._call_children_scripts()
        finally:
            del os.environ[stopping.PARENT_VARIABLE]

    def exit_codes(self) -> dict[int, int]:
        """Return global rank -> exit code, of those that have ended."""
        codes = {rank: process.poll() for rank, process in self._started().items()}
        return {rank: code for rank, code in codes.items() if code is not None}

    def _started(self) -> dict[int, subprocess.Popen[bytes]]:
        """Return global rank -> process, of those that this one has started."""
        first = self.cluster_environment.node_rank() * self.num_processes
        return dict(enumerate(self.procs, start=first + 1))

    def _watch(self) -> None:
        """End this process some time after another one has ended with an error; it has usually done so itself."""
        while not (failed := {rank: code for rank, code in self.exit_codes().items() if code}):
            if len(self.exit_codes()) == len(self.procs):
                return
            time.sleep(_LOOK)
        rank, code = next(iter(failed.items()))
        if code == stopping.STOPPED_EARLY:
            if stopping.requested() is None and stopping.are_taken():
                os.kill(os.getpid(), signal.SIGTERM)  # only that process was told, and there is no run without it
            return
        time.sleep(_FOR_THIS_RANK)
        how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        stopping.say(f"error: Rank {rank} (process {self._started()[rank].pid} of this machine) was ended {how}.")
        stopping.leave(1)

    def _kill(self) -> None:
        for process in self.procs:
            process.kill()

    def _wait(self) -> None:
        """Wait until the others have ended too."""
        end = time.monotonic() + _FOR_THE_OTHERS
        for process in self.procs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0))
        self._kill()


class SlurmTasks(ClusterEnvironment):
    """How tasks that srun has started find each other.

    Lightning's class for Slurm compares the keys with what sbatch was given, not with what srun was, and requeues by
    saving inside a signal handler, which dead-locks with exchanges: the batch script requeues.

    Args:
        found: What Slurm has started.
    """

    def __init__(self, found: Launch) -> None:
        super().__init__()
        self._found = found

    @property
    def creates_processes_externally(self) -> bool:
        """Whether somebody else has started them all: yes."""
        return True

    @property
    def main_address(self) -> str:
        """Where rank 0 is."""
        return meeting_place()[0]

    @property
    def main_port(self) -> int:
        """Where rank 0 listens."""
        return meeting_place()[1]

    @staticmethod
    def detect() -> bool:
        """Return whether this process is such a task."""
        return is_slurm_task()

    def world_size(self) -> int:
        """Return the number of tasks."""
        assert self._found.world_size is not None
        return self._found.world_size

    def set_world_size(self, size: int) -> None:
        """Keep what Slurm says, which the keys were compared with."""

    def global_rank(self) -> int:
        """Return this task's rank."""
        return self._found.rank

    def set_global_rank(self, rank: int) -> None:
        """Keep what Slurm says."""

    def local_rank(self) -> int:
        """Return this task's rank on its node."""
        return self._found.local_rank

    def node_rank(self) -> int:
        """Return the number of this task's node."""
        return int(os.environ.get("SLURM_NODEID", 0))


class _HelperProcess(ForkProcess):
    """A process that is not stopped by what stops its rank, and ends with it."""

    def start(self) -> None:
        """Fork it; torch would have it die of SIGTERM, and the run of that, if it ever saw the signal."""
        with stopping.held_back():
            super().start()
        self._popen.terminate = self._popen.kill  # type: ignore[attr-defined]

    def run(self) -> None:
        """Run it."""
        parent = multiprocessing.parent_process()
        assert parent is not None and parent.pid is not None
        become_helper(parent.pid)
        super().run()


class HelperContext(ForkContext):
    """`multiprocessing`'s way to fork processes, for those that help a rank: give it to a DataLoader."""

    Process = _HelperProcess
