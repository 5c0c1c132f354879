"""The parts of Lightning's loop that a step-counted, resumable Megatron run needs changed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint

from nemo_kto import stopping
from nemo_kto.errors import StoppedEarly


class StepLoop(_TrainingEpochLoop):
    """Training loop whose validations, checkpoints and resume position are functions of the global step alone.

    Lightning's own loop validates again, or skips a due validation, right after a resume, and its logging step drifts
    by one per resume. Here validation runs every `val_interval` steps and after the last one, a checkpoint is written
    every `save_interval` steps (validation writes one anyway), and a resumed run logs at the step it is at.

    And Lightning keeps the latest value of every metric, and writes it again with the number of each step that does
    not log it, as with those of a class that is absent from a batch. Here loggers and the progress bar get what a step
    has logged, no more.

    The module has a `clock`, see `step_clock.py`: a step begins with the wait for its batch.

    Args:
        trainer: The trainer whose `fit_loop.epoch_loop` this replaces; its `max_steps` is the length of the run.
        val_interval: Steps between validations; 0 for none.
        save_interval: Steps between `*-last` checkpoints; 0 for those at validations and at the end only.
    """

    def __init__(self, trainer: Trainer, *, val_interval: int, save_interval: int) -> None:
        super().__init__(trainer, trainer.min_steps, trainer.max_steps)
        self.val_interval = val_interval
        self.save_interval = save_interval

    def reset(self) -> None:
        """Restore the progress counters after a resume; without a warning, as the sampler resumes by itself."""
        if self.restarting:
            self.batch_progress.reset_on_restart()
            self.scheduler_progress.reset_on_restart()
            self.automatic_optimization.optim_progress.reset_on_restart()
        else:
            super().reset()

    def on_run_start(self, data_fetcher: Any) -> None:
        """Start, or continue, the logger's x axis at the global step."""
        super().on_run_start(data_fetcher)
        self._batches_that_stepped = self.global_step

    def advance(self, data_fetcher: Any) -> None:
        """Run one step; whatever was due before the checkpoint was written has been done."""
        self.restarting = False
        self._forget_logged()
        module: Any = self.trainer.lightning_module
        module.clock.begin(self.trainer.strategy.root_device)
        super().advance(data_fetcher)

    def _forget_logged(self) -> None:
        """Forget what the step before has logged.

        Means over an epoch go on. So do the `callback_metrics`, the latest value of each: a checkpoint is chosen by
        what the last validation found, and whoever stops early by a metric of training must find one.
        """
        for metric in self._results.result_metrics:
            metric._forward_cache = None
        connector = self.trainer._logger_connector
        connector._logged_metrics.clear()
        connector._progress_bar_metrics.clear()

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        if not self.val_interval or not self.trainer.enable_validation:
            return False
        return self.global_step % self.val_interval == 0 or self.global_step == self.max_steps

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Validate and save what is due after this step, or save and stop when the run was asked to end."""
        super().on_advance_end(data_fetcher)
        last_step = self.global_step == self.max_steps
        due = self.save_interval and self.global_step % self.save_interval == 0
        stop = self._stop_requested()
        if due or last_step or stop:
            save_last(self.trainer)
            # what led to a checkpoint is never logged again: a run that is killed after it must not have lost it
            for logger in self.trainer.loggers:
                logger.save()
        if stop:
            self.trainer.should_stop = True

    def _stop_requested(self) -> bool:
        stop = graceful_stop(self.trainer)
        return stop is not None and stop.agreed()


def save_last(trainer: Trainer) -> None:
    """Write the `*-last` checkpoint of the current step unless it has been written; collective."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, NeMoModelCheckpoint):
        return
    candidates = callback._monitor_candidates(trainer)
    if callback.last_model_path != callback.format_checkpoint_name(candidates, callback.CHECKPOINT_NAME_LAST):
        callback._save_last_checkpoint(trainer, candidates)


