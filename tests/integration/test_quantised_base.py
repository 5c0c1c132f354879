"""Runs beside a base in four or eight bits: bitsandbytes' numbers, the same under every layout, and never changed."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_kto.commands.export import export_checkpoint
from nemo_kto.errors import KTOError
from nemo_kto.runtime.bits import bitsandbytes
from tests.distributed_harness import free_port
from tests.integration.assets import make_model_folder, read_series, refusal_on_rank, settings, train_on_rank
from tests.integration.oracle import PLAIN, assert_equal, oracle
from tests.integration.test_command import ENDED, TP2, WITH_CHECKPOINTS, assert_continues, command, run
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
TOKENS = torch.tensor([[3, 7, 9, 2, 11, 5, 5, 0]])


def through(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """Return what bitsandbytes, as transformers calls it, makes of a weight and gives back.

    Its library for CPUs, other than that for GPUs, does not always take the nearest level for a scale: here it is.
    """
    functional = bitsandbytes().functional
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        plain: torch.Tensor = functional.int8_vectorwise_dequant(codes, scales)
        return plain
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=kind == "nf4_double"
    )
    if kind == "nf4_double":
        _, plain_state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        blocks = [block / block.abs().max() for block in (plain_state.absmax - state.offset).split(256)]
        nearest = torch.cat([(block[:, None] - state.state2.code).abs().argmin(1) for block in blocks])
        assert (nearest != state.absmax.int()).float().mean() < 0.01
        state.absmax = nearest.to(torch.uint8)
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


PLAIN_LORA: dict[str, Any] = {
    "model__peft__peft_scheme": "lora",
    f"{PREFIX}target_modules": ["all"],
    f"{PREFIX}adapter_dim": 4,
    "model__optim__lr": 1e-2,
    "trainer__kto__max_steps": 3,
    "exp_manager__create_checkpoint_callback": True,
    "export__enabled": True,
}


def run_beside(train: Callable[..., Path], root: Path, world_size: int, **changes: Any) -> Path:
    return train(
        world_size,
        **{**PLAIN_LORA, **changes},
        pretrained_checkpoint__restore_from_path=str(root / "wide"),
    )


@pytest.fixture(scope="module")
def trained(root: Path, train: Callable[..., Path]) -> Path:
    """Return the log folder of three steps beside a base in four bits, on two pipeline stages, merged at the end."""
    return run_beside(
        train, root, 2, **KINDS["nf4"], export__merge_adapters=True, model__pipeline_model_parallel_size=2
    )


def last(log_dir: Path) -> Path:
    (folder,) = (log_dir / "checkpoints").glob("*-last")
    return folder


def export(checkpoint: Path, folder: Path, ways: dict[str, Any]) -> str:
    """Export a checkpoint as the command does; return the error, if any."""
    dist.destroy_process_group()
    try:
        export_checkpoint(checkpoint, folder, **ways)
    except KTOError as error:
        return str(error)
    return ""


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    result: torch.Tensor = model.eval()(TOKENS).logits
    return result


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_first_loss_is_one_half(trained: Path) -> None:
    assert read_series(trained)["train/loss"][0] == 0.5


def test_a_checkpoint_becomes_an_adapter_and_merged_folders(
    root: Path, trained: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    """PEFT's model beside what bitsandbytes makes of the base is what was trained; merged into it, or the original."""
    for name, ways in (
        ("adapter", {}),
        ("merged", {"merge": True}),
        ("original", {"merge": True, "into_original": True}),
    ):
        assert run_ranks(export, 1, last(trained), tmp_path / name, ways) == [""]
    base = dequantised(root / "wide", "nf4", tmp_path / "base")
    adapted = logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter"))
    torch.testing.assert_close(logits(load(tmp_path / "merged")), adapted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(load(trained / "hf")), adapted, rtol=1e-4, atol=1e-5)
    text = (tmp_path / "adapter" / "README.md").read_text()
    example = (
        text.split("```python\n")[1].split("tokenizer =")[0].replace("path/to/this/folder", str(tmp_path / "adapter"))
    )
    names: dict[str, Any] = {}
    exec(example, names)
    functional, weights = bitsandbytes().functional, load(base).state_dict()
    loaded = names["model"].get_base_model().named_modules()
    in_four_bits = {
        name: module for name, module in loaded if hasattr(module, "weight_format") or "base_layer" in name
    }
    assert len(in_four_bits) == 28
    for name, module in in_four_bits.items():
        plain = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(plain.float(), weights[name.replace("base_layer", "weight")]), name
    assert "It was trained beside its base model in nf4" in text
    beside = logits(PeftModel.from_pretrained(load(root / "wide"), tmp_path / "adapter"))
    torch.testing.assert_close(logits(load(tmp_path / "original")), beside, rtol=1e-4, atol=1e-5)
    assert (adapted - beside).abs().max() > 0.01


