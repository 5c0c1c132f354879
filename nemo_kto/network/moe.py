"""Mixtures of experts in Megatron's terms. No token is ever dropped, and routing is done in float32."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_kto.network.family import Mixture
from nemo_kto.network.sharded import mark_divided


def unsupported_fields(mixture: Mixture) -> dict[str, Any]:
    """Return field of the configuration -> value, of those values that Megatron cannot express."""
    # Megatron refuses the probability of a single expert, normalised to one: the router would learn nothing
    learns = mixture.chosen > 1 or not mixture.normalized
    possible = 1 <= mixture.chosen <= mixture.experts and learns
    return {} if possible else {"num_experts_per_tok": mixture.chosen}


def transformer_fields(
    mixture: Mixture, num_layers: int, *, grouped_gemm: bool, aux_loss_coeff: float
) -> dict[str, Any]:
    """Return the TransformerConfig fields of a mixture of experts.

    Args:
        mixture: The mixtures of the model.
        num_layers: Its layers.
        grouped_gemm: One kernel for all experts of a rank, as only Transformer Engine has it, instead of one each.
        aux_loss_coeff: Weight of the load-balancing loss (arXiv 2101.03961, eq. 4).
    """
    sparse = [int(layer in mixture.sparse_layers) for layer in range(num_layers)]
    return {
        "num_moe_experts": mixture.experts,
        "moe_ffn_hidden_size": mixture.feed_forward,
        "moe_layer_freq": 1 if all(sparse) else sparse,
        "moe_router_topk": mixture.chosen,
        # the softmax is over all experts, or, which normalises, over the chosen ones
        "moe_router_pre_softmax": not mixture.normalized,
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

    Among the tensor-parallel ranks none holds a copy that another one answers for: that optimizer deals the weights
    to all of them. From Transformer Engine 2.13 on its grouped experts do not say so any more, and the gradient norm
    would be that of the first rank's part.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]
            mark_divided(parameter, dim=1 if ".linear_fc2." in name else 0)
