"""What a dry run says of a step's memory: by hand where that can be done, and of deep models as of all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MixtralConfig, PretrainedConfig

from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError
from nemo_kto.runs import memory
from nemo_kto.runs.memory import longest_rows, step_memory
from nemo_kto.runtime.layout import Layout

HIDDEN, INNER, VOCABULARY, LAYERS = 256, 512, 2048, 4
LAYER = HIDDEN * HIDDEN * 2 + HIDDEN * 128 * 2 + 3 * HIDDEN * INNER + 2 * HIDDEN
"""Parameters: query and output, key and value, the feed-forward part, and two norms."""
OUTER = 2 * VOCABULARY * HIDDEN + HIDDEN
"""Of embedding, output layer and last norm."""

FULL: dict[str, Any] = {
    "model__activations_checkpoint_granularity": "full",
    "model__activations_checkpoint_method": "uniform",
    "model__activations_checkpoint_num_layers": 1,
}
LORA: dict[str, Any] = {
    "model__peft__peft_scheme": "lora",
    "model__peft__lora_tuning__target_modules": ["all"],
}
ONE = Layout(world_size=1)
TP2 = Layout(world_size=2, tensor=2, sequence=True)


def llama(layers: int = LAYERS, **changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    }
    return LlamaConfig(num_hidden_layers=layers, **{**sizes, **changes})


def configured(**changes: Any) -> KTOConfig:
    """Return the configuration of a run in bfloat16, two micro-batches of 256 tokens; `changes` use `__` for dots."""
    config = KTOConfig()
    config.trainer.precision = "bf16-mixed"
    config.model.global_batch_size = 2
    config.model.data.seq_length = 256
    for key, value in changes.items():
        *folders, name = key.split("__")
        owner: Any = config
        for folder in folders:
            owner = getattr(owner, folder)
        setattr(owner, name, value)
    return config


Job = tuple[dict[str, Any], PretrainedConfig, Layout, int, bool]


def found(jobs: list[Job]) -> list[Any]:
    """Return the memory of each job, in one process after the other's."""
    torch.distributed.destroy_process_group()  # the harness's
    return [
        step_memory(configured(**changes), hf_config, layout, rank, every_layer=every_layer)
        for changes, hf_config, layout, rank, every_layer in jobs
    ]


