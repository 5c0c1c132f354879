"""Five steps of every family against transformers and autograd, whole models and all their adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from nemo_kto.network.families import family_of
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.projections import projections_of, projections_of_model
from tests.distributed_harness import free_port
from tests.integration.assets import (
    KINDS,
    make_model_folder,
    make_tokenizer,
    read_series,
    settings,
    train_on_rank,
    write_feedback,
)
from tests.integration.oracle import PLAIN, assert_equal, oracle
from tests.network.tiny_hf import adapters_are_read, skip_where_wrong

STEPS = 5
QUICK = ("biases", "shared", "glm4_moe", "gpt_oss", "deepseek_v3", "qwen3_next")
"""Kinds of models whose series `make test` compares too."""

kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS if kind != "llama"]
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with feedback; each test adds its model."""
    folder = tmp_path_factory.mktemp("families")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    write_feedback(folder / "train.jsonl", number=40, seed=5)
    write_feedback(folder / "validation.jsonl", number=11, seed=6)
    return folder


def train(root: Path, run_ranks: Callable[..., Any], log_dir: Path, kind: str, **changes: Any) -> Any:
    """Return the series of a run in one process."""
    changes = {
        "pretrained_checkpoint__restore_from_path": str(root / kind),
        # beside a Qwen2 model transformers would make Qwen2's of any tokenizer
        "model__tokenizer__path": str(root / "tokenizer"),
        "model__micro_batch_size": 4,
        "trainer__kto__max_steps": STEPS,
        **PLAIN,
        **changes,
    }
    run_ranks(train_on_rank, 1, free_port(), settings(root, log_dir, **changes))
    return read_series(log_dir)


@kinds
def test_five_steps_equal_the_oracle(root: Path, tmp_path: Path, run_ranks: Callable[..., Any], kind: str) -> None:
    skip_where_wrong(make_model_folder(root / kind, kind=kind))
    actual = train(root, run_ranks, tmp_path, kind)
    assert actual["train/loss"][0] != 0.5  # of unlike weights for the two classes
    assert actual["train/kl"][0] == actual["train/rewards/chosen"][0] == actual["train/rewards/rejected"][0] == 0
    expected = oracle(root, model=kind, steps=STEPS)
    assert_equal(actual, expected)
    assert max(expected["kl"]) > 0


@pytest.mark.parametrize("mode", [pytest.param("resident", marks=pytest.mark.slow), "cpu_swap"])
def test_a_reference_has_router_biases_of_its_own(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], mode: str
) -> None:
    """They are no parameters, and are exchanged with the reference's all the same."""
    make_model_folder(root / "glm4_moe", kind="glm4_moe")
    other = make_model_folder(root / "other", kind="glm4_moe", seed=1)
    changes = {"model__kto__reference__checkpoint": str(other), "model__kto__reference__mode": mode}
    actual = train(root, run_ranks, tmp_path, "glm4_moe", **changes)
    assert_equal(actual, oracle(root, model="glm4_moe", reference=other, steps=STEPS))


def make_adapter(folder: Path, base: Path, projections: tuple[str, ...]) -> Path:
    """Save an adapter with random A and B, made by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=list(projections))
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    adapted.save_pretrained(folder)
    return folder


@kinds
def test_five_steps_of_adapters_equal_pefts(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], kind: str
) -> None:
    base = make_model_folder(root / kind, kind=kind)
    skip_where_wrong(base)
    hf_config = load_hf_config(base)
    if not adapters_are_read(hf_config.model_type):
        pytest.skip("PEFT 0.19 cannot read adapters where transformers 5.8 puts experts together")
    projections = projections_of_model(hf_config)
    if not family_of(hf_config).feed_forward_adapters:
        projections = projections_of(["attention"], hf_config)
    adapter = make_adapter(tmp_path / "adapter", base, projections)
    prefix = "model__peft__lora_tuning__"
    changes = {
        "model__peft__peft_scheme": "lora",
        f"{prefix}target_modules": list(projections),
        f"{prefix}adapter_dim": 3,
        f"{prefix}alpha": 6,
        f"{prefix}restore_from_path": str(adapter),
        "model__kto__reference__checkpoint": None,
    }
    actual = train(root, run_ranks, tmp_path / "log", kind, **changes)
    expected = oracle(root, model=kind, adapter=adapter, steps=STEPS)
    assert_equal(actual, expected)
    assert expected["rewards/chosen"][0] != 0
