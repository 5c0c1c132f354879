"""The parts of Lightning's loop that a step-counted, resumable Megatron run needs changed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loops import _TrainingEpochLoop
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint


class StepLoop(_TrainingEpochLoop):
    """Training loop whose validations, checkpoints and resume position are functions of the global step alone.

    Lightning's own loop validates again, or skips a due validation, right after a resume, and its logging step drifts
    by one per resume. Here validation runs every `val_interval` steps and after the last one, a checkpoint is written
    every `save_interval` steps (validation writes one anyway), and a resumed run logs at the step it is at.

    And Lightning keeps the latest value of every metric, and writes it again with the number of each step that does
    not log it, as with those of a class that is absent from a batch. Here loggers and the progress bar get what a step
    has logged, no more.

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


class GracefulStop(Callback):
    """Ends the run after the current step, with a checkpoint, on SIGTERM (as Slurm sends) or when its time is over.

    Args:
        max_time: Time from now on; None for no limit.
    """

    def __init__(self, max_time: timedelta | None = None) -> None:
        self._deadline = time.monotonic() + (float("inf") if max_time is None else max_time.total_seconds())
        self._received = False
        self._previous: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over SIGTERM for what is done before training begins."""
        previous = signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over SIGTERM from Lightning, whose own handler ends the run without a checkpoint."""
        self._previous = signal.signal(signal.SIGTERM, self._handle)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so when there is more to do."""
        if trainer.is_global_zero and trainer.global_step < trainer.max_steps:
            print(f"Stopped at step {trainer.global_step} of {trainer.max_steps}; run the same command to continue.")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give SIGTERM back: only now, as the export of a finished run must not be cut off either."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._received = True

    def agreed(self) -> bool:
        """Return whether any rank was signalled or is late: one all-reduce of one integer over the world."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        flag = torch.tensor(int(self._received or time.monotonic() > self._deadline), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


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
            # on a line of its own: the bar's is not ended
            print(f"\nFirst step after {time.time() - self._started:.0f} s", flush=True)
        self._printed = True


class ProgressBar(TQDMProgressBar):
    """One bar over all steps of the run, with loss, kl and margins, and the time left."""

    def init_train_tqdm(self) -> Any:
        """Return Lightning's bar labelled by what it counts."""
        bar = super().init_train_tqdm()
        bar.unit = "step"
        return bar

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Show the steps of the whole run; after a resume, start where the run stands."""
        self.train_progress_bar.reset(total=trainer.max_steps)
        self.train_progress_bar.initial = trainer.global_step
        self.train_progress_bar.set_description("KTO")

    def on_exception(self, *_: Any) -> None:
        """End the bar's line, so that the error begins one of its own."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()

    def on_validation_batch_start(self, *arguments: Any, **keywords: Any) -> None:
        """Label the validation's bar; Lightning would add the number of the one data loader there is."""
        super().on_validation_batch_start(*arguments, **keywords)
        self.val_progress_bar.set_description("Validation", refresh=False)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics logged for the bar, without Lightning's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
