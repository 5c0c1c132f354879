"""From a configuration to a trained, exported model: checks first, then data, then processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from nemo_kto import stopping
from nemo_kto.commands.export import ExportAtEnd, export_checkpoint, is_uploaded, note_export, upload_export
from nemo_kto.config.folders import (
    ANSWERS_FILE,
    DIVERGED_FILE,
    export_directory,
    export_folder,
    log_directory,
    log_directory_key,
    model_folder,
    tokenizer_folder,
)
from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import KTOError
from nemo_kto.generation.answers import AnswerPrompts
from nemo_kto.generation.decoding import Sampling
from nemo_kto.generation.prompts import stop_token_ids
from nemo_kto.kto.divergence import RecordsFile
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runs.checkpoints import resumable_checkpoint
from nemo_kto.runs.data import prompts_to_answer
from nemo_kto.runs.early import check_folders, check_upload
from nemo_kto.runs.facts import common_facts, run_facts, write_facts
from nemo_kto.runs.resume import check_same_run, contents, run_identity, write_identity
from nemo_kto.runs.run import Run, prepare
from nemo_kto.runs.schedule import Schedule, warn_about_rates
from nemo_kto.runs.trainer import finishes, graceful_stop, named_callbacks, training_trainer
from nemo_kto.runtime.checkpoint_folders import step_of
from nemo_kto.runtime.disk import explained
from nemo_kto.runtime.launch import launch
from nemo_kto.runtime.log_lock import FOLDER as LOCK_FOLDER
from nemo_kto.runtime.log_lock import log_folder_held
from nemo_kto.runtime.loop import GracefulStop
from nemo_kto.weights.source_folder import write_source_folder

logger = logging.getLogger(__name__)


def train(config: KTOConfig, *, callbacks: Sequence[Callback] = ()) -> bool:
    """Run KTO as configured, from the Hugging Face folder to the exported one.

    What can be wrong with configuration, layout and data is found before Lightning starts the other processes of this
    node; weights are compared with the model when each process reads its part.

    Args:
        config: The configuration.
        callbacks: Lightning callbacks to run besides those of this package.

    Returns:
        Whether the run has taken all its steps; False if it was stopped earlier, to be run again.

    Raises:
        ConfigError: The configuration or layout cannot work, or another run is writing to the log folder.
        DataError: A data file cannot be used.
        CheckpointError: The model folder or a checkpoint cannot be used, or a checkpoint not be written.
        DivergenceError: A loss, gradient or parameter is not finite.
        RankError: Another process of the run is gone, or cannot be reached.
        UploadError: The run is complete, but what it exported could not be uploaded.
    """
    stop = graceful_stop(config)  # its time begins here
    log_dir = log_directory(config)
    check_folders(config, "train")
    check_upload(config)
    held = log_folder_held(log_dir, log_directory_key(config))
    try:
        with held if is_global_rank_zero() else nullcontext(log_dir / LOCK_FOLDER) as own_folder:
            return _train(config, stop, source_folder=own_folder / "source", callbacks=callbacks)
    finally:
        stopping.give_back()


def _train(config: KTOConfig, stop: GracefulStop, *, source_folder: Path, callbacks: Sequence[Callback]) -> bool:
    """Do so, as the one run of the log folder.

    Args:
        config: The configuration.
        stop: What ends the run early.
        source_folder: Folder for what every checkpoint gets a copy of, which rank 0 makes.
        callbacks: See `train`.
    """
    named = named_callbacks(config)
    run = prepare(config)
    config, log_dir = run.config, log_directory(run.config)
    warn_about_rates(config, run.schedule)
    identity = run_identity(config, run.hf_config, run.data, lora=run.lora, reference=run.reference)
    last = _checkpoint_to_resume(config, run, identity)
    if last is not None and step_of(last) >= run.schedule.total:
        _finish(config, last, run.schedule)
        return True
    export_to = export_folder(config, resumes=last is not None)

    if is_global_rank_zero():
        facts = run_facts(run)
        with explained(log_dir, log_directory_key(config)):
            _write_source(source_folder, run, identity, facts)
        steps = f"{run.schedule.total} steps, {run.schedule.per_epoch} per epoch"
        print(f"{steps}, on {run.accelerator}, {run.layout}, {launch()}", flush=True)
        if last is not None:
            print(f"Resuming from step {step_of(last)} of {run.schedule.total}: {last}", flush=True)
    common = common_facts(run, {**contents(identity), "the checkpoint to go on from": last})
    with explained(log_dir, log_directory_key(config)):
        trainer = training_trainer(run, common, source_folder=source_folder, resumes=last is not None)
    # now: exp_manager puts a folder's older files aside
    run.data.list_bad_records(log_dir / "bad_records.jsonl")
    if is_global_rank_zero():
        with explained(log_dir, log_directory_key(config)):
            write_facts(log_dir, facts)
    added: list[Callback] = [stop]
    if export_to is not None:
        replace = last is not None and config.export.folder is None
        added.append(ExportAtEnd(export_to, source_folder, replace=replace))
    model = run.model()
    model.records_file = RecordsFile(log_dir / DIVERGED_FILE, run.tokenizer, run.data)
    if config.generation.num_prompts and not run.schedule.val_interval and is_global_rank_zero():
        logger.warning(
            "generation.num_prompts=%d: prompts are answered after validations, and there is no validation data.",
            config.generation.num_prompts,
        )
    if config.generation.num_prompts:
        answers = _answers(run, log_dir)
        added.append(answers)
        model.visit_reference = answers.answer_as_reference
    trainer.callbacks.extend([*added, *named, *callbacks])  # type: ignore[attr-defined]
    finished = finishes(trainer, partial(trainer.fit, model, datamodule=run.data, ckpt_path=last))
    if is_global_rank_zero():
        print(f"Logs and checkpoints: {log_dir}", flush=True)
        if trainer.global_step == trainer.max_steps:
            _report(config, log_dir)
            stopping.finished()  # an upload can be cut off at any time: the same command makes up for it
            upload_export(config, step=trainer.global_step)
    return finished


def _checkpoint_to_resume(config: KTOConfig, run: Run, identity: dict[str, Any]) -> Path | None:
    """Return the checkpoint that the run goes on from, which is its own; None for none."""
    log_dir = log_directory(config)
    last = resumable_checkpoint(config, log_dir, clear=True)
    if last is not None and step_of(last) >= run.schedule.total and config.exp_manager.verify_checkpoints:
        # what would be said to be the end is looked at closely; before training goes on, the ranks share that work
        last = resumable_checkpoint(config, log_dir, checksums=True, clear=True)
    if last is not None:
        check_same_run(last, identity)
    return last


def _write_source(folder: Path, run: Run, identity: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write what every checkpoint gets a copy of."""
    folder.mkdir()
    config = run.config
    write_source_folder(
        folder,
        run.hf_config,
        model_folder=model_folder(config),
        tokenizer_folder=tokenizer_folder(config),
        lora=run.lora,
    )
    write_identity(folder, identity)
    write_facts(folder, facts)


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
        stop_token_ids=stop_token_ids(run.tokenizer, model_folder(run.config), tokenizer_folder(run.config)),
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
    from nemo_kto.reporting.report import write_report  # matplotlib only where it is needed

    try:
        page = write_report([log_dir], log_dir / "report")
    except KTOError as error:
        logger.warning("There is no report: %s", error)
    except Exception:  # of the libraries that draw
        logger.warning("There is no report; `nemo-kto report %s` tries again.", log_dir, exc_info=True)
    else:
        print(f"Report: {page}", flush=True)


def _finish(config: KTOConfig, last: Path, schedule: Schedule) -> None:
    """Say that there is nothing left to train; export, and draw, if the run was killed before it had."""
    if not is_global_rank_zero():
        return
    print(f"The run has taken its {schedule.total} steps already: {last}", flush=True)
    if config.export.enabled:
        folder = export_directory(config)
        if not folder.exists():
            export = config.export
            export_checkpoint(
                last,
                folder,
                merge=export.merge_adapters,
                into_original=export.merge_into_original,
                dtype=export.dtype,
            )
            note_export(config, step=step_of(last))
        adapter = config.model.peft.peft_scheme == "lora" and not config.export.merge_adapters
        print(f"Aligned {'adapter' if adapter else 'model'}: {folder}", flush=True)
    log_dir = log_directory(config)
    if not (log_dir / "report").exists():
        _report(config, log_dir)
    if not is_uploaded(config, step=step_of(last)):
        upload_export(config, step=step_of(last))
