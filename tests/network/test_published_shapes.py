"""Models of published shapes are built, without memory, and have as many parameters as their authors say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kto.network.families import dimensions_of, family_of, model_types
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.hf_config import check_hf_config
from nemo_kto.network.moe import router_biases
from nemo_kto.network.weight_rules import expected_shapes
from nemo_kto.runtime.dry_run import alone
from nemo_kto.runtime.layout import Layout
from tests.network.published_shapes import PUBLISHED

every_family = pytest.mark.parametrize("family", PUBLISHED)


def shapes_of_table(family: str) -> dict[str, tuple[int, ...]]:
    """Return what the table of weights says of a published model."""
    config = PUBLISHED[family].config(family)
    return expected_shapes(family_of(config).rules(config))


def size_of(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def test_every_family_has_a_published_shape() -> None:
    assert tuple(sorted(PUBLISHED)) == model_types()


@every_family
def test_a_table_has_as_many_numbers_as_were_published(family: str) -> None:
    check_hf_config(PUBLISHED[family].config(family))
    found, said = size_of(shapes_of_table(family)), PUBLISHED[family].parameters
    if isinstance(said, int):
        assert found == said
    else:
        unit = 10 ** -len(said.partition(".")[2])
        assert abs(found / 1e9 - float(said)) < unit


@every_family
def test_a_table_has_as_many_numbers_as_transformers_model(family: str) -> None:
    """Some of its tensors hold the experts of a layer together."""
    config = PUBLISHED[family].config(family)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    theirs, ours = {name: tuple(tensor.shape) for name, tensor in state.items()}, shapes_of_table(family)
    assert size_of(theirs) == size_of(ours)
    assert all(ours[name] == shape for name, shape in theirs.items() if name in ours)
    assert theirs.keys() & ours.keys() >= {"model.embed_tokens.weight", "model.norm.weight"}


def counted(families: list[str]) -> list[int]:
    """Return the parameters of each model, from those of a rank that holds two experts of each layer."""
    torch.distributed.destroy_process_group()  # the harness's
    numbers = []
    for family in families:
        config = PUBLISHED[family].config(family)
        mixture = dimensions_of(config).mixture
        ranks = 1 if mixture is None else mixture.experts // 2
        layout = Layout(world_size=ranks, expert=ranks)
        with alone(layout, 0):
            model = build_gpt(config, layout, vocab_pad_multiple=1, params_dtype=torch.bfloat16)
            sizes = [
                parameter.numel() * (ranks if ".mlp.experts." in name else 1)
                for name, parameter in model.named_parameters()
            ]
            numbers.append(sum(sizes) + sum(bias.numel() for bias in router_biases(model)))
    return numbers


@every_family
def test_a_model_of_a_published_shape_is_built(run_ranks: Callable[..., Any], family: str) -> None:
    ((number,),) = run_ranks(counted, 1, [family])
    assert number == size_of(shapes_of_table(family))
