"""Megatron's configuration of a model: what it computes, how it is divided, in which dtype, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from transformers import PretrainedConfig

from nemo_kto.algorithms import pointwise
from nemo_kto.network import moe
from nemo_kto.network.families import family_of
from nemo_kto.network.family import ACTIVATIONS, Dimensions, Family, activation_field
from nemo_kto.network.model_config import ModelConfig
from nemo_kto.network.rotary import RotaryEmbedding
from nemo_kto.runtime.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """What the backward pass computes again, to save the memory of keeping it.

    Attributes:
        granularity: `selective` for attention only, `full` for whole layers.
        method: With `full`: `uniform`, all layers in groups of `num_layers`; `block`, the first `num_layers` of each
            stage one by one.
        num_layers: See `method`.
    """

    granularity: str
    method: str | None = None
    num_layers: int | None = None

    def transformer_config(self) -> dict[str, Any]:
        """Return Megatron's fields."""
        fields = {"recompute_granularity": self.granularity}
        if self.granularity == "full":
            fields |= {"recompute_method": self.method, "recompute_num_layers": self.num_layers}
        return fields


def megatron_config(
    hf_config: PretrainedConfig,
    layout: Layout,
    *,
    params_dtype: torch.dtype,
    recompute: Recompute | None,
    grouped_gemm: bool,
    moe_aux_loss_coeff: float,
) -> ModelConfig:
    """Return the configuration of a model.

    Args:
        hf_config: The model's configuration.
        layout: How it is divided.
        params_dtype: Dtype of parameters and activations.
        recompute: What is computed again in the backward pass; None for nothing.
        grouped_gemm: See `moe.transformer_fields`.
        moe_aux_loss_coeff: See `moe.transformer_fields`.
    """
    family = family_of(hf_config)
    sizes = family.dimensions(hf_config)
    return ModelConfig(
        **_division(layout),
        **_precision(params_dtype),
        **_architecture(hf_config, family, sizes),
        **_experts(sizes, grouped_gemm=grouped_gemm, aux_loss_coeff=moe_aux_loss_coeff),
        **_execution(recompute),
    )


def _architecture(hf: PretrainedConfig, family: Family, sizes: Dimensions) -> dict[str, Any]:
    """Return the fields that say what the model computes."""
    fields: dict[str, Any] = {
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "ffn_hidden_size": sizes.feed_forward,
        "num_attention_heads": sizes.heads,
        "num_query_groups": sizes.groups,
        "kv_channels": sizes.head_channels if sizes.latent is None else sizes.latent.values,
        "latent": sizes.latent,
        "delta": sizes.delta,
        "attention_output_gate": sizes.output_gates,
        "normalization": "LayerNorm" if family.layer_norms else "RMSNorm",
        "layernorm_epsilon": getattr(hf, "rms_norm_eps", None),
        "qk_layernorm": sizes.head_norms and not sizes.norms_of_all_heads,
        "norms_of_all_heads": sizes.head_norms and sizes.norms_of_all_heads,
        "add_qkv_bias": sizes.biases.inputs,
        "attention_output_bias": sizes.biases.output,
        "add_bias_linear": sizes.biases.feed_forward or (sizes.mixture is not None and sizes.mixture.biased),
        "gated_linear_unit": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "rotary_scales_queries": family.rotary_scales_queries,
        "rotary_tables": RotaryEmbedding(hf, sizes.head_channels).tables_of_layers,
        **family.fields(hf),
    }
    activation = family.activation or ACTIVATIONS[getattr(hf, activation_field(hf))]
    return {**fields, **_activation(activation, gated=fields["gated_linear_unit"])}


def _activation(name: str, *, gated: bool) -> dict[str, Any]:
    """Return the fields of an activation, by its name in `ACTIVATIONS` or a family's own.

    What Megatron fuses are functions of `algorithms/pointwise.py`, see `keep_less_for_backward`; of GELU, in a gated
    part, the tanh form.
    """
    functions = {"silu": F.silu, "gelu": F.gelu if gated else pointwise.gelu, "quick_gelu": quick_gelu}
    return {"activation_func": functions[name], "bias_activation_fusion": gated}


def _experts(sizes: Dimensions, *, grouped_gemm: bool, aux_loss_coeff: float) -> dict[str, Any]:
    """Return the TransformerConfig fields of the mixtures of experts, if there are any."""
    if sizes.mixture is None:
        return {}
    return moe.transformer_fields(
        sizes.mixture, sizes.layers, grouped_gemm=grouped_gemm, aux_loss_coeff=aux_loss_coeff
    )


def _division(layout: Layout) -> dict[str, Any]:
    """Return the TransformerConfig fields that say how the model is divided."""
    return {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor_size,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
        "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
        # gloo has no batched exchange; with interleaved stages a batch confuses the two directions between two stages
        "batch_p2p_comm": torch.cuda.is_available() and layout.virtual == 1,
    }


def _precision(params_dtype: torch.dtype) -> dict[str, Any]:
    """Return the TransformerConfig fields that say in which dtype it is computed."""
    return {
        "params_dtype": params_dtype,
        "pipeline_dtype": params_dtype,
        "bf16": params_dtype == torch.bfloat16,
        "fp16": params_dtype == torch.float16,
    }


def _execution(recompute: Recompute | None) -> dict[str, Any]:
    """Return the TransformerConfig fields that say how it is computed."""
    on_cuda = torch.cuda.is_available()
    recompute_fields = {} if recompute is None else recompute.transformer_config()
    return {
        **recompute_fields,
        "deterministic_mode": torch.are_deterministic_algorithms_enabled(),
        "variable_seq_lengths": True,  # packed rows differ in length
        "moe_token_dispatcher_type": "alltoall",  # Megatron insists on it with variable lengths, experts or not
        "use_cpu_initialization": not on_cuda,
        "perform_initialization": False,  # it would make every full tensor on every rank
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
    }
