"""GLM-4.7-Flash: DeepSeek-V3 whose dense layers are named one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_kto.network.families import deepseek_v3, glm4_moe
from nemo_kto.network.family import Mixture


def mixture(hf: Any) -> Mixture | None:
    """Return the mixtures of experts."""
    kinds = getattr(hf, "mlp_layer_types", None)
    if kinds is None:  # as transformers fills it in
        kinds = ["dense", *["sparse"] * (hf.num_hidden_layers - 1)]
    return glm4_moe.mixture_in(hf, tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse"))


FAMILY = replace(deepseek_v3.FAMILY, mixture=mixture)
