"""From a configuration to a trained, exported model: checks first, then data, then processes."""

from __future__ import annotations

import dataclasses
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig
from transformers import PretrainedConfig

from nemo_kto import resolve
from nemo_kto.cli import run_guarded
from nemo_kto.config import KTOConfig, config_dir, parse_config
from nemo_kto.data.datamodule import KTODataModule
from nemo_kto.data.tokenizer import load_tokenizer
from nemo_kto.errors import StoppedEarly
from nemo_kto.models.export import ExportAtEnd, export_checkpoint, write_source_folder
from nemo_kto.models.lora import LoRASettings
from nemo_kto.models.megatron_gpt_kto_model import MegatronGPTKTOModel
from nemo_kto.models.reference import ReferenceSettings
from nemo_kto.quiet import is_global_rank_zero, silence_loaded_packages
from nemo_kto.resolve_data import read_data, settle_loss_weights
from nemo_kto.resolve_reference import cache_settings, lora_settings, reference_settings
from nemo_kto.resume import check_same_run, resumable_checkpoint, run_identity, write_identity
from nemo_kto.runtime import cpu_megatron
from nemo_kto.runtime.checkpoint import FinishBackgroundSaves, step_of
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.loop import GracefulStop, ProgressBar, StepLoop
from nemo_kto.runtime.strategy import MegatronStrategy

_PLAIN_OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w.]*=")


def main() -> None:
    """Run the training command: configuration from conf/gpt_kto.yaml and the command line."""
    run_configured(train, sys.argv[1:])


def run_configured(action: Callable[[KTOConfig], None], overrides: Sequence[str]) -> None:
    """Run `action` with the configuration from conf/gpt_kto.yaml and `overrides` of the command line."""
    silence_loaded_packages()
    command = list(sys.argv)

    def act(raw: DictConfig) -> None:
        sys.argv = command  # Lightning starts the other processes with it
        # Hydra turns exceptions into its own report: ours must not reach it
        run_guarded(lambda: action(parse_config(raw)))

    sys.argv = [command[0], *(_forced(argument) for argument in overrides)]
    run_guarded(hydra_runner(config_path=str(config_dir()), config_name="gpt_kto")(act))


