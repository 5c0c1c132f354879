"""A run with adapters: what its checkpoints hold, what it exports, and where the next run can start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_kto.runtime.checkpoint_manifest import write_manifest
from tests.distributed_harness import free_port
from tests.integration.assets import make_model_folder, read_series, refusal_on_rank, settings, write_feedback
from tests.integration.test_matrix import ADAPTERS

PREFIX = "model__peft__lora_tuning__"
LORA: dict[str, Any] = {
    "model__peft__peft_scheme": "lora",
    f"{PREFIX}target_modules": ["attention_qkv", "mlp_fc2"],
    f"{PREFIX}adapter_dim": 4,
    f"{PREFIX}alpha": 8,
    f"{PREFIX}rank_pattern": {"layers.1.mlp.down_proj": 2, "k_proj": 7},
    f"{PREFIX}alpha_pattern": {"model.layers.3.*": 3},
    "model__optim__lr": 1e-2,
    "trainer__kto__max_steps": 3,
    "export__enabled": True,
}
DORA = {f"{PREFIX}dora": True, f"{PREFIX}modules_to_save": ["embed_tokens", "lm_head"]}
TOKENS = torch.tensor([[3, 7, 9, 2, 11, 5, 5, 0]])


@pytest.fixture(scope="module")
def trained(train: Callable[..., Path]) -> Path:
    """Return the log folder of three steps on two pipeline stages, with checkpoints and export."""
    return train(2, **LORA, exp_manager__create_checkpoint_callback=True, model__pipeline_model_parallel_size=2)


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Path:
    (folder,) = (trained / "checkpoints").glob("*-last")
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    result: torch.Tensor = model.eval()(TOKENS).logits
    return result


def base(root: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float32)


def read_names(checkpoint: Path) -> list[str]:
    """Return the names of all tensors of a checkpoint; on a rank."""
    state = dist_checkpointing.load_plain_tensors(str(checkpoint))
    return [name for name, value in state.items() if torch.is_tensor(value)]


def export(checkpoint: Path, folder: Path, merge: bool) -> str:
    """Export a checkpoint as the command does; return the error, if any."""
    import torch.distributed as dist

    from nemo_kto.commands.export import export_checkpoint
    from nemo_kto.errors import KTOError

    dist.destroy_process_group()
    try:
        export_checkpoint(checkpoint, folder, merge=merge)
    except KTOError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def magnified(train: Callable[..., Path]) -> Path:
    """Return the log folder of three steps of DoRA on two tensor-parallel ranks; embedding and output layer whole."""
    tensor = {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True}
    return train(2, **LORA, **DORA, **tensor, exp_manager__create_checkpoint_callback=True)


def test_dora_is_exported_for_peft_merged_and_gone_on_from(
    root: Path, magnified: Path, tmp_path: Path, train: Callable[..., Path], run_ranks: Callable[..., Any]
) -> None:
    series = read_series(magnified)
    assert series["train/loss"][0] == 0.5
    adapted = logits(PeftModel.from_pretrained(base(root), magnified / "hf"))
    plain = load_file(magnified / "hf" / "adapter_model.safetensors")
    lengths = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): weight.norm(dim=1)
        for name, weight in base(root).named_parameters()
        if name.endswith("_proj.weight")
    }
    magnitudes = {name: tensor for name, tensor in plain.items() if name.endswith("lora_magnitude_vector")}
    assert len(magnitudes) == 4 * 4
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = plain[f"base_model.model.{name}"] - base(root).get_parameter(name)
        assert 1e-3 < moved.abs().max() < 0.05, name
    for name, tensor in magnitudes.items():
        moved = tensor - lengths[name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")]
        assert 1e-3 < moved.abs().max() < 0.05, name  # three steps of 1e-2 each at most
    (checkpoint,) = (magnified / "checkpoints").glob("*-last")
    for merge in (False, True):
        assert run_ranks(export, 1, checkpoint, tmp_path / f"{merge}", merge) == [""]
    ours = load_file(tmp_path / "False" / "adapter_model.safetensors")
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in ours)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "True", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)
    start = {f"{PREFIX}restore_from_path": str(magnified / "hf"), "trainer__kto__max_steps": 1}
    for reference in (None, str(magnified / "hf")):
        once = read_series(train(1, **{**LORA, **DORA, **start}, model__kto__reference__checkpoint=reference))
        assert (once["train/loss"][0] == 0.5) == (reference is not None)


def test_a_checkpoint_holds_adapters_and_their_optimizer_state_only(
    checkpoint: Path, run_ranks: Callable[..., Any]
) -> None:
    (names,) = run_ranks(read_names, 1, checkpoint)
    assert all(".adapters." in name for name in names)
    # 4 layers x 4 projections x A and B; each with two moments and a float32 copy
    assert len(names) == 4 * 4 * 2 * (1 + 3)


def test_the_exported_adapter_loads_into_peft_and_transformers(root: Path, trained: Path) -> None:
    adapted = logits(PeftModel.from_pretrained(base(root), trained / "hf"))
    assert (adapted - logits(base(root))).abs().max() > 0.01
    # a folder with an adapter is a model to transformers, tokenizer included
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(trained / "hf", dtype=torch.float32)), adapted)
    assert (trained / "hf" / "tokenizer.json").read_text() == (root / "hf" / "tokenizer.json").read_text()


def test_a_checkpoint_exports_the_same_adapter_and_the_merged_model(
    root: Path, trained: Path, checkpoint: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    for merge in (False, True):
        assert run_ranks(export, 1, checkpoint, tmp_path / f"{merge}", merge) == [""]
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "False", trained / "hf"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "True", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base(root), trained / "hf")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)


def test_a_run_can_export_the_merged_model_itself(root: Path, trained: Path, train: Callable[..., Path]) -> None:
    log_dir = train(2, **LORA, export__merge_adapters=True, model__tensor_model_parallel_size=2)
    merged = AutoModelForCausalLM.from_pretrained(log_dir / "hf", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base(root), trained / "hf")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-3, atol=1e-4)  # of another layout's run
    assert not (log_dir / "hf" / "adapter_config.json").exists()


def test_merging_needs_adapters_and_their_base(
    checkpoint: Path, tmp_path: Path, train: Callable[..., Path], run_ranks: Callable[..., Any]
) -> None:
    full = train(1, exp_manager__create_checkpoint_callback=True, trainer__kto__max_steps=1)
    (whole,) = (full / "checkpoints").glob("*-last")
    assert "no adapters that could be merged" in run_ranks(export, 1, whole, tmp_path / "x", True)[0]
    copy = with_base(checkpoint, tmp_path, "/moved")
    assert "/moved, is not there" in run_ranks(export, 1, copy, tmp_path / "x", True)[0]


def with_base(checkpoint: Path, folder: Path, base: str) -> Path:
    """Return a copy of a checkpoint whose adapters are said to belong to another model."""
    copy = Path(shutil.copytree(checkpoint, folder / checkpoint.name))
    config = copy / "hf" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    write_manifest(copy, {})
    return copy


def test_merging_into_another_model_is_refused(
    trained: Path, checkpoint: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    """Its shapes fit; only its weights are others."""
    other = make_model_folder(tmp_path / "other", seed=5)
    copy = with_base(checkpoint, tmp_path, str(other))
    assert "is not the one" in run_ranks(export, 1, copy, tmp_path / "x", True)[0]


@pytest.mark.parametrize("reference", ["base", "start"])
def test_going_on_from_an_exported_adapter(trained: Path, train: Callable[..., Path], reference: str) -> None:
    """A new run starts where the adapter stands: seen from the base model, or as its own reference."""
    start = {f"{PREFIX}restore_from_path": str(trained / "hf"), "trainer__kto__max_steps": 1, "export__enabled": False}
    if reference == "start":
        start["model__kto__reference__checkpoint"] = str(trained / "hf")
    series = read_series(train(1, **{**LORA, **start}))
    if reference == "start":
        assert series["train/loss"][0] == 0.5 and series["train/rewards/chosen"][0] == 0
    else:
        assert abs(series["train/rewards/margins"][0]) > 1e-3


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({f"{PREFIX}adapter_dim": 8, f"{PREFIX}restore_from_path": "adapter"}, ["lora_tuning.adapter_dim=4"]),
        (
            {f"{PREFIX}target_modules": ["mlp"], "pretrained_checkpoint__restore_from_path": "experts"},
            ["cannot have adapters", "'qwen3_moe'"],
        ),
        (
            {f"{PREFIX}rank_pattern": {"k_proj": 7}, f"{PREFIX}restore_from_path": "adapter"},
            ["Set model.peft.lora_tuning.rank_pattern={layers.1.mlp.down_proj: 2, k_proj: 7}."],
        ),
        (
            {**DORA, f"{PREFIX}restore_from_path": "adapter"},
            ["Set model.peft.lora_tuning.dora=false model.peft.lora_tuning.modules_to_save=null."],
        ),
        (
            {f"{PREFIX}modules_to_save": ["lm_head"], "pretrained_checkpoint__restore_from_path": "tied"},
            ["modules_to_save=[lm_head]", "is its embedding"],
        ),
        ({f"{PREFIX}modules_to_save": ["norm"]}, ["modules_to_save", "embed_tokens or lm_head, or a list of these"]),
        ({f"{PREFIX}rank_pattern": {"o_proj": 8}}, ["rank_pattern", "o_proj", "model.layers.0.self_attn.q_proj"]),
        ({f"{PREFIX}alpha_pattern": {"q_proj": 0}}, ["alpha_pattern has 0 for 'q_proj'", "above 0"]),
        ({f"{PREFIX}layer_selection": [0, 5]}, ["layer_selection=[0, 5]", "from 1 to 4"]),
        ({f"{PREFIX}target_modules": ["query"]}, ["query is unknown", "attention_qkv", "q_proj"]),
        ({f"{PREFIX}restore_from_path": "nowhere"}, ["nowhere", "adapter_config.json"]),
        (
            {"model__kto__reference__checkpoint": "adapter", "model__peft__peft_scheme": "none"},
            ["is an adapter", "model.peft.peft_scheme=lora"],
        ),
    ],
)
def test_what_cannot_be_is_refused(
    root: Path, trained: Path, tmp_path: Path, run_ranks: Callable[..., Any], changes: dict[str, Any], parts: list[str]
) -> None:
    places = {
        "adapter": str(trained / "hf"),
        "tied": str(root / "tied"),
        "experts": str(root / "experts"),
        "nowhere": str(tmp_path / "nowhere"),
    }
    changes = {key: places.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    values = settings(root, tmp_path / "log", **{**LORA, **changes})
    ((_, message),) = run_ranks(refusal_on_rank, 1, free_port(), values)
    for part in parts:
        assert part in message, message


def test_dropout_is_another_in_every_step(tmp_path: Path, train: Callable[..., Path]) -> None:
    """The same batch twice, with a learning rate of 0: only what is dropped can change the gradient."""
    file = write_feedback(tmp_path / "eight.jsonl", number=8, seed=3)
    norms = []
    for dropout in (0.0, 0.25):
        changes = {
            **ADAPTERS,
            "model__peft__lora_tuning__adapter_dropout": dropout,
            "model__optim__lr": 0,
            "model__optim__sched__min_lr": 0,
            "model__data__data_prefix__train": str(file),
            "model__data__shuffle": False,
            "trainer__kto__max_steps": 2,
        }
        norms.append(read_series(train(1, **changes))["train/grad_norm"])
    (first, second), (dropped_first, dropped_second) = ((norm[0], norm[1]) for norm in norms)
    assert first == second
    assert len({first, dropped_first, dropped_second}) == 3
