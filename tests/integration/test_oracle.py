"""Ten steps against an oracle that shares no code with us, see `oracle.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.distributed_harness import free_port
from tests.integration.assets import (
    GLOBAL_BATCH_SIZE,
    make_model_folder,
    read_series,
    settings,
    train_on_rank,
    write_feedback,
)
from tests.integration.oracle import (
    CLIP,
    DESIRABLE_WEIGHT,
    MICRO_BATCH_SIZE,
    PLAIN,
    STEPS,
    UNDESIRABLE_WEIGHT,
    WEIGHT_DECAY,
    assert_equal,
    oracle,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle")
    make_model_folder(folder / "hf")
    make_model_folder(folder / "experts", kind="experts")
    write_feedback(folder / "train.jsonl", number=40, seed=5)
    write_feedback(folder / "validation.jsonl", number=11, seed=6)
    return folder


@pytest.mark.parametrize(
    ("average", "class_mean", "kl_scope"),
    [(False, False, "global_batch"), (True, True, "global_batch"), (False, True, "micro_batch")],
)
def test_ten_steps_equal_the_oracle(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], average: bool, class_mean: bool, kl_scope: str
) -> None:
    changes = {
        "model__micro_batch_size": MICRO_BATCH_SIZE,
        "model__kto__desirable_loss_weight": DESIRABLE_WEIGHT,
        "model__kto__undesirable_loss_weight": UNDESIRABLE_WEIGHT,
        "model__kto__preference_average_log_probs": average,
        "model__kto__loss_reduction": "class_mean" if class_mean else "sample_mean",
        "model__kto__kl_scope": kl_scope,
        "model__optim__weight_decay": WEIGHT_DECAY,
        "model__data__data_prefix__validation": str(root / "validation.jsonl"),
        "trainer__kto__val_check_interval": STEPS,
        "trainer__kto__gradient_clip_val": CLIP,
    }
    run_ranks(train_on_rank, 1, free_port(), settings(root, tmp_path, **changes))
    kl_group = GLOBAL_BATCH_SIZE if kl_scope == "global_batch" else MICRO_BATCH_SIZE
    actual = read_series(tmp_path)
    expected = oracle(root, average=average, class_mean=class_mean, kl_group=kl_group)
    for name, values in expected.items():
        series = list(actual[name if name.startswith("val/") else f"train/{name}"].values())
        # kl and rewards are differences of log-probs of about -30: rounding leaves them an absolute error
        tolerance = 2e-5 if "kl" in name or "rewards" in name else 0.0
        assert series == pytest.approx(values, rel=1e-4, abs=tolerance), name
    assert (
        max(expected["kl"]) > 0 and (average or expected["val/kl"][0] > 0) and min(expected["grad_norm"]) > CLIP / 10
    )


@pytest.mark.parametrize("mode", ["resident", "cached"])
def test_part_of_the_kl_set_and_rows_of_so_many_tokens(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], mode: str
) -> None:
    """Of each training batch half of the prompts have a KL response, of a validation batch all."""
    changes = {
        **PLAIN,
        "model__micro_batch_tokens": 24,
        "model__kto__kl_fraction": 0.5,
        "model__kto__reference__mode": mode,
        "model__data__data_prefix__validation": str(root / "validation.jsonl"),
        "trainer__kto__val_check_interval": STEPS,
    }
    run_ranks(train_on_rank, 2, free_port(), settings(root, tmp_path, **changes))
    actual, expected = read_series(tmp_path), oracle(root, kl_fraction=0.5)
    assert_equal(actual, expected)
    assert list(actual["val/kl"].values()) == pytest.approx(expected["val/kl"], rel=1e-4)
    assert max(expected["kl"]) > 0
    assert expected["kl"] != pytest.approx(oracle(root)["kl"], rel=1e-2)


def test_experts_and_their_balance_equal_the_oracle(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    coeff = 0.1
    changes = {
        "pretrained_checkpoint__restore_from_path": str(root / "experts"),
        "model__micro_batch_size": MICRO_BATCH_SIZE,
        "model__moe_aux_loss_coeff": coeff,
        "model__kto__desirable_loss_weight": DESIRABLE_WEIGHT,
        "model__kto__undesirable_loss_weight": UNDESIRABLE_WEIGHT,
        "model__optim__weight_decay": WEIGHT_DECAY,
        "trainer__kto__gradient_clip_val": CLIP,
    }
    run_ranks(train_on_rank, 2, free_port(), settings(root, tmp_path, **changes, model__expert_model_parallel_size=2))
    actual = read_series(tmp_path)
    assert_equal(actual, oracle(root, model="experts", aux_coeff=coeff))


def make_adapter(folder: Path, base: Path, *, seed: int, **changes: Any) -> Path:
    """Save an adapter with random A and B, made by PEFT, on some projections of some layers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=2,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
        layers_to_transform=[0, 1, 3],
        **changes,
    )
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
        elif "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        elif "modules_to_save" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
    adapted.save_pretrained(folder)
    return folder