@pytest.fixture
def memories(run_ranks: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Return `memories(*jobs)`: what `found` returns, in a process of its own."""
    return lambda *jobs: run_ranks(found, 1, list(jobs))[0]


def test_what_is_held_is_by_the_book(memories: Callable[..., list[Any]]) -> None:
    """A parameter in bfloat16 has 2 bytes, its gradient 4, and 12 of copy and moments are divided among replicas."""
    shared = Layout(world_size=4, tensor=2, sequence=True)
    stages = Layout(world_size=2, pipeline=2)
    one, resident, of_four, last = memories(
        ({}, llama(), ONE, 0, True),
        ({"model__kto__reference__mode": "resident"}, llama(), ONE, 0, True),
        ({}, llama(), shared, 3, True),
        ({"model__global_batch_size": 4}, llama(), stages, 1, True),
    )
    whole = LAYERS * LAYER + OUTER
    assert one.parameters == pytest.approx(2 * whole, rel=0.005)
    assert one.gradients == pytest.approx(4 * whole, rel=0.005)
    assert one.optimizer == pytest.approx(12 * whole, rel=0.005)
    assert one.held == pytest.approx(18 * whole, rel=0.005) and one.reference == 0
    assert resident.held - one.held == resident.reference == pytest.approx(2 * whole, rel=0.005)
    assert of_four.held == pytest.approx((2 + 4 + 12 / 2) * whole / 2, rel=0.01)  # but for the norms, all is halved
    of_stage = LAYERS // 2 * LAYER + VOCABULARY * HIDDEN + HIDDEN
    row = 2 * 256 * HIDDEN  # which Megatron keeps, and its gradient
    assert last.held == pytest.approx(18 * of_stage + 2 * row, rel=0.005)


@pytest.mark.slow
def test_a_deep_model_follows_from_two_shallow_ones(memories: Callable[..., list[Any]]) -> None:
    cases = [(LORA, TP2, 1), (FULL, ONE, 0)]
    jobs = [
        (changes, llama(6), layout, rank, every_layer)
        for changes, layout, rank in cases
        for every_layer in (True, False)
    ]
    for whole, quick in zip(*[iter(memories(*jobs))] * 2, strict=True):
        assert quick.held == pytest.approx(whole.held, rel=0.001)
        assert quick.peaks == pytest.approx(whole.peaks, rel=0.005)


def test_what_makes_a_step_smaller(memories: Callable[..., list[Any]]) -> None:
    plain, recomputed, adapters, float16 = memories(
        ({}, llama(), ONE, 0, True),
        (FULL, llama(), ONE, 0, True),
        (LORA, llama(), ONE, 0, True),
        ({"trainer__precision": "16-mixed"}, llama(), ONE, 0, True),
    )
    # a layer's input is kept of each but the one that is computed again
    assert recomputed.held == plain.held
    assert plain.peaks["training"] - recomputed.peaks["training"] > (LAYERS - 1) * 10 * 2 * 256 * HIDDEN
    # rank 32 beside the seven projections; the weights themselves have neither gradients nor moments
    pairs = 4 * HIDDEN + 2 * (HIDDEN + 128) + 3 * (HIDDEN + INNER)
    assert adapters.gradients == pytest.approx(4 * 32 * LAYERS * pairs, rel=0.01)
    assert adapters.optimizer == pytest.approx(12 * 32 * LAYERS * pairs, rel=0.02)
    assert float16 == plain
    assert plain.peak == max(plain.peaks.values()) == plain.peaks["training"] > plain.peaks["scoring"] > plain.held


def test_a_base_in_fewer_bits_takes_those(memories: Callable[..., list[Any]]) -> None:
    """Four bits and 32 for each 64; eight and 32 a row. What a step needs besides is the same but for one matrix."""
    base = "model__peft__quantize_base"
    plain, of_two, four, eight, divided = memories(
        (LORA, llama(), ONE, 0, True),
        (LORA, llama(), TP2, 0, True),
        ({**LORA, base: "nf4"}, llama(), ONE, 0, True),
        ({**LORA, base: "int8"}, llama(), ONE, 0, True),
        ({**LORA, base: "nf4"}, llama(), TP2, 0, True),
    )
    linear = LAYER - 2 * HIDDEN
    rows = 2 * HIDDEN + 2 * 128 + 2 * INNER + HIDDEN
    assert plain.parameters - four.parameters == pytest.approx(LAYERS * linear * (2 - 4.5 / 8), rel=0.002)
    assert plain.parameters - eight.parameters == pytest.approx(LAYERS * (linear - 4 * rows), rel=0.002)
    assert four.gradients == plain.gradients
    assert four.optimizer == pytest.approx(plain.optimizer, abs=2048)  # a table of 16 numbers besides
    assert four.peak - four.held == eight.peak - eight.held <= plain.peak - plain.held + 2 * 2 * HIDDEN * INNER
    saved, of_half = plain.parameters - four.parameters, of_two.parameters - divided.parameters
    assert of_half == pytest.approx(saved / 2, rel=0.002)


def test_an_optimizer_that_takes_less(memories: Callable[..., list[Any]]) -> None:
    """Of 12 bytes moments in bfloat16 leave 8; what the host holds is not on the device at all."""
    plain, moments, half, none = memories(
        ({}, llama(), ONE, 0, True),
        ({"model__optim__states": "bfloat16"}, llama(), ONE, 0, True),
        ({"model__optim__offload_fraction": 0.5}, llama(), ONE, 0, True),
        ({"model__optim__offload_fraction": 1.0}, llama(), ONE, 0, True),
    )
    whole = LAYERS * LAYER + OUTER
    assert moments.optimizer == pytest.approx(8 * whole, rel=0.005)
    assert half.optimizer == pytest.approx(6 * whole, rel=0.05)
    assert none.optimizer <= 4 * 512  # single numbers that Megatron has
    assert none.peaks["training"] == pytest.approx(plain.peaks["training"] - 12 * whole, rel=0.001)
    assert none.peaks["update"] == pytest.approx(none.held, rel=0.005)


def test_the_rows_of_the_longest_documents() -> None:
    config = configured(model__global_batch_size=64, model__micro_batch_size=2, model__data__seq_length=5)
    row = [(3, 2)] * 2
    assert longest_rows(config, ONE) == [row] * 2
    assert longest_rows(config, Layout(world_size=4, pipeline=4)) == [row] * 5
    assert longest_rows(config, Layout(world_size=4, pipeline=4, virtual=2)) == [row] * 12
    assert longest_rows(config, Layout(world_size=32)) == [row]  # there are no more
    config.model.kto.log_prob_forward_micro_batch_size = 8
    assert longest_rows(config, ONE) == [row] * 4  # eight documents of the KL set
    config.model.kto.log_prob_forward_micro_batch_size = None
    config.model.micro_batch_size, config.model.micro_batch_tokens = 1, 16
    assert longest_rows(config, ONE) == [[(3, 2)] * 3] * 2


def test_shallow_models_have_the_layers_of_the_deep_one() -> None:
    sliding = [*["sliding_attention"] * 5, "full_attention"]
    gemma = Gemma3TextConfig(num_hidden_layers=26, layer_types=(sliding * 5)[:26], vocab_size=64, hidden_size=64)
    assert memory._period(gemma) == 6
    assert memory._of_depth(gemma, 12).layer_types == sliding * 2
    assert memory._of_depth(gemma, 30).layer_types == sliding * 5
    assert memory._shallow_depth(KTOConfig(), gemma, 26) == 6
    assert memory._shallow_depth(KTOConfig(), llama(6), 6) == 2
    assert memory._shallow_depth(KTOConfig(), llama(), 4) is None  # the deeper one would be as deep
    grouped = configured(
        model__activations_checkpoint_granularity="full",
        model__activations_checkpoint_method="uniform",
        model__activations_checkpoint_num_layers=5,
    )
    assert memory._shallow_depth(grouped, llama(20), 20) == 5
    blocks = configured(
        model__activations_checkpoint_granularity="full",
        model__activations_checkpoint_method="block",
        model__activations_checkpoint_num_layers=3,
    )
    assert memory._shallow_depth(blocks, llama(20), 20) is None


def test_refusals(run_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    experts = MixtralConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_local_experts=4)
    with pytest.raises(ConfigError, match="depends on where its router sends the tokens"):
        step_memory(configured(), experts, ONE, 0)
    assert run_ranks(refusal, 1) == ["A dry run needs a process of its own; this one belongs to a run."]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        step_memory(configured(), llama(2), ONE, 0)


def refusal() -> str:
    try:
        step_memory(configured(), llama(2), ONE, 0)
    except ConfigError as error:
        return str(error)
    return "none"


@pytest.mark.slow
def test_models_of_a_cluster(memories: Callable[..., list[Any]]) -> None:
    """Of 8B TP8 the device holds 18 bytes for each parameter of its eighth, and no reference beside them."""
    shape: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    of_8b = llama(32, **shape, hidden_size=4096, intermediate_size=14336, num_attention_heads=32)
    of_70b = llama(80, **shape, hidden_size=8192, intermediate_size=28672, num_attention_heads=64)
    cluster = Layout(world_size=512, tensor=8, sequence=True, pipeline=8)
    batch = {"model__data__seq_length": 4096, "model__global_batch_size": 512}
    small, first, last = memories(
        (batch, of_8b, replace(TP2, world_size=8, tensor=8), 0, False),
        (batch, of_70b, cluster, 0, False),
        (batch, of_70b, cluster, 511, False),
    )
    # besides, Megatron gathers hidden states [4096, h] in bfloat16 into memory that it keeps, and the last stage keeps
    # an eighth of those that came, and of their gradient; every rank has the norms whole
    layer = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336
    of_rank = (32 * layer + 2 * 128_256 * 4096) / 8 + 65 * 4096
    assert small.held == pytest.approx(18 * of_rank + 2 * 4096 * 4096, abs=2**17)
    assert small.peak > small.held + 32 * 10 * 2 * 4096 * 4096 / 8
    # 10 of 80 layers and the embedding, or the output layer and the last norm; the optimizer's state is divided by 8
    # once more
    of_stage = (10 * (2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672) + 128_256 * 8192) / 8
    for each, norms, rows in ((first, 20, 1.0), (last, 21, 1.0 + 2 / 8)):
        by_hand = (2 + 4 + 12 / 8) * (of_stage + norms * 8192) + rows * 2 * 4096 * 8192
        assert each.held == pytest.approx(by_hand, abs=2**17)
    assert first.peak > last.peak  # the first stage holds eight micro-batches at once, the last one one
