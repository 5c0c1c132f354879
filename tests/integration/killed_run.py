"""The training command, ended from within at a step of its own.

KILL_AFTER_STEPS, a number like 3.4, kills it with all its ranks so many steps after training began. TERMINATE_AT_STEP
sends it SIGTERM as the step of that index begins.
"""

import functools
import os
import signal
import sys
import threading
import time
from typing import Any

from lightning.pytorch import Callback

from nemo_kto.cli import run_script
from nemo_kto.commands import train as training


class KillAfterSteps(Callback):
    """Kills this session's processes a fraction of a step after a given number of steps."""

    def __init__(self, moment: float) -> None:
        self.whole, self.fraction = divmod(moment, 1.0)
        self.started = 0.0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Kill now, later in this step, or in the save after it, as far as its time can be told from the last one.

        At the latest as the next step begins: a busy machine may leave the timer waiting until the run is over.
        """
        last_step = time.perf_counter() - self.started
        self.started = time.perf_counter()
        if trainer.is_global_zero and trainer.global_step == self.whole:
            delay = self.fraction * min(last_step, 0.5)
            threading.Timer(delay, os.killpg, (os.getpgid(0), signal.SIGKILL)).start()
        elif trainer.is_global_zero and trainer.global_step > self.whole:
            os.killpg(os.getpgid(0), signal.SIGKILL)


class TerminateAtStep(Callback):
    """Sends this process SIGTERM as a step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Send it."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def ending() -> Callback:
    """Return the callback that was asked for."""
    if "TERMINATE_AT_STEP" in os.environ:
        return TerminateAtStep(int(os.environ["TERMINATE_AT_STEP"]))
    return KillAfterSteps(float(os.environ["KILL_AFTER_STEPS"]))


if __name__ == "__main__":
    training.train = functools.partial(training.train, callbacks=[ending()])
    run_script("train", sys.argv[1:])
