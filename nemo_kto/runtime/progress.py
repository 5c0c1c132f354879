"""How far a run is, as a person sees it: a bar in a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress import ProgressBar as LightningBar

_LINES = 100
"""About so many lines for a run, whatever its length."""


def progress() -> LightningBar:
    """Return what shows how far a run is, where this process prints."""
    return ProgressBar() if sys.stdout.isatty() else ProgressLines()


class ProgressLines(LightningBar):
    """Prints a line after some steps, in place of a bar: a file would keep every state of that.

    After the first step of this process and the last one, and about a hundred in between, of those that are logged.
    """

    def __init__(self) -> None:
        super().__init__()
        self._first = 0
        self._started = 0.0
        self._enabled = True

    def disable(self) -> None:
        """Print nothing; Lightning says so to every process but one."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Count from here."""
        self._first, self._started = trainer.global_step, time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Print a line if one is due."""
        step, last = trainer.global_step, int(trainer.max_steps)
        every = trainer.log_every_n_steps * -(-last // (_LINES * trainer.log_every_n_steps))
        if not self._enabled or (step % every and step not in (self._first + 1, last)):
            return
        per_step = (time.monotonic() - self._started) / max(step - self._first, 1)
        metrics = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        shown = "".join(f", {name} {_short(value)}" for name, value in metrics.items())
        left = timedelta(seconds=round(per_step * (last - step)))
        print(f"Step {step} of {last}{shown}, {per_step:.3g} s each, {left} left", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else str(value)


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
