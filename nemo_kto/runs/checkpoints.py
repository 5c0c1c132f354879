"""Which checkpoint a command begins with; told by names, so that it is known before torch is imported."""

from __future__ import annotations

from pathlib import Path

from nemo_kto.config.folders import log_directory
from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.runtime.checkpoint_folders import is_finished, newest_last, step_of


def resumable_checkpoint(config: KTOConfig, log_dir: Path) -> Path | None:
    """Return the checkpoint the run goes on from, if there is one.

    It is found here rather than by NeMo's exp_manager, which refuses to choose when a kill left two.

    Raises:
        ConfigError: There has to be one, or there must be none, by the keys of `exp_manager`.
    """
    manager, folder = config.exp_manager, log_dir / "checkpoints"
    last = newest_last(folder)
    if manager.resume_if_exists:
        if last is None and not manager.resume_ignore_no_checkpoint:
            raise ConfigError(
                f"exp_manager.resume_if_exists is set, but {folder} holds no finished checkpoint. Set "
                "exp_manager.resume_ignore_no_checkpoint=true to start from the beginning."
            )
        return last
    if last is not None:
        # a later resume could not tell the two runs' checkpoints apart
        raise ConfigError(
            f"exp_manager.resume_if_exists=false, but {folder} holds the checkpoints of another run. Name another "
            "folder in exp_manager.explicit_log_dir, or remove it."
        )
    return None


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
    newest = newest_last(folder)
    adapters = config.model.peft.lora_tuning.restore_from_path
    if newest is None and config.model.kto.reference.checkpoint is None and adapters is None:
        raise ConfigError(
            f"There is nothing to evaluate: {folder} holds no finished checkpoint, and without one the model is its "
            "own reference. Set exp_manager.explicit_log_dir or evaluation.checkpoint to what was trained, or "
            "model.kto.reference.checkpoint to what pretrained_checkpoint.restore_from_path is to be compared with."
        )
    return newest