# PEFT's fields, and the keys that mean them
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alike": ({}, {}),
    "several ranks": (
        {"rank_pattern": {"layers.1.*": 2, "q_proj": 7}, "alpha_pattern": {"o_proj": 5}},
        {"rank_pattern": {"layers.1.*": 2, "q_proj": 7}, "alpha_pattern": {"self_attn.o_proj": 5}},
    ),
    "dora": ({"use_dora": True}, {"dora": True}),
    "whole": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ),
}


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        *(("base", kind) for kind in KINDS),
        *(("start", kind) for kind in ("several ranks", "dora", "whole")),
        ("other", "alike"),
    ],
)
def test_ten_steps_of_an_adapter_equal_pefts(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], reference: str, kind: str
) -> None:
    """The reference is the base, the starting adapter, or another model."""
    fields, keys = KINDS[kind]
    adapter = make_adapter(tmp_path / "adapter", root / "hf", seed=3, **fields)
    checkpoint = {"base": None, "start": adapter, "other": make_model_folder(tmp_path / "other", seed=9)}[reference]
    prefix = "model__peft__lora_tuning__"
    changes = {
        "model__peft__peft_scheme": "lora",
        f"{prefix}target_modules": ["q_proj", "v_proj", "attention_dense", "gate_proj", "mlp_fc2"],
        f"{prefix}adapter_dim": 4,
        f"{prefix}alpha": 2,
        f"{prefix}rslora": True,
        f"{prefix}layer_selection": [1, 2, 4],
        f"{prefix}restore_from_path": str(adapter),
        "model__kto__reference__checkpoint": None if checkpoint is None else str(checkpoint),
        **{f"{prefix}{key}": value for key, value in keys.items()},
    }
    run_ranks(train_on_rank, 1, free_port(), settings(root, tmp_path / "log", **PLAIN, **changes))
    actual = read_series(tmp_path / "log")
    folders = {"reference": checkpoint} if reference == "other" else {"reference_adapter": checkpoint}
    expected = oracle(root, adapter=adapter, **folders)
    assert_equal(actual, expected)
    assert (actual["train/rewards/chosen"][0] == actual["train/kl"][0] == 0) == (reference == "start")
    assert expected["kl"][0] > 0 or reference != "other"


@pytest.mark.parametrize("mode", ["cpu_swap", "resident"])
def test_another_reference_that_moves_equals_the_oracle(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], mode: str
) -> None:
    """Every three steps it becomes 0.6 policy + 0.4 reference (TR-DPO's soft update, arXiv 2404.09656)."""
    other = make_model_folder(tmp_path / "other", seed=9)
    changes = {
        "model__kto__reference__mode": mode,
        "model__kto__reference__checkpoint": str(other),
        "model__kto__reference__sync_every_n_steps": 3,
        "model__kto__reference__sync_mixup_alpha": 0.6,
        "model__optim__overlap_param_sync": True,
    }
    run_ranks(train_on_rank, 2, free_port(), settings(root, tmp_path / "log", **PLAIN, **changes))
    expected = oracle(root, reference=other, sync=(3, 0.6))
    assert_equal(read_series(tmp_path / "log"), expected)
    assert expected["kl"][0] > 2 * max(expected["kl"][9], 1)  # it has come nearer
