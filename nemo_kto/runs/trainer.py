"""The Lightning Trainer of a run: its settings, loggers and checkpoints, and how it ends early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from nemo.utils import exp_manager as nemo_manager
from transformers import PretrainedConfig

from nemo_kto import stopping
from nemo_kto.config.folders import HANG_FOLDER, PROFILE_FOLDER, STOP_FILE, export_directory, log_directory
from nemo_kto.config.plugins import load_object
from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError, StoppedEarly
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runs.model import params_dtype_of
from nemo_kto.runs.run import Run
from nemo_kto.runtime.checkpoint import FinishBackgroundSaves
from nemo_kto.runtime.launch import node_count
from nemo_kto.runtime.loggers import (
    new_wandb_run,
    open_mlflow,
    outlive_failures,
    outlive_log_files,
    read_runs,
    write_runs,
)
from nemo_kto.runtime.loop import GracefulStop, StartUpTime, StepLoop, StopReason
from nemo_kto.runtime.loop import graceful_stop as graceful_stop_of
from nemo_kto.runtime.meeting import RankRules
from nemo_kto.runtime.mishaps import understood
from nemo_kto.runtime.profiling import KEY, ProfileSteps
from nemo_kto.runtime.progress import progress
from nemo_kto.runtime.saving import RunCheckpoints
from nemo_kto.runtime.space import Plan, SpaceCheck
from nemo_kto.runtime.step_clock import StepTimes
from nemo_kto.runtime.strategy import MegatronStrategy
from nemo_kto.weights.folder import configured_dtype


def trainer_settings(run: Run) -> dict[str, Any]:
    """Return the Trainer's settings that do not depend on what it is to do."""
    nodes = node_count(run.config.trainer.num_nodes)
    return {
        "accelerator": run.accelerator,
        "devices": run.layout.world_size // nodes,
        "num_nodes": nodes,
        "precision": "32-true",  # Lightning's part only: Megatron's is in the model and the strategy
        "max_steps": run.schedule.total,
        "max_epochs": -1,
        "limit_val_batches": run.schedule.val_batches,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }


def strategy(
    run: Run, facts: Mapping[str, str], *, async_save: bool = False, source_folder: Path | None = None
) -> MegatronStrategy:
    """Return the run's strategy.

    Args:
        run: The run.
        facts: See `common_facts`.
        async_save: See `MegatronStrategy`.
        source_folder: See `MegatronStrategy`.
    """
    return MegatronStrategy(
        run.layout,
        run.config.model.optim,
        params_dtype=params_dtype_of(run.config),
        seed=run.config.model.seed,
        gradient_clip=run.config.trainer.kto.gradient_clip_val or 0.0,
        rules=RankRules(
            timeout=timedelta(minutes=run.config.trainer.timeout_minutes),
            hang_folder=log_directory(run.config) / HANG_FOLDER,
            facts=facts,
        ),
        async_save=async_save,
        source_folder=source_folder,
        verify_checkpoints=run.config.exp_manager.verify_checkpoints,
    )