def _forced(argument: str) -> str:
    """Return an override that Hydra accepts for any key: `parse_config` judges keys, NeMo-Aligner's included."""
    plain = argument.lstrip("+")
    return "++" + plain if _PLAIN_OVERRIDE.match(argument) and not plain.startswith("hydra.") else argument


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a configuration was found to mean."""

    config: KTOConfig
    accelerator: str
    layout: Layout
    hf_config: PretrainedConfig
    lora: LoRASettings | None
    reference: ReferenceSettings
    data: KTODataModule
    schedule: resolve.Schedule

    def model(self) -> MegatronGPTKTOModel:
        return MegatronGPTKTOModel(
            self.config,
            self.hf_config,
            layout=self.layout,
            params_dtype=resolve.params_dtype(self.config),
            recompute=resolve.recompute(self.config),
            lora=self.lora,
            reference=self.reference,
            steps_per_epoch=self.schedule.per_epoch,
            val_batches=self.schedule.val_batches,
        )


def _prepare(config: KTOConfig) -> _Run:
    """Check the configuration and read the data, as every process does."""
    accelerator = resolve.accelerator(config)
    if accelerator == "cpu":
        cpu_megatron.enable_cpu()
    tokenizer = load_tokenizer(resolve.tokenizer_folder(config))
    hf_config = resolve.model(config, tokenizer)
    layout = resolve.layout(config, hf_config, accelerator)
    lora = lora_settings(config, hf_config)
    reference = reference_settings(config, hf_config, lora, accelerator=accelerator)
    data = read_data(config, tokenizer, max_positions=hf_config.max_position_embeddings)
    config = settle_loss_weights(config, data)
    if reference.mode == "cached":
        cache = cache_settings(config, hf_config, reference, data, tokenizer)
        reference = dataclasses.replace(reference, cache=cache)
    return _Run(
        config=config,
        accelerator=accelerator,
        layout=layout,
        hf_config=hf_config,
        lora=lora,
        reference=reference,
        data=data,
        schedule=resolve.plan_schedule(config, data),
    )


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
    run = _prepare(config)
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
            steps = f"{run.schedule.total} steps, {run.schedule.per_epoch} per epoch"
            print(f"{steps}, on {run.accelerator}, {run.layout}", flush=True)
        trainer = _make_trainer(run, source_folder=source_folder)
        run.data.list_bad_records(log_dir / "bad_records.jsonl")  # now: exp_manager puts a folder's files aside
        trainer.callbacks.extend([stop, *callbacks])  # type: ignore[attr-defined]
        if export_folder is not None:
            replace = last is not None and config.export.folder is None
            trainer.callbacks.append(ExportAtEnd(export_folder, source_folder, replace=replace))  # type: ignore[attr-defined]
        if not _finishes(partial(trainer.fit, run.model(), datamodule=run.data, ckpt_path=last)):
            return
    if is_global_rank_zero():
        print(f"Logs and checkpoints: {log_dir}", flush=True)


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
    run = _prepare(config)
    assert run.reference.cache is not None, "reference.mode is cached"
    trainer = Trainer(
        **{**_trainer_settings(run), "limit_val_batches": 0},
        strategy=MegatronStrategy(
            run.layout,
            config.model.optim,
            params_dtype=resolve.params_dtype(config),
            seed=config.model.seed,
            gradient_clip=0.0,
        ),
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
    """Say that there is nothing left to train; export if the run was killed before it had."""
    if not is_global_rank_zero():
        return
    print(f"The run has taken its {schedule.total} steps already: {last}", flush=True)
    if config.export.enabled:
        folder = resolve.export_directory(config)
        if not folder.exists():
            export_checkpoint(last, folder, merge=config.export.merge_adapters)
        adapter = config.model.peft.peft_scheme == "lora" and not config.export.merge_adapters
        print(f"Aligned {'adapter' if adapter else 'model'}: {folder}", flush=True)


def _time_limit(text: str | None) -> timedelta | None:
    """Return the time meant by DD:HH:MM:SS; `parse_config` has checked the form."""
    if text is None:
        return None
    days, hours, minutes, seconds = (int(part) for part in text.split(":"))
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def _trainer_settings(run: _Run) -> dict[str, Any]:
    """Return the Trainer's settings that do not depend on what it is to do."""
    return {
        "accelerator": run.accelerator,
        "devices": run.layout.world_size // run.config.trainer.num_nodes,
        "num_nodes": run.config.trainer.num_nodes,
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


def _make_trainer(run: _Run, *, source_folder: Path) -> Trainer:
    config, schedule = run.config, run.schedule
    params = config.exp_manager.checkpoint_callback_params
    strategy = MegatronStrategy(
        run.layout,
        config.model.optim,
        params_dtype=resolve.params_dtype(config),
        seed=config.model.seed,
        gradient_clip=config.trainer.kto.gradient_clip_val or 0.0,
        async_save=params.async_save,
        source_folder=source_folder,
    )
    trainer = Trainer(
        **_trainer_settings(run),
        strategy=strategy,
        log_every_n_steps=config.trainer.log_every_n_steps,
        callbacks=[ProgressBar(), *([FinishBackgroundSaves()] if params.async_save else [])],
    )
    trainer.fit_loop.epoch_loop = StepLoop(
        trainer, val_interval=schedule.val_interval, save_interval=config.trainer.kto.save_interval or 0
    )
    exp_manager(trainer, _exp_manager_settings(config, validates=bool(schedule.val_interval)))
    checkpoints: Any = trainer.checkpoint_callback
    if checkpoints is not None:
        checkpoints.CHECKPOINT_NAME_LAST = f"{config.exp_manager.name}-{{step}}-last"
        checkpoints._enable_version_counter = False  # the same step has the same name; see ShardedCheckpointIO
    return trainer


def _exp_manager_settings(config: KTOConfig, *, validates: bool) -> dict[str, Any]:
    """Return NeMo's exp_manager configuration."""
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
        "wandb_logger_kwargs": manager.wandb_logger_kwargs,
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
