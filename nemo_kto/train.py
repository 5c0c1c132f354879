"""From a configuration to a trained, exported model: checks first, then data, then processes."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from nemo.utils.exp_manager import exp_manager

from nemo_kto import resolve
from nemo_kto.config import KTOConfig
from nemo_kto.errors import KTOError, StoppedEarly
from nemo_kto.facts import run_facts, write_facts
from nemo_kto.generate import stop_token_ids
from nemo_kto.log_files import ANSWERS_FILE
from nemo_kto.models.answers import AnswerPrompts
from nemo_kto.models.export import ExportAtEnd, export_checkpoint, write_source_folder
from nemo_kto.models.generation import Sampling
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.resolve_data import prompts_to_answer
from nemo_kto.resume import check_same_run, resumable_checkpoint, run_identity, write_identity
from nemo_kto.run import Run, prepare, run_configured, strategy, trainer_settings
from nemo_kto.runtime.checkpoint import FinishBackgroundSaves, step_of
from nemo_kto.runtime.loggers import new_wandb_run, open_mlflow, read_runs, write_runs
from nemo_kto.runtime.loop import GracefulStop, ProgressBar, StartUpTime, StepLoop

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the training command: configuration from conf/gpt_kto.yaml and the command line."""
    run_configured(train, sys.argv[1:])


def train(config: KTOConfig, *, callbacks: Sequence[Callback] = ()) -> None:
    """Run KTO as configured, from the Hugging Face folder to the exported one.

    What can be wrong with configuration, layout and data is found before Lightning starts the other processes of this
    node; weights are compared with the model when each process reads its part.

    Args:
        config: The configuration.
        callbacks: Lightning callbacks to run besides those of this package.

    Raises:
        ConfigError: The configuration or layout cannot work.
        DataError: A data file cannot be used.
        CheckpointError: The model folder or a checkpoint cannot be used, or a checkpoint not be written.
        DivergenceError: A gradient is not finite.
    """
    stop = GracefulStop(_time_limit(config.exp_manager.max_time_per_run))  # its time begins here
    run = prepare(config)
    config = run.config
    resolve.warn_about_rates(config, run.schedule)
    log_dir = resolve.log_directory(config)
    identity = run_identity(config, run.hf_config, run.data, lora=run.lora, reference=run.reference)
    last = resumable_checkpoint(config, log_dir)
    if last is not None:
        check_same_run(last, identity)
        if step_of(last) >= run.schedule.total:
            _finish(config, last, run.schedule)
            return
    export_folder = resolve.export_folder(config, resumes=last is not None)

    with tempfile.TemporaryDirectory(prefix="nemo_kto-") as temporary:
        source_folder = Path(temporary)
        if is_global_rank_zero():
            write_source_folder(
                source_folder,
                run.hf_config,
                model_folder=resolve.model_folder(config),
                tokenizer_folder=resolve.tokenizer_folder(config),
                lora=run.lora,
            )
            write_identity(source_folder, identity)
            facts = run_facts(run)
            write_facts(source_folder, facts)
            steps = f"{run.schedule.total} steps, {run.schedule.per_epoch} per epoch"
            print(f"{steps}, on {run.accelerator}, {run.layout}", flush=True)
        trainer = _make_trainer(run, source_folder=source_folder, resumes=last is not None)
        # now: exp_manager puts a folder's older files aside
        run.data.list_bad_records(log_dir / "bad_records.jsonl")
        if is_global_rank_zero():
            write_facts(log_dir, facts)
        trainer.callbacks.extend([stop, *callbacks])  # type: ignore[attr-defined]
        if export_folder is not None:
            replace = last is not None and config.export.folder is None
            trainer.callbacks.append(ExportAtEnd(export_folder, source_folder, replace=replace))  # type: ignore[attr-defined]
        model = run.model()
        if config.generation.num_prompts:
            answers = _answers(run, log_dir)
            trainer.callbacks.append(answers)  # type: ignore[attr-defined]
            model.visit_reference = answers.answer_as_reference
        if not _finishes(partial(trainer.fit, model, datamodule=run.data, ckpt_path=last)):
            return
    if is_global_rank_zero():
        print(f"Logs and checkpoints: {log_dir}", flush=True)
        if trainer.global_step == trainer.max_steps:
            _report(config, log_dir)


def _answers(run: Run, log_dir: Path) -> AnswerPrompts:
    """Return the callback that answers prompts."""
    settings, max_positions = run.config.generation, run.hf_config.max_position_embeddings
    return AnswerPrompts(
        prompts_to_answer(run.config, run.data, max_positions=max_positions),
        run.tokenizer,
        Sampling(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=run.config.model.seed,
        ),
        stop_token_ids=stop_token_ids(
            run.tokenizer, resolve.model_folder(run.config), resolve.tokenizer_folder(run.config)
        ),
        every=settings.every_n_validations,
        file=log_dir / ANSWERS_FILE,
    )


