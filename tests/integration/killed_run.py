"""The training command, killed with all its ranks KILL_AFTER_STEPS (a number like 3.4) steps after training began."""

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
        """Kill now, later in this step, or in the save after it, as far as its time can be told from the last one."""
        last_step = time.perf_counter() - self.started
        self.started = time.perf_counter()
        if trainer.is_global_zero and trainer.global_step == self.whole:
            delay = self.fraction * min(last_step, 0.5)
            threading.Timer(delay, os.killpg, (os.getpgid(0), signal.SIGKILL)).start()


if __name__ == "__main__":
    moment = float(os.environ["KILL_AFTER_STEPS"])
    training.train = functools.partial(training.train, callbacks=[KillAfterSteps(moment)])
    run_script("train", sys.argv[1:])
