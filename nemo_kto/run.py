"""What every command does first: read the configuration, check it, read the data, and settle what both mean."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo.core.config import hydra_runner
from omegaconf import DictConfig
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemo_kto import resolve
from nemo_kto.cli import run_guarded
from nemo_kto.config import KTOConfig, config_dir, parse_config
from nemo_kto.data.datamodule import KTODataModule
from nemo_kto.data.tokenizer import load_tokenizer
from nemo_kto.models.lora import LoRASettings
from nemo_kto.models.megatron_gpt_kto_model import MegatronGPTKTOModel
from nemo_kto.models.reference import ReferenceSettings
from nemo_kto.quiet import silence_loaded_packages
from nemo_kto.resolve_data import read_data, settle_loss_weights
from nemo_kto.resolve_reference import cache_settings, lora_settings, reference_settings
from nemo_kto.runtime import cpu_megatron
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.strategy import MegatronStrategy

_PLAIN_OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w.]*=")


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
class Run:
    """What a configuration was found to mean."""

    config: KTOConfig
    accelerator: str
    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    hf_config: PretrainedConfig
    lora: LoRASettings | None
    reference: ReferenceSettings
    data: KTODataModule
    schedule: resolve.Schedule

    def model(self) -> MegatronGPTKTOModel:
        """Return the model, to be built when the processes run."""
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


def prepare(config: KTOConfig, *, trains: bool = True) -> Run:
    """Check the configuration and read the data, as every process does.

    Args:
        config: The configuration.
        trains: Whether there is something to train, for which there has to be data.
    """
    accelerator = resolve.accelerator(config)
    if accelerator == "cpu":
        cpu_megatron.enable_cpu()
    tokenizer = load_tokenizer(resolve.tokenizer_folder(config))
    hf_config = resolve.model(config, tokenizer)
    layout = resolve.layout(config, hf_config, accelerator)
    lora = lora_settings(config, hf_config)
    reference = reference_settings(config, hf_config, lora, accelerator=accelerator)
    data = read_data(config, tokenizer, max_positions=hf_config.max_position_embeddings, trains=trains)
    config = settle_loss_weights(config, data)
    if reference.mode == "cached":
        cache = cache_settings(config, hf_config, reference, data, tokenizer)
        reference = dataclasses.replace(reference, cache=cache)
    return Run(
        config=config,
        accelerator=accelerator,
        layout=layout,
        tokenizer=tokenizer,
        hf_config=hf_config,
        lora=lora,
        reference=reference,
        data=data,
        schedule=resolve.plan_schedule(config, data) if trains else resolve.plan_validation(config, data),
    )


def trainer_settings(run: Run) -> dict[str, Any]:
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


def strategy(run: Run, *, async_save: bool = False, source_folder: Path | None = None) -> MegatronStrategy:
    """Return the run's strategy; for the arguments see `MegatronStrategy`."""
    return MegatronStrategy(
        run.layout,
        run.config.model.optim,
        params_dtype=resolve.params_dtype(run.config),
        seed=run.config.model.seed,
        gradient_clip=run.config.trainer.kto.gradient_clip_val or 0.0,
        async_save=async_save,
        source_folder=source_folder,
    )
