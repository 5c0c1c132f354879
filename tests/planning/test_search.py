"""Which layouts are looked at, refused, too large and best; and published layouts of trainings that ran."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig

from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError
from nemo_kto.planning.search import RECOMPUTE, Planner
from nemo_kto.runtime.devices import DEVICES
from tests.planning.shapes import GPT_OSS_120B, LLAMA_8B, LLAMA_70B, QWEN3_30B

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
GIB = 2**30
H100 = DEVICES["h100"]


def planner(model: PretrainedConfig, gpus: int, *, batch: int = 64, length: int = 4096, **settings: Any) -> Planner:
    config = KTOConfig()
    config.trainer.precision = "bf16-mixed"
    config.model.global_batch_size = batch
    config.model.data.seq_length = length
    config.model.kto.reference.mode = settings.pop("reference", "auto")
    if settings.pop("lora", False):
        config.model.peft.peft_scheme = "lora"
        config.model.peft.lora_tuning.target_modules = ["all"]
    return Planner(
        config, model, gpus=gpus, node_size=min(gpus, 8), device=settings.pop("device", H100), length=length
    )


def alone(function: Callable[[], Any]) -> Any:
    torch.distributed.destroy_process_group()  # the harness's
    return function()


def search_8b() -> dict[str, Any]:
    small = planner(LLAMA_8B, 8)
    found = small.search({})
    fixed = small.search({"tensor_model_parallel_size": 4, "micro_batch_size": 2})
    return {
        "times": [plan.time.total for plan in found.fitting],
        "peaks": [plan.memory.peak for plan in found.fitting],
        "too large": [(plan.layout.model_parallel, plan.memory.peak) for plan in found.too_large],
        "room": small.room,
        "divided": [[plan.divided for plan in plans] for plans in (found.fitting, found.too_large)],
        "refused": dict(found.refused),
        "fixed": {(plan.layout.tensor, plan.config.model.micro_batch_size) for plan in fixed.fitting},
        "on a100 of 40": len(
            planner(LLAMA_8B, 1, device=replace(DEVICES["a100"], memory_gib=39.4)).search({}).fitting
        ),
    }


def test_a_search(run_ranks: Callable[..., list[Any]]) -> None:
    (found,) = run_ranks(alone, 1, search_8b)
    times, room = found["times"], found["room"]
    assert room == round(H100.memory_gib * GIB * 0.95) - 3 * GIB
    assert len(times) >= 5 and all(peak <= room for peak in found["peaks"])
    assert all(after >= before * 0.98 for before, after in zip(times, times[1:], strict=False))
    assert all(peak > room for _, peak in found["too large"])
    # the whole model on each GPU: 2 + 4 + 12 / 8 bytes of 8.03 B parameters leave no room for a row's activations
    assert min(peak for size, peak in found["too large"] if size == 1) > 7.5 * 8.03e9 + 15 * GIB
    assert all(len(set(divided)) == len(divided) for divided in found["divided"]), "of variants the best is kept"
    assert any(reason.startswith("8 processes (trainer.devices x") for reason in found["refused"])
    assert found["fixed"] == {(4, 2)}
    assert found["on a100 of 40"] == 0


def uneven() -> list[Any]:
    many = planner(replace_layers(LLAMA_8B, 30), 32, batch=128)
    return (
        [many._uneven(pipeline) for pipeline in (1, 2, 4, 8, 16, 20)],
        many._virtual_sizes(2),
        many._virtual_sizes(4),
    )


def replace_layers(model: LlamaConfig, layers: int) -> LlamaConfig:
    return LlamaConfig(**{**model.to_dict(), "num_hidden_layers": layers})


def test_stages_that_are_not_equal(run_ranks: Callable[..., list[Any]]) -> None:
    """30 layers in 4 stages are 7 8 8 7, in 8 stages 3 4 4 4 4 4 4 3, in 16 more than 14 x 2 are left; in 20 none."""
    ((uneven_sizes, of_two, of_four),) = run_ranks(alone, 1, uneven)
    first, last = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
    assert uneven_sizes == [{}, {}, {first: 7, last: 7}, {first: 3, last: 3}, {first: 1, last: 1}, {}]
    assert of_two == [None, 3, 5] and of_four == [None]


def refuse() -> str:
    try:
        planner(LLAMA_8B, 8).plan({"tensor_model_parallel_size": 16})
    except ConfigError as error:
        return str(error)
    return "none"


def test_the_trainer_judges(run_ranks: Callable[..., list[Any]]) -> None:
    (text,) = run_ranks(alone, 1, refuse)
    assert text.startswith("8 processes (trainer.devices x trainer.num_nodes) cannot be divided")


TP2_PP4: dict[str, Any] = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 4,
    "virtual_pipeline_model_parallel_size": 10,
}
TP4_PP4_VPP5: dict[str, Any] = {
    "tensor_model_parallel_size": 4,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 4,
    "virtual_pipeline_model_parallel_size": 5,
}


def published() -> dict[str, tuple[float, float]]:
    """Return name -> GiB at the peak, and tokens per second and GPU of a step of fine-tuning.

    That is the training pass and what goes with it: nothing is scored without gradients.
    """
    cases = {
        # Megatron-Bridge, nightly documentation of its performance recipes for H100 (2026-11-29)
        "8B, CP2": (planner(LLAMA_8B, 8, batch=128, length=8192, reference="cached"), {"context_parallel_size": 2}),
        "70B, CP2": (
            planner(LLAMA_70B, 64, batch=256, length=8192, reference="cached"),
            {**TP4_PP4_VPP5, "context_parallel_size": 2},
        ),
        "70B, 32 GPUs": (planner(LLAMA_70B, 32, batch=32, reference="cached"), TP4_PP4_VPP5),
        "70B, LoRA, VPP20": (
            planner(LLAMA_70B, 8, batch=32, reference="cached", lora=True),
            {**RECOMPUTE["full"], "pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 20},
        ),
        # NeMo Automodel, docs/performance-summary.md at 01926a5 (2025-10-02)
        "70B, LoRA, TP2": (planner(LLAMA_70B, 8, batch=32, reference="cached", lora=True), TP2_PP4),
        "30B-A3B": (
            planner(QWEN3_30B, 8, batch=512, reference="cached"),
            {"expert_model_parallel_size": 8, **RECOMPUTE["full"]},
        ),
        # Megatron-Bridge, docs/performance-summary-archive.md at 0a25f91, container 26.02 (gpt-oss) and 25.11, in FP8
        "gpt-oss 120B": (
            planner(GPT_OSS_120B, 64, batch=1280, reference="cached"),
            {"pipeline_model_parallel_size": 4, "expert_model_parallel_size": 8},
        ),
        "8B, DP8": (planner(LLAMA_8B, 8, batch=128, length=8192, reference="cached"), {}),
        "70B, TP4 PP8": (
            planner(LLAMA_70B, 64, batch=128, length=8192, reference="cached"),
            {**TP4_PP4_VPP5, "pipeline_model_parallel_size": 8},
        ),
    }
    found = {}
    for name, (each, keys) in cases.items():
        plan = each.plan(keys)
        scored = plan.time.scoring * (1 + (plan.time.bubble / (plan.time.training + plan.time.scoring)))
        tokens = each.config.model.global_batch_size * each.length / each.gpus
        found[name] = (plan.memory.peak / GIB, tokens / (plan.time.total - scored))
    return found


def test_published_layouts(run_ranks: Callable[..., list[Any]]) -> None:
    """What ran on GPUs of 80 GB fits there; docs/plan.md has the estimates beside what was measured."""
    (found,) = run_ranks(alone, 1, published)
    for name in ("8B, CP2", "70B, CP2", "70B, 32 GPUs", "70B, LoRA, VPP20", "70B, LoRA, TP2"):
        assert found[name][0] < H100.memory_gib, name
    rows = re.findall(
        r"^\| ([^|]+) \|.*\| ([\d.]+) GiB \| ([\d,]+) \| [^|]* \|$", PAGE.read_text("utf-8"), re.MULTILINE
    )
    documented = {name.strip(): (float(peak), int(speed.replace(",", ""))) for name, peak, speed in rows}
    assert documented == {name: (round(peak, 1), round(speed, -1)) for name, (peak, speed) in found.items()}
