"""Runs beside a base in four or eight bits: bitsandbytes' numbers, the same under every layout, and never changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kto.runtime.bits import bitsandbytes
from tests.distributed_harness import free_port
from tests.integration.assets import read_series, settings, train_on_rank
from tests.integration.oracle import PLAIN, assert_equal, oracle
from tests.integration.test_oracle import make_adapter

PREFIX = "model__peft__lora_tuning__"
LORA: dict[str, Any] = {
    "model__peft__peft_scheme": "lora",
    f"{PREFIX}target_modules": ["q_proj", "v_proj", "attention_dense", "gate_proj", "mlp_fc2"],
    f"{PREFIX}adapter_dim": 4,
    f"{PREFIX}alpha": 2,
    f"{PREFIX}rslora": True,
    f"{PREFIX}layer_selection": [1, 2, 4],
}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"model__peft__quantize_base": "nf4"},
    "nf4_double": {"model__peft__quantize_base": "nf4", "model__peft__double_quantization": True},
    "int8": {"model__peft__quantize_base": "int8"},
}


def through(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """Return what bitsandbytes, as transformers calls it, makes of a weight and gives back."""
    functional = bitsandbytes().functional
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        plain: torch.Tensor = functional.int8_vectorwise_dequant(codes, scales)
        return plain
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=kind == "nf4_double"
    )
    back: torch.Tensor = functional.dequantize_4bit(codes, state)
    return back


def dequantised(folder: Path, kind: str, target: Path) -> Path:
    """Save a model whose projections went through `kind`; the output layer stays as transformers leaves it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(through(kind, module.weight))
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_equal_pefts_beside_what_bitsandbytes_makes_of_the_base(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], kind: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", root / "wide", seed=3)
    changes = {**LORA, **KINDS[kind], f"{PREFIX}restore_from_path": str(adapter)}
    values = settings(root, tmp_path / "log", **PLAIN, **changes)
    values["pretrained_checkpoint.restore_from_path"] = str(root / "wide")
    run_ranks(train_on_rank, 1, free_port(), values)
    dequantised(root / "wide", kind, root / f"wide_{kind}")
    expected = oracle(root, model=f"wide_{kind}", adapter=adapter)
    assert_equal(read_series(tmp_path / "log"), expected)
    assert abs(expected["rewards/chosen"][0]) > 1e-3
