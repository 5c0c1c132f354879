"""What becomes of a run when a checkpoint cannot be written, and when writing takes long.

A save that fails is no end of the run: nothing is left of it, what was saved before stays, and the next one may
succeed, as when somebody has made room. Several in a row are, and the one at the end.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint

from nemo_kto.errors import CheckpointError, SaveError
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runtime import parallel
from nemo_kto.runtime.checkpoint import BackgroundCheckpointIO
from nemo_kto.runtime.checkpoint_folders import newest_whole, step_of
from nemo_kto.runtime.disk import reason_of

logger = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Steps in a row whose saves may fail before the run ends."""

ATTEMPTS_AT_END = 4
"""How often the last checkpoint of a run is tried to be written."""

PAUSE = 15.0
"""Seconds between two of these attempts."""

_BEST = ("best_k_models", "kth_best_model_path", "kth_value", "best_model_path", "best_model_score", "current_score")
_STATE = (*_BEST, "last_model_path", "_last_global_step_saved", "_last_checkpoint_saved")
"""What NeMo's callback changes before it has saved."""


class RunCheckpoints(NeMoModelCheckpoint):  # type: ignore[misc]
    """NeMo's checkpoint callback, which outlives saves that fail. `adopt` makes one; all ranks do the same.

    Attributes:
        failed_steps: Steps whose saves have failed since the last one that did not.
    """

    failed_steps: list[int]
    _before_best: dict[str, Any]
    _failed: set[str]
    _left_over: list[str]
    _slow: SlowSaves

    @classmethod
    def adopt(cls, callback: NeMoModelCheckpoint, trainer: Trainer) -> None:
        """Make one of NeMo's callback, which exp_manager has made and given to the trainer."""
        callback.__class__ = cls
        callback.failed_steps, callback._failed, callback._left_over = [], set(), []
        callback._slow = SlowSaves(str(callback.dirpath))
        files = trainer.strategy.checkpoint_io
        if isinstance(files, BackgroundCheckpointIO):
            files.on_failure = lambda error: callback._outlive_in_background(trainer, error)

    def _generate_state_key(self, **kwargs: Any) -> str:
        """Return the name of its state in checkpoints: that of NeMo's callback, whose state it is."""
        return f"{NeMoModelCheckpoint.__qualname__}{kwargs!r}"

    # saving

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Save, if the model is among the best; that it fails is never the end by itself."""
        try:
            with self._unchanged_by_failure() as before:
                self._before_best = before
                super()._save_topk_checkpoint(trainer, monitor_candidates)
        except SaveError as error:
            self._outlive(error, step=trainer.global_step)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Save; when the run ends with it, more than once if need be."""
        at_end, last = _is_at_end(trainer), _plain(self.last_model_path)
        if last and trainer.is_global_zero and not Path(last).exists():
            _warn(f"{last} is not there any more: somebody has removed it.")
        for attempt in range(1, ATTEMPTS_AT_END + 1):
            try:
                with self._unchanged_by_failure():
                    super()._save_last_checkpoint(trainer, monitor_candidates)
                return
            except SaveError as error:
                if not at_end:
                    self._outlive(error, step=trainer.global_step)
                    return
                if attempt == ATTEMPTS_AT_END:
                    raise CheckpointError(f"{error} {self._what_is_left()}") from error
                _warn(f"{error} It is the last one of the run, and is tried again in {PAUSE:.0f} s.")
                time.sleep(PAUSE)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save; NeMo begins a list for each save in the background, of what it replaces."""
        known = {id(replaced) for replaced in self.deferred_ckpts_to_remove}
        try:
            with self._slow.measured():
                super()._save_checkpoint(trainer, filepath)
        except SaveError:
            for replaced in [each for each in self.deferred_ckpts_to_remove if id(each) not in known]:
                self.deferred_ckpts_to_remove.remove(replaced)
                self._left_over += replaced
            raise

    def _get_finalize_save_checkpoint_callback(
        self, trainer: Trainer, filepath: str, global_step: int
    ) -> Callable[[], None]:
        """Return what is called when a checkpoint is whole."""
        finish: Callable[[], None] = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)

        def finish_and_forget() -> None:
            finish()
            self.failed_steps.clear()

        return finish_and_forget

    # failures

    @contextmanager
    def _unchanged_by_failure(self) -> Iterator[dict[str, Any]]:
        before = {name: copy.copy(getattr(self, name)) for name in _STATE}
        try:
            yield before
        except SaveError as error:
            for name, value in before.items():
                setattr(self, name, value)
            if self._left_over:  # the save before has failed as well, in the background
                self.last_model_path = self._left_over.pop(0)
                self._left_over.clear()
            self._unmark(error.folder)
            raise

    def _outlive(self, error: SaveError, *, step: int) -> None:
        """Say that a save has failed.

        Raises:
            CheckpointError: It was one too many.
        """
        if step not in self.failed_steps:
            self.failed_steps.append(step)
        if len(self.failed_steps) >= MOST_FAILURES:
            steps = ", ".join(map(str, self.failed_steps))
            raise CheckpointError(f"{error} So it was at steps {steps}. {self._what_is_left()}") from error
        _warn(f"{error} Nothing is left of it, and training goes on: the next save comes as planned.")

    def _outlive_in_background(self, trainer: Trainer, error: SaveError) -> None:
        """Undo what NeMo's callback has noted of a save that seemed to go well, so that what it replaces stays."""
        failed = str(error.folder)
        self._unmark(error.folder)
        self._failed.add(failed)
        replaced = [path for path in self.deferred_ckpts_to_remove.pop(0) if _plain(path) not in self._failed]
        if not failed.endswith("-last"):
            for name in _BEST:
                setattr(self, name, self._before_best[name])
        elif _plain(self.last_model_path) == failed:
            self.last_model_path = replaced[0] if replaced else ""
        elif self.deferred_ckpts_to_remove:  # another one is being begun, and will replace them
            self.deferred_ckpts_to_remove[0][:0] = replaced
        if failed.endswith("-last") and _is_at_end(trainer) and step_of(error.folder) == trainer.global_step:
            raise CheckpointError(f"{error} {self._what_is_left()}") from error
        self._outlive(error, step=step_of(error.folder))

    def _what_is_left(self) -> str:
        last, _ = newest_whole(Path(str(self.dirpath)))
        if last is None:
            return "No checkpoint is left to go on from. Mend that, and run the same command again."
        return f"Mend that, and run the same command again: it goes on from {last}."

    # marks and removal

    @staticmethod
    def set_checkpoint_unfinished_marker(checkpoint_path: Path | str, barrier_after: bool = False) -> None:
        """Mark a checkpoint as unfinished, as NeMo does, which would leave the other ranks waiting if that fails.

        Raises:
            SaveError: It cannot be marked.
        """

        def mark() -> None:
            try:
                NeMoModelCheckpoint.set_checkpoint_unfinished_marker(checkpoint_path)
            except OSError as error:
                folder = Path(_plain(checkpoint_path))
                raise SaveError(folder, reason_of(error, folder)) from error

        if barrier_after:
            parallel.run_on_rank_zero(mark, "")
        else:
            mark()

    def _unmark(self, folder: Path) -> None:
        if is_global_rank_zero():
            with suppress(OSError):  # that of a folder which is not there says nothing
                self.format_checkpoint_unfinished_marker_path(folder).unlink(missing_ok=True)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str, override_async: bool = False) -> None:
        """Remove what is not needed any more; where it cannot be marked before, without a mark."""
        try:
            super()._remove_checkpoint(trainer, filepath, override_async)
        except SaveError:
            trainer.strategy.remove_checkpoint(filepath)