def finishes(trainer: Trainer, action: Callable[[], Any]) -> bool:
    """Return whether what a trainer does came to its end; if it was stopped before training began, say so.

    Raises:
        RankError: Another rank of the run is gone.
        KTOError: What `action` raised, marked with whether it is for this rank to report it.
    """
    stop = graceful_stop_of(trainer)
    try:
        action()
    except StoppedEarly as done:
        if is_global_rank_zero():
            because = stop.because() if stop is not None else ""
            print(f"Stopped after {done}{because}; run the same command to continue.", flush=True)
    except (stopping.Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:
        watchdog = trainer.strategy.watchdog  # type: ignore[attr-defined]
        own = understood(error)
        settled = own if watchdog is None else watchdog.ranks.settle(own)
        if settled is error:
            raise
        raise settled from error
    stopped = stop is not None and stop.reason != StopReason.NONE and trainer.global_step < trainer.max_steps
    if stop is not None and is_global_rank_zero():
        stop.remove_file()
    if stopped:
        trainer.strategy.watchdog.ranks.leave_together()  # type: ignore[attr-defined]
    return not stopped


def named_callbacks(config: KTOConfig) -> list[Callback]:
    """Return the Lightning callbacks that `trainer.callbacks` names, as Hydra makes them.

    Raises:
        ConfigError: One cannot be made, or is no callback.
    """
    made = []
    for number, settings in enumerate(config.trainer.callbacks or ()):
        key = f"trainer.callbacks[{number}]"
        load_object(settings["_target_"], key=f"{key}._target_")  # says better than Hydra what is not there
        try:
            callback = instantiate(settings)
        except InstantiationException as error:
            raise ConfigError(f"{key} cannot be made: {' '.join(str(error).split())}") from error
        if not isinstance(callback, Callback):
            kind = type(callback).__name__
            raise ConfigError(f"{key} is of type {kind}, no Callback of lightning.pytorch.")
        made.append(callback)
    return made


def graceful_stop(config: KTOConfig) -> GracefulStop:
    """Return what ends a run early: signals, a file, or `exp_manager.max_time_per_run`, counted from now."""
    return GracefulStop(_time_limit(config.exp_manager.max_time_per_run), file=log_directory(config) / STOP_FILE)


def _time_limit(text: str | None) -> timedelta | None:
    """Return the time meant by DD:HH:MM:SS; `parse_config` has checked the form."""
    if text is None:
        return None
    days, hours, minutes, seconds = (int(part) for part in text.split(":"))
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def training_trainer(run: Run, facts: Mapping[str, str], *, source_folder: Path, resumes: bool) -> Trainer:
    """Return the trainer of a training run, with loggers and checkpoints, all else still to be added.

    Args:
        run: The run.
        facts: See `common_facts`.
        source_folder: See `MegatronStrategy`.
        resumes: Whether the run goes on from a checkpoint.
    """
    config, schedule = run.config, run.schedule
    params = config.exp_manager.checkpoint_callback_params
    trainer = Trainer(
        **trainer_settings(run),
        strategy=strategy(run, facts, async_save=params.async_save, source_folder=source_folder),
        log_every_n_steps=config.trainer.log_every_n_steps,
        callbacks=[
            progress(),
            StartUpTime(),
            StepTimes(),
            SpaceCheck(_space_plan(run)),
            *([FinishBackgroundSaves()] if params.async_save else []),
            *_profile(config, schedule.total),
        ],
    )
    trainer.fit_loop.epoch_loop = StepLoop(
        trainer, val_interval=schedule.val_interval, save_interval=config.trainer.kto.save_interval or 0
    )
    _add_loggers_and_checkpoints(trainer, config, validates=bool(schedule.val_interval), resumes=resumes)
    checkpoints: Any = trainer.checkpoint_callback
    if checkpoints is not None:
        RunCheckpoints.adopt(checkpoints, trainer)
        checkpoints.CHECKPOINT_NAME_LAST = f"{config.exp_manager.name}-{{step}}-last"
        checkpoints._enable_version_counter = False  # the same step has the same name; see ShardedCheckpointIO
    return trainer


def _profile(config: KTOConfig, total_steps: int) -> list[Callback]:
    """Return what profiles the steps that `trainer.profile_steps` names, if it names some."""
    steps = config.trainer.profile_steps
    if steps is None:
        return []
    if steps[0] > total_steps:
        raise ConfigError(f"{KEY}={steps}: the run has no more than {total_steps} steps. Name some of them.")
    return [ProfileSteps(steps, log_directory(config) / PROFILE_FOLDER)]


def _space_plan(run: Run) -> Plan:
    """Return what the run is going to write."""
    best = run.config.exp_manager.checkpoint_callback_params.save_top_k if run.schedule.val_interval else 0
    if best == -1:
        best = -(-run.schedule.total // run.schedule.val_interval)
    return space_plan(run.config, run.hf_config, adapters=run.lora is not None, best=best)


def space_plan(config: KTOConfig, hf_config: PretrainedConfig, *, adapters: bool, best: int) -> Plan:
    """Return what a run is going to write.

    Args:
        config: Its configuration.
        hf_config: The model's.
        adapters: Whether those are trained, not the model.
        best: How many of the best checkpoints are kept.
    """
    manager, export, params_dtype = config.exp_manager, config.export, params_dtype_of(config)
    named = None if export.dtype == "auto" else getattr(torch, export.dtype)
    return Plan(
        checkpoints=log_directory(config) / "checkpoints" if manager.create_checkpoint_callback else None,
        at_once=best + 2,  # the last one, and the one that is to replace it
        params_dtype=params_dtype,
        export=export_directory(config) if export.enabled else None,
        export_dtype=named or configured_dtype(hf_config) or params_dtype,
        whole_model=not adapters or export.merge_adapters,
    )


def _add_loggers_and_checkpoints(trainer: Trainer, config: KTOConfig, *, validates: bool, resumes: bool) -> None:
    """Have NeMo's exp_manager add both; a resumed run goes on in the runs of the loggers that it has written to."""
    manager, log_dir, leads = config.exp_manager, log_directory(config), is_global_rank_zero()
    mlflow_settings = manager.mlflow_logger_kwargs or {}
    runs = read_runs(log_dir) if resumes and leads else {}
    if manager.create_wandb_logger:
        runs.setdefault("wandb", new_wandb_run())
    nemo_manager.check_slurm = lambda _: True  # it finds no Slurm, and no torchrun, in this version of Lightning
    nemo_manager.exp_manager(trainer, _exp_manager_settings(config, validates=validates, wandb_run=runs.get("wandb")))
    if manager.create_mlflow_logger and leads:
        mlflow = open_mlflow(mlflow_settings, name=manager.name, log_dir=log_dir, run_id=runs.get("mlflow"))
        trainer.loggers = [*trainer.loggers, mlflow]
        runs["mlflow"] = mlflow.run_id
    if runs and leads:
        write_runs(log_dir, runs)
    outlive_failures(trainer.loggers, log_dir)
    outlive_log_files()


def _exp_manager_settings(config: KTOConfig, *, validates: bool, wandb_run: str | None) -> dict[str, Any]:
    """Return NeMo's exp_manager configuration; its logger for MLflow does not work, see `open_mlflow`."""
    manager, log_dir = config.exp_manager, log_directory(config)
    params = manager.checkpoint_callback_params
    return {
        "explicit_log_dir": str(log_dir),
        "name": manager.name,
        "resume_if_exists": False,  # see resumable_checkpoint
        "seconds_to_sleep": 0,
        "log_step_timing": False,
        "log_tflops_per_sec_per_gpu": False,
        "disable_validation_on_resume": False,
        "create_preemption_callback": False,
        "create_tensorboard_logger": manager.create_tensorboard_logger,
        "create_wandb_logger": manager.create_wandb_logger,
        "wandb_logger_kwargs": {"id": wandb_run, **(manager.wandb_logger_kwargs or {})},
        "create_checkpoint_callback": manager.create_checkpoint_callback,
        "checkpoint_callback_params": {
            "monitor": params.monitor,
            "mode": params.mode,
            "save_top_k": params.save_top_k if validates else 0,
            "async_save": params.async_save,
            "save_last": True,
            "every_n_epochs": 1,
            "save_on_train_epoch_end": False,
            "save_nemo_on_train_end": False,
            "filename": f"{manager.name}-{{step}}-{{{params.monitor}:.4f}}"
            if validates
            else f"{manager.name}-{{step}}",
        },
    }
