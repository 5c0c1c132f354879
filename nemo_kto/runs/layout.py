"""How a configuration divides the processes, checked against the model and the batch.

What needs no device and no loaded model is here without heavy imports: `early.py` judges it before they are made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_kto.config.objective_checks import has_kl_set
from nemo_kto.config.schema import KTOConfig, KTOLossConfig
from nemo_kto.errors import ConfigError
from nemo_kto.network.families import dimensions_of
from nemo_kto.runtime.launch import check_launched, known_device_count, node_count
from nemo_kto.runtime.layout import (
    Layout,
    ModelSizes,
    check_batch,
    check_blocks,
    check_layout,
    check_recompute_groups,
    padded_vocabulary,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def layout_of(config: KTOConfig, hf_config: PretrainedConfig, accelerator: str) -> Layout:
    """Return the checked layout of the run.

    Raises:
        ConfigError: It does not fit the processes, the model or the batch.
    """
    from nemo_kto.network.layer_specs import check_transformer_impl  # these import Megatron
    from nemo_kto.runtime.parallel import device_count

    devices = device_count(config.trainer.devices, accelerator)
    nodes = node_count(config.trainer.num_nodes)
    layout = requested_layout(config, devices * nodes)
    check_division(config, layout, dimensions_of(hf_config).divided)
    check_transformer_impl(config.model.transformer_impl)
    padded_vocabulary(
        hf_config.vocab_size,
        multiple=config.model.make_vocab_size_divisible_by,
        tensor_model_parallel_size=layout.tensor,
    )
    return layout


def known_layout(config: KTOConfig) -> Layout | None:
    """Return the layout of the run, not checked; None where only the devices tell how many processes there are."""
    devices = known_device_count(config.trainer.devices)
    return None if devices is None else requested_layout(config, devices * node_count(config.trainer.num_nodes))


def requested_layout(config: KTOConfig, world_size: int) -> Layout:
    """Return the layout that the keys of `model` ask for, not checked."""
    settings = config.model
    return Layout(
        world_size=world_size,
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


def check_division(config: KTOConfig, layout: Layout, sizes: ModelSizes) -> None:
    """Raise a ConfigError when the layout fits not the processes that were started, the model or the batch."""
    check_launched(layout, node_count(config.trainer.num_nodes))
    check_divided(config, layout, sizes)


def check_divided(config: KTOConfig, layout: Layout, sizes: ModelSizes) -> None:
    """Raise a ConfigError when the layout fits not the model or the batch, whatever processes there are."""
    from nemo_kto.data.batches.sampling import kl_set_size

    settings = config.model
    check_layout(layout, sizes)
    if settings.peft.quantize_base == "nf4":
        check_blocks(layout, sizes)
    _check_experts(config, sizes)
    if settings.activations_checkpoint_method == "uniform":
        group = settings.activations_checkpoint_num_layers
        assert group is not None, "parse_config has checked this"
        check_recompute_groups(layout, sizes.num_layers, group)
    check_batch(
        layout,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        kl_set_size=kl_set_size(settings.global_batch_size, kl_fraction(settings.kto)),
        kl_micro_batch_size=settings.kto.log_prob_forward_micro_batch_size or settings.micro_batch_size,
        micro_batch_tokens=settings.micro_batch_tokens,
    )


def _check_experts(config: KTOConfig, sizes: ModelSizes) -> None:
    """Raise a ConfigError for what mixtures of experts cannot have, or dense models do not."""
    coefficient = config.model.moe_aux_loss_coeff
    if coefficient and not sizes.num_experts:
        raise ConfigError(
            f"model.moe_aux_loss_coeff={coefficient} needs a mixture of experts; this model is dense. Set it to 0."
        )
    if config.trainer.precision == "16-mixed" and sizes.num_experts:
        # Megatron gives the experts' optimizer a loss scale of its own, and scales the loss with the other's
        raise ConfigError(
            f"trainer.precision={config.trainer.precision} cannot be used with a mixture of experts. Use bf16-mixed."
        )


def kl_fraction(kto: KTOLossConfig) -> float:
    """Return which share of a training batch's prompts has a KL response; 0 for losses without a KL set."""
    return kto.kl_fraction if has_kl_set(kto) else 0.0
