"""Traces of a few training steps, for looking at with a viewer.

One rank of each pipeline stage writes what its CPU and its GPU did, as a Chrome trace (for https://ui.perfetto.dev),
with a range of its own for each part of a step (`step_clock.py`). On CUDA it also writes each allocation of memory and
the stack it came from (for https://pytorch.org/memory_viz), the ranges are NVTX's too, and NVIDIA's profilers are told
when the steps begin and end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, record_function

from nemo_kto.runtime import parallel
from nemo_kto.runtime.disk import reason_of

logger = logging.getLogger(__name__)

KEY = "trainer.profile_steps"
MOST_ALLOCATIONS = 1_000_000
"""Events of memory that are kept; of more, the last ones."""


class ProfileSteps(Callback):
    """Profiles some steps; the module has a `clock`.

    Args:
        steps: Number of the first step and of the last one, from 1.
        folder: Where the files go; made when there are some.
    """

    def __init__(self, steps: Sequence[int], folder: Path) -> None:
        self._first, self._last = steps
        self._folder = folder
        self._profiler: profile | None = None
        self._begun = 0
        self._unnamed: Callable[[str], AbstractContextManager[Any]] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if a resumed run has taken these steps before."""
        if trainer.is_global_zero and trainer.global_step >= self._last:
            logger.warning(
                "%s=[%d, %d]: the run goes on after step %d, so nothing is profiled.",
                *(KEY, self._first, self._last, trainer.global_step),
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin, if this step is one of them."""
        if self._profiler is None and self._first <= trainer.global_step + 1 <= self._last and _writes():
            self._begun = trainer.global_step + 1
            self._start(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """End, and write the files, after the last of them."""
        if trainer.global_step >= self._last:
            self._finish(pl_module, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what there is of a run that has ended earlier."""
        self._finish(pl_module, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is of a run that has failed; its other ranks are told of that after this, in any case."""
        try:
            self._finish(pl_module, trainer.global_step)
        except Exception:  # of the device, which may be what has failed
            logger.warning("There is no profile of the steps before the failure.", exc_info=True)

    def _start(self, module: Any) -> None:
        on_cuda = module.device.type == "cuda"
        self._unnamed, module.clock.named = module.clock.named, _named_on_cuda if on_cuda else record_function
        if on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
            torch.cuda.profiler.start()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profiler.start()

    def _finish(self, module: Any, step: int) -> None:
        """Write the files, the profiler being on; a disk that is full is no reason to end a run."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        module.clock.named, on_cuda = self._unnamed, module.device.type == "cuda"
        name = f"steps_{self._begun}-{step}_rank_{module.global_rank}"
        try:
            profiler.stop()  # which waits for the device, and raises what has befallen that
            if on_cuda:
                torch.cuda.profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            if on_cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}_memory.pickle"))
        except (OSError, RuntimeError) as error:
            logger.warning("The profile cannot be written: %s.", reason_of(error, self._folder))
        else:
            if module.global_rank == 0:
                print(f"Profile of steps {self._begun} to {step}: {self._folder}", flush=True)
        finally:
            if on_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)


def _writes() -> bool:
    """Return whether this rank is the one of its pipeline stage that writes."""
    place = parallel.position()
    return place.tp_rank == place.cp_rank == place.dp_rank == 0


@contextmanager
def _named_on_cuda(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    finally:
        torch.cuda.nvtx.range_pop()
