"""Mixtures of experts in Megatron's terms. No token is ever dropped, and routing is done in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_kto.network.family import ACTIVATIONS, Mixture, Refusals, activation_field
from nemo_kto.network.sharded import mark_divided


def unsupported_fields(mixture: Mixture, hf: Any) -> Refusals:
    """Return what Megatron cannot express of a mixture of experts."""
    found: Refusals = {}
    # Megatron refuses the probability of a single expert, normalised to one: the router would learn nothing
    learns = mixture.chosen > 1 or not mixture.normalized
    if not (1 <= mixture.chosen <= mixture.experts and learns):
        reason = "Supported are one to all experts, and two or more where their probabilities are made to sum to one."
        found["num_experts_per_tok"] = (mixture.chosen, reason)
    if mixture.scores == "sigmoid" and not mixture.normalized and mixture.chosen > 1:
        found["norm_topk_prob"] = (False, "Probabilities that are sigmoids are made to sum to one.")
    if mixture.groups > 1 and mixture.chosen // mixture.chosen_groups != 2:
        # of a group Megatron counts so many of its best experts, transformers two
        reason = "Supported is one group, or so many chosen groups that two experts are chosen of each on average."
        found["topk_group"] = (mixture.chosen_groups, reason)
    field = activation_field(hf)
    if ACTIVATIONS.get(getattr(hf, field)) != "silu":
        found[field] = (getattr(hf, field), "Experts have silu.")
    return found


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
    shared = mixture.shared
    return {
        "num_moe_experts": mixture.experts,
        "moe_ffn_hidden_size": mixture.feed_forward,
        "moe_layer_freq": 1 if all(sparse) else sparse,
        "moe_router_topk": mixture.chosen,
        # the softmax is over all experts, or, which normalises, over the chosen ones
        "moe_router_pre_softmax": mixture.scores == "softmax" and not mixture.normalized,
        "moe_router_score_function": mixture.scores,
        "moe_router_enable_expert_bias": mixture.chosen_with_bias,
        "moe_router_topk_scaling_factor": mixture.scale if mixture.scale != 1.0 else None,
        "moe_router_num_groups": mixture.groups if mixture.groups > 1 else None,
        "moe_router_group_topk": mixture.chosen_groups if mixture.groups > 1 else None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if aux_loss_coeff else "none",
        "moe_aux_loss_coeff": aux_loss_coeff,
        "moe_grouped_gemm": grouped_gemm,
        "moe_shared_expert_intermediate_size": None if shared is None else shared.feed_forward,
        "moe_shared_expert_gate": shared is not None and shared.gate is not None,
    }


def pattern(config: TransformerConfig) -> list[bool]:
    """Return for each layer of a Megatron model whether it holds experts."""
    if config.num_moe_experts is None or config.moe_layer_freq == 1:
        return [config.num_moe_experts is not None] * config.num_layers
    return [bool(has_experts) for has_experts in config.moe_layer_freq]


def freeze_router_biases(model: torch.nn.Module, config: TransformerConfig) -> None:
    """Leave the biases that experts are chosen with as they are; Megatron would count choices and move them.

    They balanced the experts' loads in pre-training (arXiv 2408.15664). Policy and reference are routed alike as long
    as no router's weights have changed.
    """
    config.moe_router_enable_expert_bias = False
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.enable_expert_bias = False


def router_biases(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the biases `[experts]` float32 that experts are chosen with: buffers, not parameters."""
    for module in model.modules():
        if isinstance(module, TopKRouter) and module.expert_bias is not None:
            yield module.expert_bias


def add_expert_biases(model: torch.nn.Module) -> None:
    """Let experts add their last bias, which Megatron does in place, to what no other tensor is a view of.

    Where neither tensor nor expert parallelism is there, the layer's output comes through a reduction over one rank,
    which returns it as it is: autograd then forbids the addition (transformer/mlp.py, Megatron-Core 0.16).
    """
    for module in model.modules():
        if isinstance(module, RowParallelLinear) and module.is_expert:
            module.explicit_expert_comm = True  # what there is to reduce the dispatcher reduces, as it does otherwise


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
            # Megatron marks biases behind row-parallel layers; but their gradient is summed with the experts' weights'
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
            mark_divided(parameter, dim=1 if ".linear_fc2.weight" in name else 0)
