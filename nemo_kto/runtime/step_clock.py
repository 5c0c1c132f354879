"""Where the time of a training step goes: always measured, and without anybody waiting for the device.

On CUDA the host only asks for work. Events between the parts of a step tell what the device took for each, once it has
come to the last of them; by the end of the next step it has. So a step's times are written a step later, under the
step's own number, on a CPU as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from megatron.core.utils import get_model_config

DATA, KL, REFERENCE, GRADIENTS, GRADIENT_SYNC, OPTIMIZER, OTHER = (
    "data",
    "kl",
    "reference",
    "gradients",
    "gradient_sync",
    "optimizer",
    "other",
)
"""Parts of a step."""


@dataclass(frozen=True)
class Timeline:
    """A step that has been taken.

    Attributes:
        names: `[n]` what was done between two marks, one after the other.
        marks: `[n + 1]` points of time: seconds, or CUDA's events.
        between: Returns the seconds between two of them.
    """

    names: Sequence[str]
    marks: Sequence[Any]
    between: Callable[[Any, Any], float]

    def seconds(self) -> dict[str, float]:
        """Return part -> its seconds; on CUDA the device must have come to the last mark."""
        found: dict[str, float] = {}
        for name, start, end in zip(self.names, self.marks, self.marks[1:], strict=False):
            found[name] = found.get(name, 0.0) + self.between(start, end)
        return found


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class StepClock:
    """Notes when the parts of a training step begin and end. Time within a part of a part is the inner one's only.

    Attributes:
        last: The step that was finished last; None before the first.
        named: Returns a context that gives what runs inside a name, for a profiler.
    """

    def __init__(self) -> None:
        self.last: Timeline | None = None
        self.named: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
        self._inside: list[str] = []
        self._names: list[str] = []
        self._marks: list[Any] = []
        self._mark: Callable[[], Any] = time.perf_counter
        self._between: Callable[[Any, Any], float] = _difference

    def begin(self, device: torch.device) -> None:
        """Begin a step with waiting for its data."""
        on_cuda = device.type == "cuda"
        self._mark = _event if on_cuda else time.perf_counter
        self._between = _elapsed if on_cuda else _difference
        self._inside, self._names, self._marks = [DATA], [], [self._mark()]

    def has_data(self) -> None:
        """Say that the data has come."""
        if self._inside:
            self._turn()
            self._inside = [OTHER]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block as this part; outside of a step nothing is counted."""
        with self.named(name):
            if not self._inside:
                yield
                return
            self._turn()
            self._inside.append(name)
            try:
                yield
            finally:
                self._turn()
                self._inside.pop()

    @contextmanager
    def sync_within(self, chunks: Sequence[Any]) -> Iterator[None]:
        """Count the end of a pass over a stage's chunks, where its gradients are exchanged, as a part of its own."""
        config = get_model_config(chunks[0])
        finalize = config.finalize_model_grads_func

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.part(GRADIENT_SYNC):
                return finalize(*arguments, **keywords)

        config.finalize_model_grads_func = timed
        try:
            yield
        finally:
            config.finalize_model_grads_func = finalize

    def finish(self) -> None:
        """End the step."""
        if self._inside:
            self._turn()
            self.last = Timeline(self._names, self._marks, self._between)
        self._inside = []

    def _turn(self) -> None:
        self._names.append(self._inside[-1])
        self._marks.append(self._mark())


def _difference(start: float, end: float) -> float:
    return end - start


def _elapsed(start: Any, end: Any) -> float:
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1000


class StepTimes(Callback):
    """Writes the times of the parts of each logged step to the loggers, as `train/time/<part>`, a step later.

    The module has a `clock`.
    """

    def __init__(self) -> None:
        self._unwritten: tuple[int, Timeline] | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write the times of the step before: since then the host has waited for this one's metrics."""
        self._write(trainer)
        clock: Any = pl_module.clock
        if clock.last is not None and trainer._logger_connector.should_update_logs:
            self._unwritten = (trainer.global_step - 1, clock.last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write those of the last step."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self._unwritten is None:
            return
        step, timeline = self._unwritten
        self._unwritten = None
        times = {f"train/time/{part}": seconds for part, seconds in timeline.seconds().items()}
        for logger in trainer.loggers:
            logger.log_metrics(times, step)
