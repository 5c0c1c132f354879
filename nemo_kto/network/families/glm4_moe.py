"""GLM-4.5 to 4.7: half of each head rotated, mixtures chosen by sigmoids and a bias, first layers dense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_kto.network import tables
from nemo_kto.network.families import glm4, llama
from nemo_kto.network.family import Dimensions, Family, Mixture, SharedExpert
from nemo_kto.network.weight_rules import Rule


def mixture(hf: Any) -> Mixture | None:
    """Return the mixtures of experts."""
    return mixture_in(hf, tuple(range(hf.first_k_dense_replace, hf.num_hidden_layers)))


def mixture_in(hf: Any, sparse_layers: tuple[int, ...]) -> Mixture | None:
    """Return the mixtures of experts of the layers that have some."""
    if not sparse_layers:
        return None
    return Mixture(
        experts=hf.n_routed_experts,
        chosen=hf.num_experts_per_tok,
        feed_forward=hf.moe_intermediate_size,
        sparse_layers=sparse_layers,
        normalized=hf.norm_topk_prob,
        shared=SharedExpert(name="shared_experts", feed_forward=hf.moe_intermediate_size * hf.n_shared_experts),
        scores="sigmoid",
        chosen_with_bias=True,
        scale=hf.routed_scaling_factor,
        groups=hf.n_group,
        chosen_groups=hf.topk_group,
    )


def head_norms(hf: Any) -> bool:
    """Return whether queries and keys are normed."""
    return bool(hf.use_qk_norm)


def weights(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the table of weights."""
    yield from llama.weights(sizes)
    yield from tables.experts(sizes, tables.ExpertNames.of("mlp", "gate_proj", "up_proj", "down_proj"))


FAMILY = Family(
    weights=weights,
    mixture=mixture,
    biases=glm4.biases,
    head_norms=head_norms,
    feed_forward_adapters=False,
    partial_rotary=True,
    further_layers=("num_nextn_predict_layers", "num_mtp_layers"),
)
