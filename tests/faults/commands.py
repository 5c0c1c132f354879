"""Commands whose processes are signalled, alone or together, at moments that a test chooses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_kto.runtime.processes import _look_at
from tests.integration.assets import settings
from tests.waiting import HANG, wait_until

PAUSED = Path(__file__).with_name("paused_run.py")
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR", "TORCHELASTIC_RUN_ID")
TP2 = {"trainer__devices": 2, "model__tensor_model_parallel_size": 2}
SAVING = {"exp_manager__create_checkpoint_callback": True, "trainer__kto__save_interval": 3}


def default_signals() -> None:
    """Undo what a shell does to the signals of processes in its background."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Command:
    """A command in a session of its own, which waits at a moment, see `paused_run.py`.

    Args:
        folder: Where it makes `paused`, and where `TMPDIR` is.
        arguments: Its command line.
        pause: The moment; empty for none.
        **variables: Of its environment.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], *, pause: str = "", **variables: str) -> None:
        self.folder = folder
        (folder / "temporary").mkdir(parents=True)
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
        self.process = subprocess.Popen(
            arguments,
            env={
                **environment,
                "OMP_NUM_THREADS": "1",
                "TMPDIR": str(folder / "temporary"),
                "PAUSE": pause,
                "PAUSE_FOLDER": str(folder),
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=default_signals,
        )
        if pause:
            wait_until((folder / "paused").exists, process=self.process)

    def send_all(self, number: signal.Signals) -> None:
        """Send a signal to the process and to all that it has started, as Slurm and a terminal do."""
        os.killpg(self.process.pid, number)

    @property
    def paused(self) -> int:
        """The process that waits."""
        return int((self.folder / "paused").read_text())

    def rank(self, number: int) -> int:
        """Return the process of another rank of this command."""
        for pid in self._session():
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            if f"LOCAL_RANK={number}".encode() in variables and PAUSED.name.encode() in command:
                if int(parent) == self.process.pid:
                    return pid
        raise AssertionError(f"there is no rank {number}")

    def go_on(self) -> None:
        """Let what waits go on."""
        (self.folder / "go").touch()

    def end(self) -> tuple[int, str, str]:
        """Return exit code, output and errors; nothing of it is left by then, neither processes nor files."""
        try:
            output, errors = self.process.communicate(timeout=HANG)
        except BaseException:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        print(output, errors)
        wait_until(lambda: not self._session())
        left = [str(path) for path in (self.folder / "temporary").rglob("*")]
        assert not left, left
        return self.process.returncode, output, errors

    def _session(self) -> list[int]:
        """Return the processes of the session that have not ended."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                alive = os.getsid(int(folder.name)) == self.process.pid and _look_at(int(folder.name))
            except ProcessLookupError:
                continue
            if alive and alive[0] not in ("Z", "X"):
                found.append(int(folder.name))
        return found


def training(root: Path, log_dir: Path, *, script: Path = PAUSED, **changes: Any) -> list[str]:
    """Return the command line of a training run."""
    values = settings(root, log_dir, **{**SAVING, **changes})
    return [sys.executable, str(script), *(f"{key}={json.dumps(value)}" for key, value in values.items())]
