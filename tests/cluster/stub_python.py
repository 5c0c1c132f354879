"""Stands for the command in a batch script: it notes how it was called, and does what a test wants in each attempt.

The line of the file `plan` that belongs to the attempt says it: `exit 75`, `kill 9`, or `wait`, for a signal, which is
answered as the command answers it.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nemo_kto.errors import run_guarded
from nemo_kto.stopping import take_signals


def main() -> None:
    """Do it."""
    folder = Path(os.environ["STUB_FOLDER"])
    attempt, task = int(os.environ.get("SLURM_RESTART_COUNT", 0)), os.environ.get("SLURM_ARRAY_TASK_ID", "0")
    plan = (folder / "plan").read_text().splitlines()
    print(f"attempt {attempt} of task {task} on {os.environ['SLURMD_NODENAME']}: {plan[attempt]}", flush=True)
    if os.environ["SLURM_PROCID"] == "0":
        keys = folder / f"keys-{task}-{attempt}"
        keys.with_suffix(".partial").write_text("\n".join(sys.argv[1:]))
        keys.with_suffix(".partial").rename(keys)
    what, _, number = plan[attempt].partition(" ")
    if what == "exit":
        sys.exit(int(number))
    if what == "kill":
        os.kill(os.getpid(), int(number))
    signal.pause()


if __name__ == "__main__":
    take_signals()
    run_guarded(main)
