"""How long a run is, in steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.batches.datamodule import KTODataModule
from nemo_kto.data.batches.sampling import epoch_length
from nemo_kto.errors import ConfigError
from nemo_kto.quiet import is_global_rank_zero

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The length of a run in steps, one global batch each.

    Attributes:
        total: Steps of the whole run.
        per_epoch: Steps of one pass over the training data.
        val_interval: Steps between validations; 0 without validation data.
        val_batches: Batches of one validation.
    """

    total: int
    per_epoch: int
    val_interval: int
    val_batches: int


def plan_schedule(config: KTOConfig, data: KTODataModule) -> Schedule:
    """Return the steps of the run from the size of the data and `trainer.kto`.

    Raises:
        ConfigError: Neither `max_steps` nor `max_epochs` limits the run; or checkpoints are to be chosen by what the
            validation data does not say.
    """
    kto = config.trainer.kto
    batches = epoch_length(len(data.splits["train"]), config.model.global_batch_size)
    per_epoch = _count(kto.limit_train_batches, batches)
    limits = []
    if kto.max_steps is not None and kto.max_steps >= 0:
        limits.append(kto.max_steps)
    if kto.max_epochs is not None and kto.max_epochs >= 0:
        limits.append(kto.max_epochs * per_epoch)
    if not limits:
        raise ConfigError("Nothing ends the run. Set trainer.kto.max_steps or trainer.kto.max_epochs.")
    interval = kto.val_check_interval
    if isinstance(interval, float):
        interval = _count(interval, per_epoch)
    val_batches = _val_batches(config, data) if "validation" in data.splits else 0
    if val_batches:
        _check_monitor(config, data, val_batches)
    return Schedule(
        total=min(limits),
        per_epoch=per_epoch,
        val_interval=interval if val_batches else 0,
        val_batches=val_batches,
    )


def plan_validation(config: KTOConfig, data: KTODataModule) -> Schedule:
    """Return the schedule of a validation on its own."""
    return Schedule(total=1, per_epoch=1, val_interval=0, val_batches=_val_batches(config, data))


def _check_monitor(config: KTOConfig, data: KTODataModule, val_batches: int) -> None:
    """Raise a ConfigError where checkpoints are chosen by a metric that validations will not have."""
    manager = config.exp_manager
    params = manager.checkpoint_callback_params
    if not manager.create_checkpoint_callback or params.save_top_k == 0 or params.monitor != "val_rewards_margins":
        return
    desirable = data.validated(val_batches)
    if desirable.all() or not desirable.any():
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.monitor={params.monitor} is a difference of the classes, and all "
            f"{len(desirable)} samples that are validated have thumbs {'up' if desirable.all() else 'down'}. Use "
            "val_loss, or validate on samples of both."
        )


def _val_batches(config: KTOConfig, data: KTODataModule) -> int:
    available = -(-len(data.splits["validation"]) // config.model.global_batch_size)
    return _count(config.trainer.kto.limit_val_batches, available)


def warn_about_rates(config: KTOConfig, schedule: Schedule) -> None:
    """Log a warning when the run is too short for its learning-rate schedule, as NeMo-Aligner's defaults often are."""
    sched = config.model.optim.sched
    flat = sched.warmup_steps + (0 if sched.name == "Constant" else sched.constant_steps)
    if flat >= schedule.total and is_global_rank_zero():
        logger.warning(
            "The run of %d steps is no longer than model.optim.sched.warmup_steps=%d and constant_steps=%d together: "
            "the learning rate does not follow its schedule. Lower them.",
            schedule.total,
            sched.warmup_steps,
            sched.constant_steps,
        )


def _count(limit: int | float, whole: int) -> int:
    """Return the batches meant by a count (int) or by a fraction (float) of `whole`: at least 1, at most `whole`."""
    number = int(limit * whole) if isinstance(limit, float) else limit
    return min(max(number, 1), whole)
