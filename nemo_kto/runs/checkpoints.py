"""Which checkpoint a command begins with; told by names, so that it is known before torch is imported."""

from __future__ import annotations

import logging
from pathlib import Path

from nemo_kto.config.folders import log_directory
from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runtime.checkpoint_folders import (
    DAMAGED_FOLDER,
    checkpoints_in,
    is_finished,
    is_unfinished,
    newest_whole,
    set_aside,
    step_of,
)

logger = logging.getLogger(__name__)


def resumable_checkpoint(
    config: KTOConfig, log_dir: Path, *, checksums: bool = False, clear: bool = False
) -> Path | None:
    """Return the checkpoint the run goes on from, the newest that is whole, if there is one.

    It is found here rather than by NeMo's exp_manager, which refuses to choose when a kill left two.

    Args:
        config: The configuration.
        log_dir: The run's log folder.
        checksums: Whether files are compared with what was written; otherwise only their sizes are.
        clear: Whether damaged ones are put aside, and what was found is said, by the process that speaks for the run.

    Raises:
        ConfigError: There has to be one, or there must be none, by the keys of `exp_manager`.
        CheckpointError: There are some, and none is whole.
    """
    manager, folder = config.exp_manager, log_dir / "checkpoints"
    found = checkpoints_in(folder)
    if not manager.resume_if_exists:
        if any(not is_unfinished(checkpoint) for checkpoint in found):
            # a later resume could not tell the two runs' checkpoints apart
            raise ConfigError(
                f"exp_manager.resume_if_exists=false, but {folder} holds the checkpoints of another run. Name another "
                "folder in exp_manager.explicit_log_dir, or remove it."
            )
        return None
    newest, damaged = newest_whole(folder, checksums=checksums)
    if newest is None and damaged:
        faults = "".join(f"\n  {error.folder}: {error.fault}" for error in damaged)
        raise CheckpointError(
            f"{folder} holds checkpoints, but none can be used:{faults}\nPut back what is missing; or, to start from "
            "the beginning, remove them or name another folder in exp_manager.explicit_log_dir."
        )
    if clear and is_global_rank_zero():
        for error in damaged:
            logger.warning("%s It was put into %s; the run goes on from %s.", error, DAMAGED_FOLDER, newest)
            set_aside(error.folder)
        if newest is None and found:
            logger.warning("%s was not written to its end: the run starts from the beginning.", found[0])
    if newest is None and not manager.resume_ignore_no_checkpoint:
        raise ConfigError(
            f"exp_manager.resume_if_exists is set, but {folder} holds no finished checkpoint. Set "
            "exp_manager.resume_ignore_no_checkpoint=true to start from the beginning."
        )
    return newest


def checkpoint_to_evaluate(config: KTOConfig) -> Path | None:
    """Return the checkpoint that is scored; None for the model that training starts from.

    Raises:
        ConfigError: That model would be its own reference.
        CheckpointError: `evaluation.checkpoint` is no finished checkpoint of a run.
    """
    if config.evaluation.checkpoint is not None:
        named = Path(config.evaluation.checkpoint).absolute()
        if not is_finished(named):
            raise CheckpointError(
                f"evaluation.checkpoint={named} is not a finished checkpoint. Name one of the folders in "
                "<log dir>/checkpoints."
            )
        step_of(named)  # raises for a name without a step, now rather than when everything has been scored
        return named
    folder = log_directory(config) / "checkpoints"
    newest, damaged = newest_whole(folder)
    for error in damaged:
        raise CheckpointError(f"{error} Name another one in evaluation.checkpoint.")
    adapters = config.model.peft.lora_tuning.restore_from_path
    if newest is None and config.model.kto.reference.checkpoint is None and adapters is None:
        raise ConfigError(
            f"There is nothing to evaluate: {folder} holds no finished checkpoint, and without one the model is its "
            "own reference. Set exp_manager.explicit_log_dir or evaluation.checkpoint to what was trained, or "
            "model.kto.reference.checkpoint to what pretrained_checkpoint.restore_from_path is to be compared with."
        )
    return newest
