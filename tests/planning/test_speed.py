"""What a step's estimate is made of, by hand, and beside published runs."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from nemo_kto.config.schema import KTOConfig, OptimConfig
from nemo_kto.network.families import dimensions_of
from nemo_kto.planning.counts import ModelParts, Parameters, Part
from nemo_kto.planning.memory import RankMemory
from nemo_kto.planning.speed import HOST_BANDWIDTH, OF_LINKS, OF_PEAK, DocumentFlops, Speed
from nemo_kto.runtime.devices import DEVICES
from nemo_kto.runtime.layout import Layout

H100 = DEVICES["h100"]
MODEL = LlamaConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=8
)  # eight key/value heads, too
FLOPS = DocumentFlops(layers=8_000, forward=10_000, layers_backward=16_000, backward=20_000)
LENGTH = 100
NOTHING = RankMemory(weights=0, gradients=0, optimizer=0, reference=0, activations=0)


def speed(layout: Layout, *, reference: str = "cached", parts: ModelParts | None = None, **model: Any) -> Speed:
    config = KTOConfig()
    config.trainer.precision = "bf16-mixed"
    config.model.global_batch_size = 64
    for name, value in model.items():
        setattr(config.model, name, value)
    whole = Part(trained=Parameters(whole=0, divided=8_000))
    return Speed(
        config=config,
        sizes=dimensions_of(MODEL),
        flops=FLOPS,
        parts=parts or ModelParts(embedding=whole, output=Part(), layers=(Part(),) * 8, tied=Part()),
        layout=layout,
        device=H100,
        node_size=8,
        length=LENGTH,
        reference=reference,
    )


def seconds(flops: float) -> float:
    return flops / (H100.flops * OF_PEAK)


def sent(found: Speed) -> dict[str, tuple[float, bool]]:
    return {each.kind: (each.bytes, each.within_node) for each in found.traffic()}


def test_weights_in_fewer_bits_are_made_plain_in_each_pass_of_each_row() -> None:
    """Of 64 rows: forward, backward, of the KL set, and what is recomputed; codes are read, bfloat16 is written."""
    layer = Part(
        frozen=Parameters(divided=8_000),
        quantised=Parameters(divided=8_000),
        quantised_bytes=Parameters(divided=4_500),
    )
    parts = ModelParts(embedding=Part(), output=Part(), layers=(layer,) * 8, tied=Part())
    layout = Layout(world_size=4, tensor=2, pipeline=2)
    full = {"activations_checkpoint_granularity": "full", "activations_checkpoint_method": "uniform"}
    for recompute, passes in (({}, 3), (full, 4)):
        found = speed(layout, parts=parts, **recompute).time(NOTHING)
        assert found.plain == pytest.approx(64 * passes * 4 * (4_500 + 2 * 8_000) / 2 / H100.memory_bandwidth)
    assert speed(Layout(world_size=1)).time(NOTHING).plain == 0


def test_passes() -> None:
    """A pass over the KL set beside the gradient pass, and two of a live reference."""
    of_training = seconds(64 * 30_000)
    cached = speed(Layout(world_size=1)).time(NOTHING)
    assert cached.training == pytest.approx(of_training)
    assert cached.scoring == pytest.approx(seconds(64 * 10_000))
    assert cached.total == pytest.approx(seconds(64 * 40_000))  # one GPU waits for nobody
    live = speed(Layout(world_size=1), reference="adapter_off").time(NOTHING)
    assert live.scoring == pytest.approx(3 * cached.scoring)
    again = {
        "activations_checkpoint_granularity": "full",
        "activations_checkpoint_method": "uniform",
        "activations_checkpoint_num_layers": 1,
    }
    recomputed = speed(Layout(world_size=1), **again)
    assert recomputed.time(NOTHING).training == pytest.approx(seconds(64 * 38_000))
    assert recomputed.model_flops == 64 * 40_000  # what is done twice counts once
    blocks = {**again, "activations_checkpoint_method": "block", "activations_checkpoint_num_layers": 2}
    assert speed(Layout(world_size=1), **blocks).time(NOTHING).training == pytest.approx(seconds(64 * 32_000))


def test_the_slowest_stage_and_the_bubble() -> None:
    """The last of two stages has half of the layers and the output layer; of 32 rows one stage waits one."""
    time = speed(Layout(world_size=4, pipeline=2)).time(NOTHING)
    assert time.training == pytest.approx(seconds(32 * (4_000 + 2_000 + 8_000 + 4_000)))
    assert time.bubble == pytest.approx((time.training + time.scoring) / 32)
    interleaved = speed(Layout(world_size=4, pipeline=2, virtual=4)).time(NOTHING)
    assert interleaved.bubble == pytest.approx(time.bubble / 4)
    assert interleaved.pipeline == pytest.approx(time.pipeline * 4)
    full_rows = speed(Layout(world_size=4, pipeline=2), micro_batch_tokens=800).time(NOTHING)
    assert full_rows.bubble == pytest.approx(time.bubble * 8)


def test_what_is_sent() -> None:
    """By hand: bytes of bfloat16, 64 documents of 100 tokens, 8 layers of 64 channels."""
    tokens = 64 * LENGTH
    tensor = sent(speed(Layout(world_size=2, tensor=2)))
    # four halves of a sum in each layer and pass: forward, backward, KL set
    assert tensor["tensor"] == (pytest.approx(tokens * 8 * 4 * 3 * 2 * 64 / 2), True)
    divided = sent(speed(Layout(world_size=2, tensor=2, sequence=True)))
    assert divided["tensor"][0] == pytest.approx(tokens * 8 * (4 * 3 + 2) * 2 * 64 / 2)
    context = sent(speed(Layout(world_size=2, context=2)))
    assert context["context"] == (pytest.approx(tokens / 2 * 8 * 3 * 2 * 4 * 64 / 2), True)
    across = sent(speed(Layout(world_size=16, pipeline=2)))
    assert across["pipeline"] == (pytest.approx(tokens / 8 * 2 * 64 * 3), False)
    # eight replicas: each sends seven eighths, of gradients in float32 and parameters in bfloat16
    assert across["gradients"] == (pytest.approx(8_000 * 4 * 7 / 8), True)
    assert across["parameters"] == (pytest.approx(8_000 * 2 * 7 / 8), True)
    assert sent(speed(Layout(world_size=16)))["gradients"] == (pytest.approx(8_000 * 4 * 15 / 16), False)
    alone = sent(speed(Layout(world_size=1)))
    assert all(size == 0 for size, _ in alone.values())


def test_links_and_the_host() -> None:
    memory = RankMemory(
        weights=0, gradients=100, optimizer=300, reference=0, activations=0, host=int(HOST_BANDWIDTH) // 100
    )
    inside, outside = (speed(Layout(world_size=size)) for size in (8, 16))
    of_links = [each.time(memory).gradients * OF_LINKS for each in (inside, outside)]
    assert of_links == pytest.approx([8_000 * 4 * 7 / 8 / 450e9, 8_000 * 4 * 15 / 16 / 50e9])
    assert inside.time(memory).reference == pytest.approx(0.02)  # there and back, in a hundredth of a second each
    assert inside.time(memory).optimizer == pytest.approx(700 / H100.memory_bandwidth)


def test_an_update_on_the_host() -> None:
    """A float32 parameter and two moments are read and written; a gradient of 4 bytes comes, a parameter of 2 goes."""
    second = int(HOST_BANDWIDTH)
    memory = RankMemory(weights=0, gradients=0, optimizer=0, reference=0, activations=0, host_optimizer=second)
    assert speed(Layout(world_size=1)).time(memory).optimizer == pytest.approx(2 + (4 + 2) / 12)
    fewer = speed(Layout(world_size=1), optim=OptimConfig(states="bfloat16"))
    assert fewer.time(memory).optimizer == pytest.approx(2 + (4 + 2) / 8)