class StopReason(IntEnum):
    """Why a run stops early; where ranks have several reasons, the greatest counts."""

    NONE = 0
    TIME = 1
    FILE = 2
    SIGNAL = 3


class GracefulStop(Callback):
    """Ends the run after the current step, with a checkpoint: on SIGTERM, Ctrl-C, by a file, or when its time is over.

    Args:
        max_time: Time from now on; None for no limit.
        file: What ends the run when it is there; None for nothing. Rank 0 looks for it.

    Attributes:
        reason: Why all ranks have agreed to stop.
    """

    def __init__(self, max_time: timedelta | None = None, *, file: Path | None = None) -> None:
        self.reason = StopReason.NONE
        self._deadline = time.monotonic() + (float("inf") if max_time is None else max_time.total_seconds())
        self._file = file

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Do not let the process be ended by a signal in what is done before training begins and asks `agreed`."""
        stopping.finish_first("when what has been computed is written")
        try:
            yield
        finally:
            stopping.finished()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on end in order; at once if that is already wanted.

        Raises:
            StoppedEarly: It is.
        """
        has_checkpoints = trainer.checkpoint_callback is not None
        stopping.finish_first("after this step, with a checkpoint" if has_checkpoints else "after this step")
        if self.agreed():
            raise StoppedEarly(f"{trainer.global_step} of {trainer.max_steps} steps")
        strategy: Any = trainer.strategy
        strategy.watchdog.ranks.stop_together = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so when there is more to do."""
        if trainer.is_global_zero and trainer.global_step < trainer.max_steps:
            steps = f"step {trainer.global_step} of {trainer.max_steps}"
            print(f"Stopped at {steps}{self.because()}; run the same command to continue.", flush=True)

    def agreed(self) -> bool:
        """Return whether a rank was told to stop or is late: one all-reduce of one integer over the world."""
        mine = StopReason.NONE
        if stopping.requested():
            mine = StopReason.SIGNAL
        elif dist.get_rank() == 0 and self._file is not None and self._file.exists():
            mine = StopReason.FILE
        elif time.monotonic() > self._deadline:
            mine = StopReason.TIME
        reason = torch.tensor(int(mine), device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(reason, op=dist.ReduceOp.MAX)
        self.reason = StopReason(int(reason))
        return self.reason != StopReason.NONE

    def because(self) -> str:
        """Return why the run stops, in brackets."""
        return {
            StopReason.TIME: " (exp_manager.max_time_per_run)",
            StopReason.FILE: f" ({self._file})",
            StopReason.SIGNAL: f" ({stopping.requested() or 'another rank was told to'})",
        }.get(self.reason, "")

    def remove_file(self) -> None:
        """Remove the file that has ended the run, so that it does not end the next one; for rank 0."""
        if self.reason == StopReason.FILE and self._file is not None:
            self._file.unlink(missing_ok=True)
            print(f"{self._file} has been obeyed and is removed.", flush=True)


class OwnSignals(_SignalConnector):
    """In the place of Lightning's: `stopping.py` looks after the signals, Lightning would end without a checkpoint."""

    def register_signal_handlers(self) -> None:
        """Leave them as they are."""
        self.received_sigterm = False

    def teardown(self) -> None:
        """Leave them as they are."""


def graceful_stop(trainer: Trainer) -> GracefulStop | None:
    """Return the trainer's GracefulStop, if it has one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, GracefulStop)), None)


class StartUpTime(Callback):
    """Prints, once, how long it took to the end of the first step.

    It counts from the start of this process, imports included; in a later run of the same process from when its
    trainer is made.
    """

    _runs = 0

    def __init__(self) -> None:
        self._printed = False
        self._started = time.time() if StartUpTime._runs else psutil.Process().create_time()
        StartUpTime._runs += 1

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Print it after the first step of this process."""
        if not self._printed and trainer.is_global_zero:
            line_break = "\n" if sys.stdout.isatty() else ""  # that of a progress bar is not ended
            print(f"{line_break}First step after {time.time() - self._started:.0f} s", flush=True)
        self._printed = True
