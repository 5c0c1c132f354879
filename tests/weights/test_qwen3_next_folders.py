"""Folders of Qwen3-Next and Qwen3.5 as published: tensors that guess several tokens at once are left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_kto.network.families import sizes_of_folder
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.export_hf import export_hf
from nemo_kto.weights.import_hf import import_hf
from tests.distributed_harness import heard
from tests.network import tiny_hf

COUNT = "mtp_num_hidden_layers"
GUESSES = {"mtp.fc.weight": (32, 64), "mtp.layers.0.self_attn.q_proj.weight": (128, 32), "mtp.norm.weight": (32,)}


def published(folder: Path, name: str) -> Path:
    """Save a model as these are published: in bfloat16 but for A_log, with further tensors, and layers by interval."""
    tiny_hf.make_folder(folder, tiny_hf.families()[name], dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for key in tensors:
        if key.endswith("A_log"):
            tensors[key] = tensors[key].float() + 1e-4
    tensors |= {key: torch.ones(shape, dtype=torch.bfloat16) for key, shape in GUESSES.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    keys = json.loads((folder / "config.json").read_text())
    if name == "qwen3_5_text":
        keys[COUNT] = 1
        del keys["layer_types"]  # as by default: the last of four is of the other kind
        keys["full_attention_interval"] = 4
    (folder / "config.json").write_text(json.dumps(keys, indent=1))
    return folder


def convert(source: Path, target: Path) -> list[str]:
    """Import and export the folder, and return what was said."""
    said = heard()
    enable_cpu()
    parallel.initialize(Layout(world_size=1), seed=1)
    hf_config = load_hf_config(source)
    model = build_gpt(hf_config, Layout(world_size=1))
    import_hf(model, source)
    export_hf([model], hf_config, target, source_folder=source)
    torch.save(tiny_hf.packed_logits(model), target / "logits.pt")
    return said


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text"])
def test_further_tensors_are_left_out_as_in_transformers(
    tmp_path: Path, run_ranks: Callable[..., list[list[str]]], name: str
) -> None:
    source, target = published(tmp_path / "source", name), tmp_path / "target"
    said = run_ranks(convert, 1, source, target)[0]
    expected = tiny_hf.transformers_logits(source)
    torch.testing.assert_close(torch.load(target / "logits.pt"), expected, rtol=0, atol=1e-5)
    given, back = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert back.keys() == given.keys() - GUESSES.keys()
    assert all(back[key].dtype == given[key].dtype and torch.equal(back[key], given[key]) for key in back)
    left_out = [text for text in said if "left out" in text]
    assert len(left_out) == 1
    assert f"{source}: the {len(GUESSES)} tensors whose names begin with mtp., which guess" in left_out[0]
    assert "what is exported has none" in left_out[0]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
    assert after == ({**before, COUNT: 0} if COUNT in before else before)


def own_logits(folder: Path) -> torch.Tensor | None:
    enable_cpu()
    parallel.initialize(Layout(world_size=1), seed=1)
    model = build_gpt(load_hf_config(folder), Layout(world_size=1))
    import_hf(model, folder)
    return tiny_hf.packed_logits(model)


@torch.no_grad()
def logits_in_float64(folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Return transformers' logits `[T, vocab]`, with all that it computes in float32 on purpose in float64 too."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    cast = torch.Tensor.to

    def wider(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return cast(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", wider)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return torch.cat([model(document[None]).logits[0] for document in tiny_hf.documents()])


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
def test_with_the_published_epsilon_rounding_is_no_worse_than_in_transformers(
    tmp_path: Path, run_ranks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It makes logits in float32 differ by 1e-5, and the other tests' models have a larger one: see `tiny_hf`."""
    config = tiny_hf.families()[name]
    config.rms_norm_eps = 1e-6
    folder = tiny_hf.make_folder(tmp_path, config)
    exact = logits_in_float64(folder, monkeypatch)
    ours, theirs = run_ranks(own_logits, 1, folder)[0], tiny_hf.transformers_logits(folder)
    distance, usual = ((logits - exact).abs().max().item() for logits in (ours, theirs))
    assert exact.dtype == torch.float64 and 0 < usual < 1e-4
    assert distance < 4 * usual  # two roundings of the same, of which either may be the luckier


def test_what_a_layout_divides_is_known_before_transformers_reads_the_folder(tmp_path: Path) -> None:
    sizes = sizes_of_folder(published(tmp_path / "source", "qwen3_5_text"))
    assert sizes is not None and (sizes.linear_key_heads, sizes.ffn_hidden_size) == (2, 48)