class SlowSaves:
    """Says, once, that saves take much of the run's time.

    Args:
        place: Where they go to.
        clock: Returns seconds.
        least: Seconds of all saves together before it judges.
        share: Of the time since it was made that they may take.
    """

    def __init__(
        self, place: str, clock: Callable[[], float] = time.monotonic, *, least: float = 60.0, share: float = 0.25
    ) -> None:
        self._place, self._clock, self._least, self._share = place, clock, least, share
        self._began, self._taken, self._said = clock(), 0.0, False

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count the time of the block as that of a save."""
        began = self._clock()
        yield
        ended = self._clock()
        self._taken += ended - began
        share = self._taken / (ended - self._began) if ended > self._began else 0.0
        if not self._said and self._taken >= self._least and share > self._share:
            self._said = True
            _warn(
                f"Writing checkpoints to {self._place} has taken {self._taken:.0f} s, {share:.0%} of the time so far. "
                "Raise trainer.kto.save_interval and trainer.kto.val_check_interval, set "
                "exp_manager.checkpoint_callback_params.async_save=true, or name a faster place in "
                "exp_manager.explicit_log_dir."
            )


def _is_at_end(trainer: Trainer) -> bool:
    return bool(trainer.should_stop or trainer.global_step >= trainer.max_steps)


def _plain(path: Path | str) -> str:
    """Return a checkpoint's folder; Lightning gives it a suffix."""
    return str(path).removesuffix(".ckpt")


def _warn(text: str) -> None:
    if is_global_rank_zero():
        logger.warning("%s", text)
