"""How a configuration divides the processes, checked against the model and the batch."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from nemo_kto.algorithms.losses import LOSSES
from nemo_kto.config.schema import KTOConfig, KTOLossConfig
from nemo_kto.data.batches.sampling import kl_set_size
from nemo_kto.errors import ConfigError
from nemo_kto.network import moe
from nemo_kto.network.gpt import padded_vocabulary
from nemo_kto.network.hf_config import model_sizes
from nemo_kto.network.layer_specs import check_transformer_impl
from nemo_kto.runs.model import params_dtype_of
from nemo_kto.runtime import parallel
from nemo_kto.runtime.layout import Layout, check_batch, check_layout, check_recompute_groups


def layout_of(config: KTOConfig, hf_config: PretrainedConfig, accelerator: str) -> Layout:
    """Return the checked layout of the run.

    Raises:
        ConfigError: It does not fit the processes, the model or the batch.
    """
    settings = config.model
    result = Layout(
        world_size=parallel.device_count(config.trainer.devices, accelerator) * config.trainer.num_nodes,
        tensor=settings.tensor_model_parallel_size,
        sequence=settings.sequence_parallel and settings.tensor_model_parallel_size > 1,
        pipeline=settings.pipeline_model_parallel_size,
        context=settings.context_parallel_size,
        virtual=settings.virtual_pipeline_model_parallel_size or 1,
        first_stage_layers=settings.num_layers_in_first_pipeline_stage,
        last_stage_layers=settings.num_layers_in_last_pipeline_stage,
        expert=settings.expert_model_parallel_size,
        expert_tensor=settings.expert_tensor_parallel_size,
    )
    parallel.check_launched(result)
    check_layout(result, model_sizes(hf_config))
    if settings.moe_aux_loss_coeff and not moe.num_experts(hf_config):
        raise ConfigError(
            f"model.moe_aux_loss_coeff={settings.moe_aux_loss_coeff} needs a mixture of experts; this model is dense. "
            "Set it to 0."
        )
    if params_dtype_of(config) == torch.float16 and moe.num_experts(hf_config):
        # Megatron gives the experts' optimizer a loss scale of its own, and scales the loss with the other's
        raise ConfigError(
            f"trainer.precision={config.trainer.precision} cannot be used with a mixture of experts. Use bf16-mixed."
        )
    if settings.activations_checkpoint_method == "uniform":
        group = settings.activations_checkpoint_num_layers
        assert group is not None, "parse_config has checked this"
        check_recompute_groups(result, hf_config.num_hidden_layers, group)
    check_transformer_impl(settings.transformer_impl)
    padded_vocabulary(
        hf_config.vocab_size, multiple=settings.make_vocab_size_divisible_by, tensor_model_parallel_size=result.tensor
    )
    check_batch(
        result,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        kl_set_size=kl_set_size(settings.global_batch_size, kl_fraction(settings.kto)),
        kl_micro_batch_size=settings.kto.log_prob_forward_micro_batch_size or settings.micro_batch_size,
        micro_batch_tokens=settings.micro_batch_tokens,
    )
    return result


def kl_fraction(kto: KTOLossConfig) -> float:
    """Return which share of a training batch's prompts has a KL response; 0 for losses without a KL set."""
    return kto.kl_fraction if LOSSES[kto.loss].baseline == "kl" else 0.0
