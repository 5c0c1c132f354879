"""What every command does first: read the configuration, check it, read the data, and settle what both mean."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemo_kto.config.folders import check_named_folders, model_folder, tokenizer_folder
from nemo_kto.config.plugins import check_functions
from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.batches.datamodule import KTODataModule
from nemo_kto.data.tokens.tokenizer import load_tokenizer
from nemo_kto.kto.megatron_gpt_kto_model import MegatronGPTKTOModel
from nemo_kto.kto.reference import ReferenceSettings
from nemo_kto.network.hf_config import read_hf_config
from nemo_kto.network.projections import LoRASettings
from nemo_kto.network.vision import VisionSettings
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runs.data import read_data, settle_loss_weights
from nemo_kto.runs.layout import layout_of
from nemo_kto.runs.model import accelerator_of, hf_config_of, params_dtype_of, recompute_of, vision_for
from nemo_kto.runs.reference import cache_settings, lora_settings, reference_settings
from nemo_kto.runs.schedule import Schedule, plan_schedule, plan_validation
from nemo_kto.runtime import cpu_megatron
from nemo_kto.runtime.determinism import make_deterministic
from nemo_kto.runtime.launch import check_reaches, node_count
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.versions import untested

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a configuration was found to mean."""

    config: KTOConfig
    accelerator: str
    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    hf_config: PretrainedConfig
    lora: LoRASettings | None
    vision: VisionSettings | None
    reference: ReferenceSettings
    data: KTODataModule
    schedule: Schedule

    def model(self) -> MegatronGPTKTOModel:
        """Return the model, to be built when the processes run."""
        return MegatronGPTKTOModel(
            self.config,
            self.hf_config,
            layout=self.layout,
            params_dtype=params_dtype_of(self.config),
            recompute=recompute_of(self.config),
            lora=self.lora,
            vision=self.vision,
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
    check_reaches(node_count(config.trainer.num_nodes))
    check_functions(config)
    if is_global_rank_zero() and (found := untested()):
        logger.warning("Not tested with what is installed: %s; see docs/versions.md.", ", ".join(found))
    if config.trainer.deterministic:
        make_deterministic()
    accelerator = accelerator_of(config)
    if accelerator == "cpu":
        cpu_megatron.enable_cpu()
    check_named_folders(config)
    folder = model_folder(config)
    if folder is not None:
        read_hf_config(folder)  # first, as the tokenizer's loader reads it too and would say that the tokenizer is bad
    tokenizer = load_tokenizer(tokenizer_folder(config), trust_remote_code=config.model.tokenizer.trust_remote_code)
    hf_config = hf_config_of(config, tokenizer)
    layout = layout_of(config, hf_config, accelerator)
    lora = lora_settings(config, hf_config)
    reference = reference_settings(config, hf_config, lora, accelerator=accelerator)
    data = read_data(
        config,
        tokenizer,
        max_positions=hf_config.max_position_embeddings,
        vocab_size=hf_config.vocab_size,
        trains=trains,
    )
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
        vision=vision_for(config, hf_config, data, trains=trains),
        reference=reference,
        data=data,
        schedule=plan_schedule(config, data) if trains else plan_validation(config, data),
    )
