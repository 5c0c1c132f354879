"""From a configuration to a trained, exported model: checks first, then data, then processes."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemo_kto.cli import run_guarded
from nemo_kto.config import KTOConfig, config_dir, parse_config
from nemo_kto.data.datamodule import KTODataModule
from nemo_kto.data.sampling import epoch_length
from nemo_kto.data.tokenization import load_tokenizer
from nemo_kto.errors import ConfigError
from nemo_kto.models.export import ExportAtEnd, export_checkpoint, write_source_folder
from nemo_kto.models.gpt import check_transformer_impl, hf_config_from_sizes, load_hf_config, padded_vocabulary
from nemo_kto.models.hf_weights import SafetensorsFolder
from nemo_kto.models.megatron_gpt_kto_model import MegatronGPTKTOModel
from nemo_kto.quiet import is_global_rank_zero, silence_loaded_packages
from nemo_kto.resume import check_same_run, resumable_checkpoint, run_identity, write_identity
from nemo_kto.runtime import cpu_megatron, parallel
from nemo_kto.runtime.checkpoint import step_of
from nemo_kto.runtime.loop import GracefulStop, ProgressBar, StepLoop
from nemo_kto.runtime.strategy import MegatronStrategy

_PLAIN_OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w.]*=")

_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "rotary_base",
    "layernorm_epsilon",
    "share_embeddings_and_output_weights",
)
"""Keys of `model` that describe a randomly initialised model, with the names `hf_config_from_sizes` takes."""


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
        CheckpointError: The model folder or a checkpoint cannot be used.
    """
    stop = GracefulStop(_time_limit(config.exp_manager.max_time_per_run))  # its time begins here
    accelerator = resolve_accelerator(config)
    if accelerator == "cpu":
        cpu_megatron.enable_cpu()
    tokenizer = load_tokenizer(_tokenizer_folder(config))
    hf_config = resolve_model(config, tokenizer)
    layout = resolve_layout(config, hf_config, accelerator)
    data = _read_data(config, tokenizer, max_positions=hf_config.max_position_embeddings)
    schedule = plan_schedule(config, data)

    log_dir = log_directory(config)
    identity = run_identity(config, hf_config, data)
    last = resumable_checkpoint(config, log_dir)
    if last is not None:
        check_same_run(last, identity)
        if step_of(last) >= schedule.total:
            _finish(config, last, schedule)
            return
    export_folder = resolve_export_folder(config, resumes=last is not None)

    with tempfile.TemporaryDirectory(prefix="nemo_kto-") as temporary:
        source_folder = Path(temporary)
        if is_global_rank_zero():
            write_source_folder(
                source_folder,
                hf_config,
                model_folder=_model_folder(config),
                tokenizer_folder=Path(_tokenizer_folder(config)),
            )
            write_identity(source_folder, identity)
            print(f"{schedule.total} steps, {schedule.per_epoch} per epoch, on {accelerator}, {layout}", flush=True)
        trainer = _make_trainer(config, layout, accelerator, schedule=schedule, source_folder=source_folder)
        trainer.callbacks.extend([stop, *callbacks])  # type: ignore[attr-defined]
        if export_folder is not None:
            replace = last is not None and config.export.folder is None
            trainer.callbacks.append(ExportAtEnd(export_folder, source_folder, replace=replace))  # type: ignore[attr-defined]
        model = MegatronGPTKTOModel(config, hf_config, steps_per_epoch=schedule.per_epoch)
        trainer.fit(model, datamodule=data, ckpt_path=last)
    if is_global_rank_zero():
        print(f"Logs and checkpoints: {log_dir}", flush=True)


def _finish(config: KTOConfig, last: Path, schedule: Schedule) -> None:
    """Say that there is nothing left to train; export if the run was killed before it had."""
    if not is_global_rank_zero():
        return
    print(f"The run has taken its {schedule.total} steps already: {last}", flush=True)
    if config.export.enabled:
        folder = export_directory(config)
        if not folder.exists():
            export_checkpoint(last, folder)
        print(f"Aligned model: {folder}", flush=True)


def resolve_accelerator(config: KTOConfig) -> str:
    """Return "cpu" or "gpu" for `trainer.accelerator`."""
    wanted = config.trainer.accelerator
    if wanted == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    if wanted == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu, but no CUDA device is visible. Use cpu or auto.")
    return wanted


