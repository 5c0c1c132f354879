"""Which parameters count on every tensor-parallel rank in the gradient norm, as Megatron's own function judges."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

from nemo_kto.network.gpt import mark_tensor_parallel_weights
from nemo_kto.network.moe import mark_expert_weights

SECOND_RANK = SimpleNamespace(rank=lambda: 1)


def layer(mode: str | None, **marks: bool) -> torch.nn.Linear:
    """Return a layer as Transformer Engine makes it, whose parameters it has marked, or not."""
    made = torch.nn.Linear(2, 2)
    made.parallel_mode = mode  # type: ignore[assignment]
    for parameter in made.parameters():
        for name, value in marks.items():
            setattr(parameter, name, value)
    return made


def counted(model: torch.nn.Module) -> set[str]:
    """Return the names of the parameters that count on the second rank."""
    return {
        name
        for name, parameter in model.named_parameters()
        if param_is_not_tensor_parallel_duplicate(parameter, SECOND_RANK)
    }


def test_the_divided_parameters_of_transformer_engines_layers_count() -> None:
    """Whether or not it marks them itself; what each rank has whole counts once."""
    for marks in ({}, {"tensor_model_parallel": False}, {"tensor_model_parallel": True}):
        model = torch.nn.ModuleDict({"qkv": layer("column", **marks), "proj": layer("row"), "router": layer(None)})
        mark_tensor_parallel_weights(model)
        assert counted(model) == {"qkv.weight", "qkv.bias", "proj.weight"}


def test_grouped_experts_count_though_transformer_engine_leaves_them_unmarked() -> None:
    """As from version 2.13 on: the norm of a mixture was 3.015 there, instead of 3.121."""
    experts = torch.nn.ModuleDict({"linear_fc1": torch.nn.Module(), "linear_fc2": torch.nn.Module()})
    for part in experts.values():
        for number in range(2):
            part.register_parameter(f"weight{number}", torch.nn.Parameter(torch.ones(2, 2)))
    mlp = torch.nn.ModuleDict({"router": torch.nn.Linear(2, 2, bias=False), "experts": experts})
    model = torch.nn.ModuleDict({"mlp": mlp})
    model = torch.nn.ModuleDict({"layer": model})
    mark_expert_weights(model)
    names = {f"layer.mlp.experts.linear_fc{part}.weight{number}" for part in (1, 2) for number in range(2)}
    assert counted(model) == names
    weights = dict(model.named_parameters())
    assert {weights[name].partition_dim for name in names if "fc2" in name} == {1}