def test_a_run_merges_into_the_original_itself(root: Path, trained: Path, train: Callable[..., Path]) -> None:
    log_dir = run_beside(
        train,
        root,
        2,
        **KINDS["nf4"],
        export__merge_adapters=True,
        export__merge_into_original=True,
        model__tensor_model_parallel_size=2,
    )
    weights = load(log_dir / "hf").state_dict()
    original, merged = load(root / "wide").state_dict(), load(trained / "hf").state_dict()
    for name in weights:
        # an adapter changes a weight by far less than four bits do
        if name.endswith("proj.weight"):
            assert (weights[name] - original[name]).abs().max() < (weights[name] - merged[name]).abs().max()
        else:
            assert torch.equal(weights[name], original[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_one_that_was_not_stopped(root: Path, train: Callable[..., Path], kind: str) -> None:
    """The base is quantised again, to the same bits."""
    changes = {**KINDS[kind], "model__optim__sched__name": "Constant"}  # which a shorter run has too
    whole = run_beside(train, root, 1, **changes)
    halves = run_beside(train, root, 1, **changes, trainer__kto__max_steps=2)
    run_beside(train, root, 1, **changes, log_dir=halves)
    ours, theirs = (load_file(folder / "hf" / "adapter_model.safetensors") for folder in (halves, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_killed_run_continues_as_if_it_had_not_been(root: Path, tmp_path: Path) -> None:
    """Killed with both its ranks, wherever it was in its first eight steps, and started again."""
    changes = {
        **TP2,
        **WITH_CHECKPOINTS,
        **KINDS["nf4_double"],
        "model__peft__peft_scheme": "lora",
        "model__optim__lr": 1e-2,
        "pretrained_checkpoint__restore_from_path": str(root / "wide"),
    }
    code, output, errors = run(command(root, tmp_path / "whole", **changes))
    assert code == 0, output + errors
    moment = random.uniform(0, 8)
    print(f"killed {moment:.2f} steps after the start")
    killed = tmp_path / "killed"
    code, output, errors = run(command(root, killed, script=ENDED, **changes), KILL_AFTER_STEPS=str(moment))
    assert code == -signal.SIGKILL, output + errors
    code, output, errors = run(command(root, killed, **changes))
    assert code == 0, output + errors
    assert_continues(read_series(killed), read_series(tmp_path / "whole"), exactly=True)


@pytest.mark.parametrize(
    ("model", "changes", "parts"),
    [
        ("hf", {}, ["model.peft.quantize_base=nf4", "32 of a linear layer", "Use int8"]),
        ("narrow", {"model__tensor_model_parallel_size": 2}, ["64 of a linear layer on 2 ranks", "fewer ranks"]),
        ("wide", {"model__kto__reference__checkpoint": "tied"}, ["is another model", "mode=cached"]),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], model: str, changes: dict[str, Any], parts: list[str]
) -> None:
    if "model__kto__reference__checkpoint" in changes:
        other = make_model_folder(tmp_path / "other", kind="wide", seed=9)
        changes = {"model__kto__reference__checkpoint": str(other)}
    folder = root / model
    if model == "narrow":
        folder = make_model_folder(tmp_path / "narrow", kind="wide", hidden_size=64)
    values = settings(root, tmp_path / "log", **{**PLAIN_LORA, **KINDS["nf4"], **changes})
    values["pretrained_checkpoint.restore_from_path"] = str(folder)
    world_size = changes.get("model__tensor_model_parallel_size", 1)
    kind, message = run_ranks(refusal_on_rank, world_size, free_port(), values)[0]
    assert kind == "ConfigError" and all(part in message for part in parts), message