def resolve_model(config: KTOConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Return the Hugging Face configuration of the model: of the folder, or from the sizes in `model`.

    Raises:
        ConfigError: Sizes contradict the folder, are incomplete, or the tokenizer has more tokens than the model.
        CheckpointError: The folder is no usable model.
    """
    sizes = {name: getattr(config.model, name) for name in _SIZES}
    given = {name: value for name, value in sizes.items() if value is not None}
    folder = config.pretrained_checkpoint.restore_from_path
    if folder is None:
        return hf_config_from_sizes(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **given,
        )
    if given:
        raise ConfigError(
            f"{', '.join('model.' + name for name in given)}: the sizes come from "
            f"pretrained_checkpoint.restore_from_path={folder}. Leave these keys out, or restore_from_path."
        )
    hf_config = load_hf_config(folder)
    with SafetensorsFolder(Path(folder)):
        pass  # raises for a folder without weights, before any process is started
    if len(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens, the model in {folder} only {hf_config.vocab_size}. "
            "Use the tokenizer that belongs to the model."
        )
    return hf_config


def resolve_layout(config: KTOConfig, hf_config: PretrainedConfig, accelerator: str) -> parallel.Layout:
    """Return the checked layout of the run.

    Raises:
        ConfigError: It does not fit the processes, the model or the batch.
    """
    model = config.model
    layout = parallel.Layout(
        world_size=parallel.device_count(config.trainer.devices, accelerator) * config.trainer.num_nodes,
        tensor=model.tensor_model_parallel_size,
        pipeline=model.pipeline_model_parallel_size,
    )
    parallel.check_launched(layout)
    parallel.check_layout(
        layout,
        parallel.ModelSizes(
            num_layers=hf_config.num_hidden_layers,
            num_attention_heads=hf_config.num_attention_heads,
            num_query_groups=hf_config.num_key_value_heads,
            ffn_hidden_size=hf_config.intermediate_size,
        ),
    )
    check_transformer_impl(model.transformer_impl)
    padded_vocabulary(
        hf_config.vocab_size, multiple=model.make_vocab_size_divisible_by, tensor_model_parallel_size=layout.tensor
    )
    parallel.check_batch(
        layout,
        global_batch_size=model.global_batch_size,
        micro_batch_size=model.micro_batch_size,
        forward_micro_batch_size=model.kto.log_prob_forward_micro_batch_size or model.micro_batch_size,
    )
    return layout


def plan_schedule(config: KTOConfig, data: KTODataModule) -> Schedule:
    """Return the steps of the run from the size of the data and `trainer.kto`.

    Raises:
        ConfigError: Neither `max_steps` nor `max_epochs` limits the run.
    """
    kto = config.trainer.kto
    batches = epoch_length(len(data.splits["train"].samples), config.model.global_batch_size)
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
    val_batches = 0
    if "validation" in data.splits:
        available = -(-len(data.splits["validation"].samples) // config.model.global_batch_size)
        val_batches = _count(kto.limit_val_batches, available)
    return Schedule(
        total=min(limits),
        per_epoch=per_epoch,
        val_interval=interval if val_batches else 0,
        val_batches=val_batches,
    )


def log_directory(config: KTOConfig) -> Path:
    """Return the folder of the run's logs, checkpoints and export."""
    manager = config.exp_manager
    return Path(manager.explicit_log_dir or Path(manager.exp_dir or "results") / manager.name).absolute()


def export_directory(config: KTOConfig) -> Path:
    """Return the folder the aligned model is written to."""
    return Path(config.export.folder or log_directory(config) / "hf").absolute()


def resolve_export_folder(config: KTOConfig, *, resumes: bool) -> Path | None:
    """Return the folder the aligned model will be written to; None if the run writes none.

    Only a resumed run may replace a folder, and only the one in its own log folder.

    Raises:
        ConfigError: The folder holds something else.
    """
    if not config.export.enabled:
        return None
    folder = export_directory(config)
    sources = {Path(path).resolve() for path in (_tokenizer_folder(config), _model_folder(config)) if path is not None}
    ours = resumes and config.export.folder is None and folder.resolve() not in sources
    if not ours and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"The aligned model would be written to {folder}, which is not empty. Name another folder with "
            "export.folder or exp_manager.explicit_log_dir, or remove it."
        )
    return folder


def _count(limit: int | float, whole: int) -> int:
    """Return the batches meant by a count (int) or by a fraction (float) of `whole`: at least 1, at most `whole`."""
    number = int(limit * whole) if isinstance(limit, float) else limit
    return min(max(number, 1), whole)


def _time_limit(text: str | None) -> timedelta | None:
    """Return the time meant by DD:HH:MM:SS; `parse_config` has checked the form."""
    if text is None:
        return None
    days, hours, minutes, seconds = (int(part) for part in text.split(":"))
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def _tokenizer_folder(config: KTOConfig) -> str:
    folder = config.model.tokenizer.path or config.pretrained_checkpoint.restore_from_path
    if folder is None:
        raise ConfigError(
            "There is no tokenizer. Set pretrained_checkpoint.restore_from_path to a Hugging Face folder, or, for a "
            "model with random weights, model.tokenizer.path."
        )
    return folder


def _model_folder(config: KTOConfig) -> Path | None:
    folder = config.pretrained_checkpoint.restore_from_path
    return Path(folder) if folder else None


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
    config: KTOConfig, layout: parallel.Layout, accelerator: str, *, schedule: Schedule, source_folder: Path
) -> Trainer:
    strategy = MegatronStrategy(
        layout,
        config.model.optim,
        seed=config.model.seed,
        gradient_clip=config.trainer.kto.gradient_clip_val or 0.0,
        source_folder=source_folder,
    )
    trainer = Trainer(
        accelerator=accelerator,
        devices=layout.world_size // config.trainer.num_nodes,
        num_nodes=config.trainer.num_nodes,
        strategy=strategy,
        precision="32-true",
        max_steps=schedule.total,
        max_epochs=-1,
        limit_val_batches=schedule.val_batches,
        check_val_every_n_epoch=None,
        log_every_n_steps=config.trainer.log_every_n_steps,
        num_sanity_val_steps=0,
        callbacks=[ProgressBar()],
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
        "wandb_logger_kwargs": manager.wandb_logger_kwargs,
        "create_checkpoint_callback": manager.create_checkpoint_callback,
        "checkpoint_callback_params": {
            "monitor": params.monitor,
            "mode": params.mode,
            "save_top_k": params.save_top_k if validates else 0,
            "save_last": True,
            "every_n_epochs": 1,
            "save_on_train_epoch_end": False,
            "save_nemo_on_train_end": False,
            "filename": f"{manager.name}-{{step}}-{{{params.monitor}:.4f}}"
            if validates
            else f"{manager.name}-{{step}}",
        },
    }
