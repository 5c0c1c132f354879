"""Parameters of ranks: against transformers' models, against counts by hand, and parts against whole ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from nemo_kto.config.schema import KTOConfig
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.lora import add_adapters
from nemo_kto.planning.counts import parts_of
from nemo_kto.runs.reference import lora_settings
from nemo_kto.runtime.dry_run import alone
from nemo_kto.runtime.layout import Layout
from tests.network.tiny_hf import families
from tests.planning.shapes import LLAMA_70B, QWEN3_235B

FAMILIES = families()


def configured(*, lora: str = "", **model: Any) -> KTOConfig:
    config = KTOConfig()
    config.trainer.precision = "bf16-mixed"
    if lora:
        config.model.peft.peft_scheme = "lora"
        config.model.peft.lora_tuning.target_modules = ["attention"]
        if lora == "patterns":
            config.model.peft.lora_tuning.rank_pattern = {"layers.[02].*": 5, "o_proj": 3}
        config.model.peft.lora_tuning.dora = lora == "dora"
        config.model.peft.lora_tuning.modules_to_save = ["embed_tokens", "lm_head"] if lora == "whole" else None
    for name, value in model.items():
        setattr(config.model, name, value)
    return config


def in_transformers(hf_config: PretrainedConfig) -> int:
    """Return how many parameters transformers' model has; biases of routers are no parameters here, nor trained."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    return sum(
        parameter.numel() for name, parameter in model.named_parameters() if "e_score_correction_bias" not in name
    )


def count_families() -> dict[str, int]:
    """Return family -> parameters of its tiny model, without a padded vocabulary."""
    torch.distributed.destroy_process_group()  # the harness's
    config = configured(make_vocab_size_divisible_by=1)
    return {name: parts_of(config, hf_config, None).whole.all.all for name, hf_config in FAMILIES.items()}


def test_models_have_as_many_parameters_as_in_transformers(run_ranks: Callable[..., list[Any]]) -> None:
    (counted,) = run_ranks(count_families, 1)
    assert counted == {name: in_transformers(hf_config) for name, hf_config in FAMILIES.items()}


LAYOUTS = [
    Layout(world_size=2, tensor=2, sequence=True),
    Layout(world_size=4, tensor=2, sequence=True, pipeline=2),
    Layout(world_size=2, pipeline=2, virtual=2),
    Layout(world_size=3, pipeline=3, first_stage_layers=1, last_stage_layers=1),
    Layout(world_size=4, tensor=2, sequence=True, expert=2, expert_tensor=1),
]


def built_by_rank(hf_config: PretrainedConfig, lora: Any, layout: Layout, rank: int) -> dict[str, int]:
    """Return how many parameters a rank has, trained or not, of all chunks that it builds."""
    counted = {"trained": 0, "frozen": 0}
    with alone(layout, rank):
        for chunk in range(layout.virtual):
            model = build_gpt(
                hf_config,
                layout,
                chunk=chunk,
                transformer_impl="local",
                vocab_pad_multiple=4,
                unfused=lora is not None,
            )
            if lora is not None:
                add_adapters(model, lora)
            for parameter in model.parameters():
                counted["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counted


def compare_ranks(names: list[str]) -> list[str]:
    """Return where a rank has other parameters than its parts say."""
    torch.distributed.destroy_process_group()
    wrong = []
    for name in names:
        hf_config, sizes = FAMILIES[name], dimensions_of(FAMILIES[name])
        for lora in ("", "alike", "patterns", "dora", "whole"):
            if lora == "whole" and sizes.tied:
                continue
            config = configured(lora=lora, make_vocab_size_divisible_by=4)
            settings = lora_settings(config, hf_config)
            parts = parts_of(config, hf_config, settings)
            for layout in LAYOUTS[: None if sizes.mixture is not None else -1]:
                for rank in range(layout.world_size):
                    stage = rank // (layout.world_size // layout.pipeline)
                    part = parts.of_stage(layout, stage)
                    found = built_by_rank(hf_config, settings, layout, rank)
                    expected = {"trained": part.trained.of_rank(layout), "frozen": part.frozen.of_rank(layout)}
                    if found != expected:
                        wrong.append(f"{name} {layout} rank {rank} lora {lora}: {found}, not {expected}")
    return wrong


def test_parts_make_up_what_ranks_build(run_ranks: Callable[..., list[Any]]) -> None:
    names = ["llama", "qwen2_tied", "qwen3_moe_mixed", "qwen2_moe", "gemma3_text", "deepseek_v3", "qwen3_next"]
    assert run_ranks(compare_ranks, 1, names) == [[]]


def count_large() -> list[int]:
    torch.distributed.destroy_process_group()
    of_70b, of_235b = (parts_of(configured(), hf_config, None) for hf_config in (LLAMA_70B, QWEN3_235B))
    return [of_70b.whole.all.all, of_70b.of_stage(CLUSTER, 0).all.of_rank(CLUSTER), of_235b.whole.all.all]


CLUSTER = Layout(world_size=512, tensor=8, sequence=True, pipeline=8)


def test_a_rank_of_512(run_ranks: Callable[..., list[Any]]) -> None:
    """Of Llama's 70B, counted by hand; Qwen3-235B-A22B has 235.09 B parameters by its card."""
    attention = 2 * 8192 * (8192 + 1024)
    layer = attention + 3 * 8192 * 28672 + 2 * 8192
    whole = 80 * layer + 2 * 128256 * 8192 + 8192
    (counted,) = run_ranks(count_large, 1)
    assert counted[0] == whole == 70_553_706_496
    assert counted[1] == (10 * (layer - 2 * 8192) + 128256 * 8192) // 8 + 10 * 2 * 8192 == 1_201_045_504
    assert counted[2] == pytest.approx(235.09e9, rel=1e-4)
