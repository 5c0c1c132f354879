"""Folders in FP8 and NVFP4 of FBGEMM, AutoFP8 and NVIDIA's Model Optimizer: what is read is worked out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.stored import SafetensorsFolder
from nemo_kto.weights.import_hf import check_weights
from tests.weights import quantised
from tests.weights.quantised import Tensors

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
MODULE = "model.layers.0.self_attn.k_proj"
FOUR_BITS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
"""E2M1 (OCP Microscaling Formats 1.0, table 11), by its bits."""
KINDS = {
    "fbgemm": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    "autofp8": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
    "modelopt nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    "modelopt mixed": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
}


def eight_bits(weight: torch.Tensor, *, rows: bool) -> tuple[Tensors, torch.Tensor]:
    """Return a matrix in FP8 and what it stands for."""
    scale = (weight.float().abs().amax(1, keepdim=True) if rows else weight.float().abs().max()) / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def four_bits(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Return bytes and scales of NVFP4 of a matrix' shape, and what they stand for, number by number."""
    generator = torch.Generator().manual_seed(weight.numel())
    rows, columns = weight.shape
    stored = torch.randint(256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, columns // 16, generator=generator) * 400).to(torch.float8_e4m3fn)
    of_scales = torch.tensor(0.00037)
    plain = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            byte = int(stored[row, column // 2])
            number = FOUR_BITS[byte % 16 if column % 2 == 0 else byte // 16]
            plain[row, column] = number * (scale[row, column // 16].float() * of_scales)
    return {"weight": stored, "weight_scale": scale, "weight_scale_2": of_scales}, plain


def make_folder(folder: Path, kind: str) -> Tensors:
    """Save a folder of a kind; return what its matrices in fewer bits stand for."""
    quantised.plain_folder(folder, "llama", num_hidden_layers=2, **SIZES)
    wanted: Tensors = {}

    def change(tensors: Tensors) -> None:
        for key in [key for key in tensors if quantised.is_linear(key)]:
            weight = tensors.pop(key)
            in_four = "nvfp4" in kind or ("mixed" in kind and "mlp" in key)
            made, wanted[key] = four_bits(weight) if in_four else eight_bits(weight, rows=kind == "fbgemm")
            module = key.removesuffix(".weight")
            tensors |= {f"{module}.{own}": value.contiguous() for own, value in made.items()}
            tensors[f"{module}.{'input_scale_ub' if kind == 'fbgemm' else 'input_scale'}"] = torch.ones(())
        tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(())

    quantised.rewrite(folder, change, KINDS[kind])
    return wanted


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_by_hand(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    wanted = make_folder(folder, kind)
    check_weights(folder, load_hf_config(folder))
    read = quantised.as_read(folder)
    assert all(torch.equal(read[name], plain) for name, plain in wanted.items())
    quantised.assert_blocks_are_parts_of_the_whole(folder, read)
    with SafetensorsFolder(folder) as stored:
        assert stored.quantised == wanted.keys()
        assert len(stored.left_out) == len(wanted) + 1
        bits = {"modelopt nvfp4": "four bits", "modelopt mixed": "four and eight bits"}
        assert stored.bits == bits.get(kind, "eight bits")


def test_older_folders_say_it_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    wanted = make_folder(folder, "modelopt nvfp4")
    keys = json.loads((folder / "config.json").read_text())
    del keys["quantization_config"]
    (folder / "config.json").write_text(json.dumps(keys))
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    check_weights(folder, load_hf_config(folder))
    read = quantised.as_read(folder)
    assert all(torch.equal(read[name], plain) for name, plain in wanted.items())
    for text, wanted_words in (
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"quantization": {"quant_algo": "W4A8_AWQ"}}', "W4A8_AWQ"),
    ):
        (folder / "hf_quant_config.json").write_text(text)
        quantised.assert_refused(folder, ["hf_quant_config.json", wanted_words])


@pytest.mark.parametrize(
    ("kind", "change", "wanted"),
    [
        ("fbgemm", quantised.put(f"{MODULE}.weight_scale", None), [f"lacks {MODULE}.weight_scale"]),
        (
            "fbgemm",
            quantised.put(f"{MODULE}.weight_scale", torch.ones(31, 1)),
            [f"{MODULE}.weight", "[32, 64]", "[31, 1]"],
        ),
        (
            "fbgemm",
            quantised.put(f"{MODULE}.weight", torch.ones(2, 32, 64).to(torch.float8_e4m3fn)),
            [f"{MODULE}.weight", "[2, 32, 64]"],
        ),
        ("autofp8", quantised.put(f"{MODULE}.weight_scale", torch.ones(2, 2)), [f"{MODULE}.weight", "[2, 2]"]),
        (
            "modelopt",
            quantised.put(f"{MODULE}.weight_scale", torch.ones(1, dtype=torch.int64)),
            [f"{MODULE}.weight_scale", "I64"],
        ),
        ("modelopt nvfp4", quantised.put(f"{MODULE}.weight_scale", None), [f"lacks {MODULE}.weight_scale"]),
        ("modelopt nvfp4", quantised.put(f"{MODULE}.weight_scale_2", None), [f"lacks {MODULE}.weight_scale_2"]),
        (
            "modelopt nvfp4",
            quantised.put(f"{MODULE}.weight_scale_2", torch.ones(4)),
            [f"{MODULE}.weight_scale_2", "[4]"],
        ),
        (
            "modelopt nvfp4",
            quantised.put(f"{MODULE}.weight", torch.ones(32, 31, dtype=torch.uint8)),
            [f"{MODULE}.weight_scale", "32 x 62"],
        ),
        (
            "modelopt nvfp4",
            quantised.put(f"{MODULE}.weight", torch.ones(32, dtype=torch.uint8)),
            [f"{MODULE}.weight", "[32]"],
        ),
        (
            "modelopt nvfp4",
            quantised.put(f"{MODULE}.pre_quant_scale", torch.ones(64)),
            [f"{MODULE}.pre_quant_scale", "goes into"],
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, kind: str, change: Any, wanted: list[str]) -> None:
    make_folder(tmp_path / "model", kind)
    quantised.assert_refused(quantised.rewrite(tmp_path / "model", change), wanted)


METHODS = (
    *("gptq", "awq", "aqlm", "vptq", "quanto", "eetq", "higgs", "hqq", "bitnet", "spqr", "quark", "fp_quant"),
    *("auto-round", "nvfp4", "mxfp8", "metal", "fouroversix", "sinq", "quip", "a method of tomorrow"),
)


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_by_name(tmp_path: Path, method: str) -> None:
    folder = quantised.plain_folder(tmp_path / "model", "llama", num_hidden_layers=2)
    quantised.rewrite(folder, lambda tensors: None, {"quant_method": method, "bits": 4})
    quantised.assert_refused(folder, ["config.json", repr(method), "bitsandbytes, ", "unquantised folder"])


def test_early_folders_of_bitsandbytes_do_not_name_it(tmp_path: Path) -> None:
    folder = quantised.plain_folder(tmp_path / "model", "llama", num_hidden_layers=2)
    shutil.copytree(folder, tmp_path / "other")
    quantised.rewrite(folder, lambda tensors: None, {"load_in_8bit": True, "llm_int8_threshold": 6.0})
    check_weights(folder, load_hf_config(folder))
    quantised.rewrite(tmp_path / "other", lambda tensors: None, {"bits": 8})
    quantised.assert_refused(tmp_path / "other", ["{'bits': 8}"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_spoilt_is_named(tmp_path: Path, kind: str) -> None:
    make_folder(tmp_path / "whole", kind)
    quantised.assert_what_is_spoilt_is_named_or_read(tmp_path / "whole", tmp_path / "model", MODULE)
