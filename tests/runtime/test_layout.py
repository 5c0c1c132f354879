"""Impossible layouts are one clear sentence, before any process group exists."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_kto.errors import ConfigError
from nemo_kto.runtime.layout import (
    Layout,
    ModelSizes,
    check_batch,
    check_layout,
    check_recompute_groups,
)

SIZES = ModelSizes(num_layers=6, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=24)


@pytest.mark.parametrize(
    ("world_size", "tensor", "pipeline", "data"), [(1, 1, 1, 1), (8, 2, 2, 2), (12, 4, 3, 1), (64, 4, 2, 8)]
)
def test_what_tensor_and_pipeline_leave_over_is_data_parallel(
    world_size: int, tensor: int, pipeline: int, data: int
) -> None:
    layout = Layout(world_size=world_size, tensor=tensor, pipeline=pipeline)
    check_layout(layout, SIZES)
    assert layout.data == data


def test_context_parallel_ranks_work_on_the_same_samples() -> None:
    layout = Layout(world_size=16, tensor=2, pipeline=2, context=2)
    check_layout(layout, SIZES)
    assert (layout.data, layout.model_parallel) == (2, 8)
    assert str(layout) == "16 processes: tensor 2 x pipeline 2 x context 2 x data 2"


@pytest.mark.parametrize(
    ("layout", "sizes", "sentence"),
    [
        (Layout(world_size=6, tensor=4), SIZES, "6 processes .* cannot be divided .* multiple of 4"),
        (Layout(world_size=2, tensor=2, pipeline=2), SIZES, "2 processes .* = 4. Use a multiple of 4"),
        (Layout(world_size=8, tensor=8), SIZES, "4 key/value heads .*tensor_model_parallel_size=8"),
        (Layout(world_size=6, tensor=2, context=2), SIZES, "6 processes .*context_parallel_size=2 = 4. Use"),
        (Layout(world_size=16, tensor=4, context=4), SIZES, "8 attention heads .*tensor_model_.*=4 x .*context_.*=4"),
        (Layout(world_size=3, tensor=3), SIZES, "8 attention heads .*tensor_model_parallel_size=3"),
        (Layout(world_size=4, pipeline=4), SIZES, "6 layers .*pipeline_model_parallel_size=4"),
        (
            Layout(world_size=4, tensor=4),
            ModelSizes(num_layers=6, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=26),
            "26 feed-forward units .*tensor_model_parallel_size=4",
        ),
    ],
)
def test_what_a_layout_must_divide(layout: Layout, sizes: ModelSizes, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_layout(layout, sizes)


EXPERTS = ModelSizes(
    num_layers=6,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=None,
    num_experts=8,
    expert_layers=range(6),
    expert_ffn_hidden_size=12,
)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(world_size=8, expert=8),
        Layout(world_size=8, tensor=2, sequence=True, expert=4),
        Layout(world_size=8, tensor=4, sequence=True, expert=8, expert_tensor=1),
        Layout(world_size=8, pipeline=2, expert=2, expert_tensor=2),
    ],
)
def test_experts_can_be_divided(layout: Layout) -> None:
    check_layout(layout, EXPERTS)
    if layout.expert_tensor_size == 1:
        check_layout(layout, replace(EXPERTS, expert_biases=True))


@pytest.mark.parametrize(
    ("layout", "sizes", "sentence"),
    [
        (Layout(world_size=2, expert=2), SIZES, "expert_model_parallel_size=2 needs a mixture .* dense"),
        (Layout(world_size=1, expert_tensor=1), SIZES, "expert_tensor_parallel_size=1 needs a mixture .* dense"),
        (Layout(world_size=2, tensor=2), EXPERTS, "tensor_model_parallel_size=2 needs model.sequence_parallel=true"),
        (Layout(world_size=3, expert=3), EXPERTS, "8 experts .*expert_model_parallel_size=3. .*divisor of 8"),
        (Layout(world_size=8, expert_tensor=8), EXPERTS, "12 channels of an expert .* 8.*expert_tensor_parallel_size"),
        (
            Layout(world_size=8, tensor=4, sequence=True),
            replace(EXPERTS, shared_ffn_hidden_size=10),
            "10 units of the shared expert .*tensor_model_parallel_size=4",
        ),
        (
            Layout(world_size=2, tensor=2, sequence=True),
            replace(EXPERTS, expert_biases=True),
            "experts have biases, .* size 2 .*Set model.expert_tensor_parallel_size=1",
        ),
        (Layout(world_size=6, expert=4), EXPERTS, "6 processes .*expert_model_parallel_size=4 .* = 4. Use"),
        (Layout(world_size=4, tensor=2, sequence=True, expert=4), EXPERTS, "4 processes .* size 2 .* = 8"),
    ],
)
def test_what_experts_need(layout: Layout, sizes: ModelSizes, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_layout(layout, sizes)


@pytest.mark.parametrize(
    ("layout", "expert_layers", "dense"),
    [
        (Layout(world_size=2, pipeline=2), (0, 5), None),
        (Layout(world_size=2, pipeline=2), (3, 4, 5), "0 would hold dense layers only .0, 1, 2."),
        (Layout(world_size=2, pipeline=2, first_stage_layers=4), (3,), "1 would hold dense layers only .4, 5."),
        (Layout(world_size=3, pipeline=3, last_stage_layers=4), (0, 2), "1 would hold dense layers only .1."),
        # chunks take turns: 0 | 1 | 2 on the stages, then 3 | 4 | 5
        (Layout(world_size=3, pipeline=3, virtual=2), (0, 1, 5), None),
        (Layout(world_size=3, pipeline=3, virtual=2), (0, 1, 3), "2 would hold dense layers only .2, 5."),
    ],
)
def test_every_stage_needs_experts(layout: Layout, expert_layers: tuple[int, ...], dense: str | None) -> None:
    sizes = replace(EXPERTS, ffn_hidden_size=24, expert_layers=expert_layers)
    if dense is None:
        check_layout(layout, sizes)
    else:
        with pytest.raises(ConfigError, match=f"Pipeline stage {dense}"):
            check_layout(layout, sizes)


def test_a_layout_names_its_experts() -> None:
    assert "expert" not in str(Layout(world_size=2, tensor=2))
    assert str(Layout(world_size=4, tensor=2, sequence=True, expert=2)).endswith(", experts: expert 2 x tensor 2")
    assert str(Layout(world_size=4, tensor=2, expert_tensor=1)).endswith(", experts: expert 1 x tensor 1")


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ((10, 1, 1), "global_batch_size=10 cannot be divided by 4 data-parallel ranks .* multiple of 4"),
        ((16, 3, 1), "model.micro_batch_size=3 does not divide .* share of the batch, 4 "),
        ((16, 2, 3), "log_prob_forward_micro_batch_size=3 does not divide .* divisor of 4"),
    ],
)
def test_what_a_batch_must_divide(sizes: tuple[int, int, int], sentence: str) -> None:
    total, micro, forward = sizes
    with pytest.raises(ConfigError, match=sentence):
        check_batch(
            Layout(world_size=8, tensor=2),
            global_batch_size=total,
            micro_batch_size=micro,
            kl_set_size=total,
            kl_micro_batch_size=forward,
        )


@pytest.mark.parametrize(
    "layout",
    [
        Layout(world_size=2, pipeline=2, first_stage_layers=2),
        Layout(world_size=3, pipeline=3, first_stage_layers=1, last_stage_layers=1),
        Layout(world_size=2, pipeline=2, first_stage_layers=2, last_stage_layers=4),
        Layout(world_size=2, pipeline=2, virtual=3),
        Layout(world_size=3, pipeline=3, virtual=2),
    ],
)
def test_uneven_and_interleaved_stages(layout: Layout) -> None:
    check_layout(layout, SIZES)


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (Layout(world_size=2, pipeline=2, first_stage_layers=6), "6 layers .6 of them in the first or last stage."),
        (Layout(world_size=2, pipeline=2, first_stage_layers=2, last_stage_layers=3), "2 and 3 of them"),
        (Layout(world_size=3, pipeline=3, first_stage_layers=1), "6 layers .1 of them .* evenly"),
        (Layout(world_size=2, pipeline=2, virtual=2), "3 layers .*virtual_pipeline_model_parallel_size=2 chunks"),
        (Layout(world_size=1, virtual=2), "virtual_pipeline_model_parallel_size=2 needs .*pipeline_.*above 1"),
        (Layout(world_size=1, first_stage_layers=2), "num_layers_in_first_pipeline_stage=2 needs"),
    ],
)
def test_stages_that_cannot_hold_the_layers(layout: Layout, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_layout(layout, SIZES)


def test_groups_of_recomputed_layers_must_fit_into_every_chunk() -> None:
    check_recompute_groups(Layout(world_size=1), 6, 3)
    check_recompute_groups(Layout(world_size=2, pipeline=2, first_stage_layers=2), 6, 2)
    with pytest.raises(ConfigError, match="num_layers=2 does not divide the 1 layers .* divisor of 1"):
        check_recompute_groups(Layout(world_size=2, pipeline=2, virtual=2), 4, 2)
    with pytest.raises(ConfigError, match="num_layers=2 does not divide the 3 layers"):
        check_recompute_groups(Layout(world_size=2, pipeline=2), 6, 2)


def test_interleaved_stages_need_whole_rounds_of_micro_batches() -> None:
    layout = Layout(world_size=2, pipeline=2, virtual=3)
    sizes = {"global_batch_size": 4, "micro_batch_size": 1, "kl_set_size": 4}
    check_batch(layout, **sizes, kl_micro_batch_size=2)
    with pytest.raises(ConfigError, match="log_prob_forward_micro_batch_size=4 makes 1 micro-batches .* multiple of"):
        check_batch(layout, **sizes, kl_micro_batch_size=4)
    with pytest.raises(ConfigError, match="micro_batch_tokens=900 makes 3 micro-batches .* at the most.* multiple of"):
        check_batch(
            layout,
            global_batch_size=3,
            micro_batch_size=1,
            kl_set_size=3,
            kl_micro_batch_size=1,
            micro_batch_tokens=900,
        )


def test_the_kl_set_is_shared_by_the_ranks_too() -> None:
    sizes = {"global_batch_size": 16, "micro_batch_size": 2, "kl_micro_batch_size": 2}
    check_batch(Layout(world_size=4), **sizes, kl_set_size=0)  # a loss without one
    check_batch(Layout(world_size=4), **sizes, kl_set_size=8)
    with pytest.raises(ConfigError, match="KL set of 6 documents, .*kl_fraction .* 4 data-parallel .* multiple of 4"):
        check_batch(Layout(world_size=4), **sizes, kl_set_size=6)
    with pytest.raises(ConfigError, match="forward_micro_batch_size=2 does not divide .* 1 = 4 documents"):
        check_batch(Layout(world_size=4), **sizes, kl_set_size=4)
    # training would have two micro-batches of 6, but validation, with 16 pairs, none
    with pytest.raises(ConfigError, match="forward_micro_batch_size=6 does not divide .* 16 = 16 documents"):
        check_batch(
            Layout(world_size=1), global_batch_size=16, micro_batch_size=2, kl_set_size=12, kl_micro_batch_size=6
        )
    # with a number of tokens, the micro-batches have any number of documents but none
    check_batch(Layout(world_size=4), **sizes, kl_set_size=4, micro_batch_tokens=100)