def _report(config: KTOConfig, log_dir: Path) -> None:
    """Write the pictures of a run; one that has come to its end does not fail for them."""
    if not config.report.enabled:
        return
    if not config.exp_manager.create_tensorboard_logger:
        print("Report: none, as exp_manager.create_tensorboard_logger=false leaves nothing to draw.", flush=True)
        return
    from nemo_kto.report import write_report  # matplotlib only where it is needed

    try:
        page = write_report([log_dir], log_dir / "report")
    except KTOError as error:
        logger.warning("There is no report: %s", error)
    except Exception:  # of the libraries that draw
        logger.warning("There is no report; `nemo-kto report %s` tries again.", log_dir, exc_info=True)
    else:
        print(f"Report: {page}", flush=True)


def cache_reference(config: KTOConfig) -> None:
    """Compute the reference's log-probs that a run needs and keep them on disk; the run then looks them up.

    Args:
        config: The configuration of that run, with `model.kto.reference.mode=cached`; its layout may be another.

    Raises:
        ConfigError: See `train`; also when the folder's log-probs were computed from something else.
        DataError: See `train`.
        CheckpointError: See `train`.
    """
    stop = GracefulStop(_time_limit(config.exp_manager.max_time_per_run))
    run = prepare(config)
    assert run.reference.cache is not None, "reference.mode is cached"
    trainer = Trainer(
        **{**trainer_settings(run), "limit_val_batches": 0},
        strategy=strategy(run),
        callbacks=[stop],
    )
    # only sets the model up, which does it: there is nothing to validate
    finished = _finishes(partial(trainer.validate, run.model(), datamodule=run.data, verbose=False))
    if finished and is_global_rank_zero():
        print(f"Reference log-probs: {run.reference.cache.folder}", flush=True)


def _finishes(action: Callable[[], Any]) -> bool:
    """Return whether `action` came to its end; if it was stopped before training began, say so."""
    try:
        action()
    except StoppedEarly as done:
        if is_global_rank_zero():
            print(f"Stopped after {done}; run the same command to continue.", flush=True)
        return False
    return True


def _finish(config: KTOConfig, last: Path, schedule: resolve.Schedule) -> None:
    """Say that there is nothing left to train; export, and draw, if the run was killed before it had."""
    if not is_global_rank_zero():
        return
    print(f"The run has taken its {schedule.total} steps already: {last}", flush=True)
    if config.export.enabled:
        folder = resolve.export_directory(config)
        if not folder.exists():
            export_checkpoint(last, folder, merge=config.export.merge_adapters)
        adapter = config.model.peft.peft_scheme == "lora" and not config.export.merge_adapters
        print(f"Aligned {'adapter' if adapter else 'model'}: {folder}", flush=True)
    log_dir = resolve.log_directory(config)
    if not (log_dir / "report").exists():
        _report(config, log_dir)


def _time_limit(text: str | None) -> timedelta | None:
    """Return the time meant by DD:HH:MM:SS; `parse_config` has checked the form."""
    if text is None:
        return None
    days, hours, minutes, seconds = (int(part) for part in text.split(":"))
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def _make_trainer(run: Run, *, source_folder: Path, resumes: bool) -> Trainer:
    config, schedule = run.config, run.schedule
    params = config.exp_manager.checkpoint_callback_params
    trainer = Trainer(
        **trainer_settings(run),
        strategy=strategy(run, async_save=params.async_save, source_folder=source_folder),
        log_every_n_steps=config.trainer.log_every_n_steps,
        callbacks=[ProgressBar(), StartUpTime(), *([FinishBackgroundSaves()] if params.async_save else [])],
    )
    trainer.fit_loop.epoch_loop = StepLoop(
        trainer, val_interval=schedule.val_interval, save_interval=config.trainer.kto.save_interval or 0
    )
    _add_loggers_and_checkpoints(trainer, config, validates=bool(schedule.val_interval), resumes=resumes)
    checkpoints: Any = trainer.checkpoint_callback
    if checkpoints is not None:
        checkpoints.CHECKPOINT_NAME_LAST = f"{config.exp_manager.name}-{{step}}-last"
        checkpoints._enable_version_counter = False  # the same step has the same name; see ShardedCheckpointIO
    return trainer


def _add_loggers_and_checkpoints(trainer: Trainer, config: KTOConfig, *, validates: bool, resumes: bool) -> None:
    """Have NeMo's exp_manager add both; a resumed run goes on in the runs of the loggers that it has written to."""
    manager, log_dir, leads = config.exp_manager, resolve.log_directory(config), is_global_rank_zero()
    mlflow_settings = manager.mlflow_logger_kwargs or {}
    runs = read_runs(log_dir) if resumes and leads else {}
    if manager.create_wandb_logger:
        runs.setdefault("wandb", new_wandb_run())
    exp_manager(trainer, _exp_manager_settings(config, validates=validates, wandb_run=runs.get("wandb")))
    if manager.create_mlflow_logger and leads:
        mlflow = open_mlflow(mlflow_settings, name=manager.name, log_dir=log_dir, run_id=runs.get("mlflow"))
        trainer.loggers = [*trainer.loggers, mlflow]
        runs["mlflow"] = mlflow.run_id
    if runs and leads:
        write_runs(log_dir, runs)


def _exp_manager_settings(config: KTOConfig, *, validates: bool, wandb_run: str | None) -> dict[str, Any]:
    """Return NeMo's exp_manager configuration; its logger for MLflow does not work, see `open_mlflow`."""
    manager, log_dir = config.exp_manager, resolve.log_directory(config)
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
