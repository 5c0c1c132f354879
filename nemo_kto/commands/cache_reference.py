"""The command nemo-kto cache-reference."""

from __future__ import annotations

from functools import partial

from lightning.pytorch import Trainer

from nemo_kto.config.schema import KTOConfig
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runs.early import check_folders
from nemo_kto.runs.facts import common_facts
from nemo_kto.runs.run import prepare
from nemo_kto.runs.trainer import finishes, graceful_stop, strategy, trainer_settings


def cache_reference(config: KTOConfig) -> bool:
    """Compute the reference's log-probs that a run needs and keep them on disk; the run then looks them up.

    Args:
        config: The configuration of that run, with `model.kto.reference.mode=cached`; its layout may be another.

    Returns:
        Whether all of them are there; False if the command was stopped earlier, to be run again.

    Raises:
        ConfigError: See `train`; also when the folder's log-probs were computed from something else.
        DataError: See `train`.
        CheckpointError: See `train`.
        RankError: See `train`.
    """
    stop = graceful_stop(config)
    check_folders(config, "cache_reference")
    run = prepare(config)
    assert run.reference.cache is not None, "reference.mode is cached"
    trainer = Trainer(
        **{**trainer_settings(run), "limit_val_batches": 0},
        strategy=strategy(run, common_facts(run)),
        callbacks=[stop],
    )
    # only sets the model up, which does it: there is nothing to validate
    finished = finishes(trainer, partial(trainer.validate, run.model(), datamodule=run.data, verbose=False))
    if finished and is_global_rank_zero():
        print(f"Reference log-probs: {run.reference.cache.folder}", flush=True)
    return finished
