"""Real commands, all of whose ranks are forked from a process that has imported everything: cheap enough for hundreds.

What differs from a command in a shell is who starts the ranks, as with torchrun, and that imports are over.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from nemo_kto.runtime.processes import _look_at
from tests.distributed_harness import free_port
from tests.faults.forked_ranks import QUIET, _context
from tests.waiting import HANG, wait_until

LEFT_OVER = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_NAME"),
)
"""Variables of launchers, which no command inherits from a test."""


class ForkedCommand:
    """A command on so many ranks, each the leader of a session of its own.

    Args:
        arguments: Its command line: `["train", "KEY=VALUE" ...]` or what follows `nemo-kto`.
        folder: Where `output 0.txt` and `errors 0.txt` of rank 0 are written to, and so on.
        ranks: How many there are.
        **variables: Of its environment.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, *, ranks: int = 1, **variables: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ranks: list[Any] = []
        if ranks > 1:
            variables = {
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
            } | variables
        for rank in range(ranks):
            own = {"LOCAL_RANK": str(rank), **variables} if ranks > 1 else variables
            if "TORCHELASTIC_RUN_ID" in own:
                own = {"RANK": str(rank), **own}  # as torchrun
            self.ranks.append(_context().Process(target=_run, args=(list(arguments), folder, rank, own)))
            with mock.patch.dict(os.environ, QUIET):  # of the process that forks them, which is started now
                self.ranks[-1].start()

    def processes(self) -> list[int]:
        """Return the processes of all ranks that are still there: themselves, and their helpers."""
        leaders = {rank.pid for rank in self.ranks}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            try:
                state = _look_at(pid) if os.getsid(pid) in leaders else None
            except ProcessLookupError:
                continue
            if state is not None and state[0] not in ("Z", "X"):
                found.append(pid)
        return sorted(found)

    def computed(self) -> int:
        """Return for how many ticks of their clock all of them have computed so far."""
        ticks = 0
        for pid in self.processes():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            ticks += sum(map(int, fields[11:15]))
        return ticks

    def ended(self) -> bool:
        """Return whether all ranks have ended."""
        return all(rank.exitcode is not None for rank in self.ranks)

    def kill(self) -> None:
        """Kill all that is left of it."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def end(self) -> list[tuple[int, str, str]]:
        """Return exit code, output and errors of each rank, once all have ended, and with them all that they began."""
        try:
            for rank in self.ranks:
                rank.join(HANG)
                assert rank.exitcode is not None, f"rank {rank} hangs"
            wait_until(lambda: not self.processes())
        finally:
            self.kill()
        return [
            (process.exitcode, *((self.folder / f"{kind} {rank}.txt").read_text() for kind in ("output", "errors")))
            for rank, process in enumerate(self.ranks)
        ]


def _run(arguments: list[str], folder: Path, rank: int, variables: dict[str, str]) -> None:
    from nemo_kto import errors, stopping
    from nemo_kto.cli import main, run_script

    os.setsid()
    for number, kind in ((1, "output"), (2, "errors")):
        os.dup2(os.open(folder / f"{kind} {rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name in LEFT_OVER:
        os.environ.pop(name, None)
    os.environ.update(variables)
    errors._PARENT = os.getppid()
    sys.argv = ["nemo-kto", *arguments]
    code: Any = 0
    try:
        if arguments[:1] in (["train"], ["evaluate"]):  # the scripts of examples/
            stopping.take_signals()
            run_script(arguments[0], arguments[1:])
        else:
            main()
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
