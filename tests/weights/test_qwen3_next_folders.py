"""Folders of Qwen3-Next and Qwen3.5 as published: tensors that guess several tokens at once are left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_kto.network.families import sizes_of_folder
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.export_hf import export_hf
from nemo_kto.weights.import_hf import import_hf
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
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nemo_kto").addHandler(handler)
    enable_cpu()
    parallel.initialize(Layout(world_size=1), seed=1)
    hf_config = load_hf_config(source)
    model = build_gpt(hf_config, Layout(world_size=1))
    import_hf(model, source)
    export_hf([model], hf_config, target, source_folder=source)
    torch.save(tiny_hf.packed_logits(model), target / "logits.pt")
    logging.getLogger("nemo_kto").removeHandler(handler)
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


def test_what_a_layout_divides_is_known_before_transformers_reads_the_folder(tmp_path: Path) -> None:
    sizes = sizes_of_folder(published(tmp_path / "source", "qwen3_5_text"))
    assert sizes is not None and (sizes.linear_key_heads, sizes.ffn_hidden_size) == (2, 48)
