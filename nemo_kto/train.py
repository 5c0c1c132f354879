"""From a configuration to a trained, exported model: checks first, then data, then processes."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from nemo_kto import resolve
from nemo_kto.cli import run_guarded
from nemo_kto.config import KTOConfig, config_dir, parse_config
from nemo_kto.data.datamodule import KTODataModule
from nemo_kto.data.tokenization import load_tokenizer
from nemo_kto.errors import ConfigError
from nemo_kto.models.export import ExportAtEnd, export_checkpoint, write_source_folder
from nemo_kto.models.megatron_gpt_kto_model import MegatronGPTKTOModel
from nemo_kto.quiet import is_global_rank_zero, silence_loaded_packages
from nemo_kto.resume import check_same_run, resumable_checkpoint, run_identity, write_identity
from nemo_kto.runtime import cpu_megatron
from nemo_kto.runtime.checkpoint import FinishBackgroundSaves, step_of
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.loop import GracefulStop, ProgressBar, StepLoop
from nemo_kto.runtime.strategy import MegatronStrategy

_PLAIN_OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w.]*=")


def main() -> None:
    """Run the training command: configuration from conf/gpt_kto.yaml and the command line."""
    silence_loaded_packages()
    sys.argv[1:] = [_forced(argument) for argument in sys.argv[1:]]
    run_guarded(hydra_runner(config_path=str(config_dir()), config_name="gpt_kto")(_train_from_hydra))


def _forced(argument: str) -> str:
    """Return an override that Hydra accepts for any key: `parse_config` judges keys, NeMo-Aligner's included."""
    plain = argument.lstrip("+")
    return "++" + plain if _PLAIN_OVERRIDE.match(argument) and not plain.startswith("hydra.") else argument


def _train_from_hydra(raw: DictConfig) -> None:
    # Hydra turns exceptions into its own report: ours must not reach it
    run_guarded(lambda: train(parse_config(raw)))


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
    accelerator = resolve.accelerator(config)
    if accelerator == "cpu":
        cpu_megatron.enable_cpu()
    tokenizer = load_tokenizer(resolve.tokenizer_folder(config))
    hf_config = resolve.model(config, tokenizer)
    layout = resolve.layout(config, hf_config, accelerator)
    data = _read_data(config, tokenizer, max_positions=hf_config.max_position_embeddings)
    schedule = resolve.plan_schedule(config, data)
    resolve.warn_about_rates(config, schedule)

    log_dir = resolve.log_directory(config)
    identity = run_identity(config, hf_config, data)
    last = resumable_checkpoint(config, log_dir)
    if last is not None:
        check_same_run(last, identity)
        if step_of(last) >= schedule.total:
            _finish(config, last, schedule)
            return
    export_folder = resolve.export_folder(config, resumes=last is not None)

    with tempfile.TemporaryDirectory(prefix="nemo_kto-") as temporary:
        source_folder = Path(temporary)
        if is_global_rank_zero():
            write_source_folder(
                source_folder,
                hf_config,
                model_folder=resolve.model_folder(config),
                tokenizer_folder=resolve.tokenizer_folder(config),
            )
            write_identity(source_folder, identity)
            print(f"{schedule.total} steps, {schedule.per_epoch} per epoch, on {accelerator}, {layout}", flush=True)
        trainer = _make_trainer(config, layout, accelerator, schedule=schedule, source_folder=source_folder)
        trainer.callbacks.extend([stop, *callbacks])  # type: ignore[attr-defined]
        if export_folder is not None:
            replace = last is not None and config.export.folder is None
            trainer.callbacks.append(ExportAtEnd(export_folder, source_folder, replace=replace))  # type: ignore[attr-defined]
        model = MegatronGPTKTOModel(
            config,
            hf_config,
            layout=layout,
            params_dtype=resolve.params_dtype(config),
            recompute=resolve.recompute(config),
            steps_per_epoch=schedule.per_epoch,
        )
        trainer.fit(model, datamodule=data, ckpt_path=last)
    if is_global_rank_zero():
        print(f"Logs and checkpoints: {log_dir}", flush=True)


def _finish(config: KTOConfig, last: Path, schedule: resolve.Schedule) -> None:
    """Say that there is nothing left to train; export if the run was killed before it had."""
    if not is_global_rank_zero():
        return
    print(f"The run has taken its {schedule.total} steps already: {last}", flush=True)
    if config.export.enabled:
        folder = resolve.export_directory(config)
        if not folder.exists():
            export_checkpoint(last, folder)
        print(f"Aligned model: {folder}", flush=True)


def _time_limit(text: str | None) -> timedelta | None:
    """Return the time meant by DD:HH:MM:SS; `parse_config` has checked the form."""
    if text is None:
        return None
    days, hours, minutes, seconds = (int(part) for part in text.split(":"))
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def _read_data(config: KTOConfig, tokenizer: PreTrainedTokenizerBase, *, max_positions: int) -> KTODataModule:
    model, data = config.model, config.model.data
    if not data.data_prefix.train:
        raise ConfigError("There is no training data. Set model.data.data_prefix.train to one or more JSONL files.")
    module = KTODataModule(
        train_files=data.data_prefix.train,
        validation_files=data.data_prefix.validation or (),
        format=data.format,
        tokenizer=tokenizer,
        max_length=min(data.seq_length, max_positions),
        max_positions=max_positions,
        append_eod=data.append_eod,
        global_batch_size=model.global_batch_size,
        shuffle=data.shuffle,
        seed=model.seed,
        num_workers=data.num_workers,
    )
    module.prepare()
    return module


def _make_trainer(
    config: KTOConfig, layout: Layout, accelerator: str, *, schedule: resolve.Schedule, source_folder: Path
) -> Trainer:
    params = config.exp_manager.checkpoint_callback_params
    strategy = MegatronStrategy(
        layout,
        config.model.optim,
        params_dtype=resolve.params_dtype(config),
        seed=config.model.seed,
        gradient_clip=config.trainer.kto.gradient_clip_val or 0.0,
        async_save=params.async_save,
        source_folder=source_folder,
    )
    trainer = Trainer(
        accelerator=accelerator,
        devices=layout.world_size // config.trainer.num_nodes,
        num_nodes=config.trainer.num_nodes,
        strategy=strategy,
        precision="32-true",  # Lightning's part only: Megatron's is in the model and the strategy
        max_steps=schedule.total,
        max_epochs=-1,
        limit_val_batches=schedule.val_batches,
        check_val_every_n_epoch=None,
        log_every_n_steps=config.trainer.log_every_n_steps,
        num_sanity_val_steps=0,
        callbacks=[ProgressBar(), *([FinishBackgroundSaves()] if params.async_save else [])],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
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
