"""Mixtures of experts: which layers hold them, and what Hugging Face's fields are to Megatron.

Mixtral has experts in every layer, Qwen3-MoE where `mlp_only_layers` and `decoder_sparse_step` put them. No token is
ever dropped, and routing is done in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig


def expert_layers(hf: PretrainedConfig) -> tuple[bool, ...]:
    """Return for each layer whether its feed-forward part is a mixture of experts."""
    if hf.model_type == "mixtral":
        return (True,) * hf.num_hidden_layers
    if hf.model_type == "qwen3_moe" and hf.num_experts > 0:
        return tuple(
            layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0
            for layer in range(hf.num_hidden_layers)
        )
    return (False,) * hf.num_hidden_layers


def num_experts(hf: PretrainedConfig) -> int:
    """Return the experts of each layer that has some; 0 for a dense model."""
    return int(hf.num_experts) if any(expert_layers(hf)) else 0


def expert_ffn_hidden_size(hf: PretrainedConfig) -> int:
    """Return the channels inside one expert."""
    return int(getattr(hf, "moe_intermediate_size", hf.intermediate_size))


def unsupported_fields(hf: PretrainedConfig) -> dict[str, bool]:
    """Return fields of a mixture of experts, and whether their value is one that Megatron cannot express."""
    if not num_experts(hf):
        return {}
    chosen = hf.num_experts_per_tok
    return {
        "router_jitter_noise": getattr(hf, "router_jitter_noise", 0.0) > 0,  # transformers makes noise in training
        # Megatron refuses the probability of a single expert, normalised to one: the router would learn nothing
        "num_experts_per_tok": not 1 <= chosen <= hf.num_experts or (chosen == 1 and _is_normalized(hf)),
    }


def transformer_fields(hf: PretrainedConfig, *, grouped_gemm: bool, aux_loss_coeff: float) -> dict[str, Any]:
    """Return the TransformerConfig fields of a mixture of experts; none for a dense model.

    Args:
        hf: The model's configuration.
        grouped_gemm: One kernel for all experts of a rank, as only Transformer Engine has it, instead of one each.
        aux_loss_coeff: Weight of the load-balancing loss (arXiv 2101.03961, eq. 4).
    """
    layers = expert_layers(hf)
    if not any(layers):
        return {}
    return {
        "num_moe_experts": hf.num_experts,
        "moe_ffn_hidden_size": expert_ffn_hidden_size(hf),
        "moe_layer_freq": 1 if all(layers) else [int(has_experts) for has_experts in layers],
        "moe_router_topk": hf.num_experts_per_tok,
        # the softmax is over all experts, or, which normalises, over the chosen ones
        "moe_router_pre_softmax": not _is_normalized(hf),
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if aux_loss_coeff else "none",
        "moe_aux_loss_coeff": aux_loss_coeff,
        "moe_grouped_gemm": grouped_gemm,
    }


def pattern(config: TransformerConfig) -> list[bool]:
    """Return for each layer of a Megatron model whether it holds experts."""
    if config.num_moe_experts is None or config.moe_layer_freq == 1:
        return [config.num_moe_experts is not None] * config.num_layers
    return [bool(has_experts) for has_experts in config.moe_layer_freq]


def mark_expert_weights(model: torch.nn.Module) -> None:
    """Say of each expert's weight that other ranks hold copies of it than of the rest of the model.

    Their gradients are summed over those ranks, and they get an optimizer of their own. Megatron's layers say so with
    expert parallelism only. It is also so when experts have a tensor-parallel size of their own; and where the
    ranks are the same after all, the optimizers' checkpoints have one form under every layout.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def _is_normalized(hf: PretrainedConfig) -> bool:
    """Whether the probabilities of the chosen experts are made to sum to one."""
    return bool(getattr(hf, "norm_topk_prob", True))
