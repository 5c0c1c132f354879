"""Weights in fewer bits, read from folders of every kind: bitsandbytes' numbers, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.quantised_weight import QuantisedWeight
from nemo_kto.network.sharded import sharded_leaves
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights import import_hf as importing
from nemo_kto.weights.import_hf import import_hf
from tests.integration.assets import KINDS, make_model_folder
from tests.integration.test_quantised_base import through

ONE = Layout(world_size=1)
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
SEQUENCE = Layout(world_size=2, tensor=2, sequence=True, expert_tensor=1)


def blocks_on_rank(folder: str, layout: Layout, kind: str | None) -> dict[tuple[str, str], torch.Tensor]:
    """Return this rank's blocks of linear layers' weights, by key and place, as plain numbers."""
    enable_cpu()
    parallel.initialize(layout, seed=0)
    model = build_gpt(load_hf_config(folder), layout, unfused=True, quantised=kind)
    import_hf(model, folder)
    found = {}
    for leaf in sharded_leaves(model):
        if isinstance(leaf.data, QuantisedWeight):
            found[leaf.key, str(leaf.region)] = leaf.data.plain()
        elif kind is None and leaf.data.dim() == 2:
            found[leaf.key, str(leaf.region)] = leaf.data.detach().clone()
    parallel.destroy()
    return found


def read(run_ranks: Callable[..., Any], folder: Path, layout: Layout, kind: str | None) -> list[Any]:
    found: list[Any] = run_ranks(blocks_on_rank, layout.world_size, str(folder), layout, kind)
    return found


@pytest.mark.parametrize("family", KINDS)
def test_every_familys_linear_layers_are_what_bitsandbytes_makes_of_them(
    tmp_path: Path, run_ranks: Callable[..., Any], family: str
) -> None:
    """Also where experts are together, transposed, or gate and up take turns; nothing else is in fewer bits."""
    folder = make_model_folder(tmp_path / "hf", kind=family)
    (ours,), (plain,) = (read(run_ranks, folder, ONE, kind) for kind in ("int8", None))
    left = {key for key, _ in plain.keys() - ours.keys()}
    allowed = ("word_embeddings", "output_layer", "router", "gate_weight", "conv1d", "expert_bias")
    assert ours and all(any(name in key for name in allowed) for key in left), left
    for key, block in ours.items():
        assert torch.equal(block, through("int8", plain[key])), key


@pytest.mark.parametrize("kind", ["nf4", "nf4_double", "int8"])
@pytest.mark.parametrize("family", ["wide", "wide_experts"])
def test_parts_of_ranks_are_parts_of_the_whole(
    tmp_path: Path, run_ranks: Callable[..., Any], family: str, kind: str
) -> None:
    folder = make_model_folder(tmp_path / "hf", kind=family)
    (whole,) = read(run_ranks, folder, ONE, kind)
    full = {key: block for (key, _), block in whole.items()}
    parts = read(run_ranks, folder, SEQUENCE, kind)
    assert {key for part in parts for key, _ in part} == full.keys()
    for part in parts:
        for (key, region), block in part.items():
            assert torch.equal(block, full[key][eval(region)]), key


def test_two_matrices_in_one_tensor_share_scales_of_scales_as_with_bitsandbytes(
    tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    """Phi-3 has gate and up in one matrix; the mean of its scales is of both."""
    folder = make_model_folder(
        tmp_path / "hf", kind="fused", hidden_size=128, intermediate_size=320, rope_parameters=ROPE
    )
    name = "model.layers.0.mlp.gate_up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name]
    weight[:320] *= 4
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: weight}, folder / "model.safetensors", metadata={"format": "pt"})
    (ours,) = read(run_ranks, folder, ONE, "nf4_double")
    joined = torch.cat(
        [block for (key, _), block in ours.items() if key.startswith("decoder.layers.0.mlp.linear_fc1")]
    )
    torch.testing.assert_close(joined, through("nf4_double", weight), rtol=1e-6, atol=0)


def test_a_number_that_float16_cannot_hold_is_named(tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    folder = make_model_folder(tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"layers\.1\.mlp\.up_proj\.weight holds numbers that int8.*quantize_base=nf4"):
        read(run_ranks, folder, ONE, "int8")


BITS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize(
    ("stored", "kept"), [("nf4", "nf4"), ("nf4_double", "nf4_double"), ("nf4_double", "nf4"), ("int8", "int8")]
)
def test_what_bitsandbytes_has_stored_is_kept_to_the_bit(
    tmp_path: Path, run_ranks: Callable[..., Any], stored: str, kept: str
) -> None:
    """Numbers, scales, and scales of scales, also of rows that two ranks share."""
    plain = make_model_folder(tmp_path / "hf", kind="wide")
    settings = BitsAndBytesConfig(**BITS[stored])
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, quantization_config=settings)
    folder = tmp_path / "quantised"
    model.save_pretrained(folder)
    for layout in (ONE, SEQUENCE):
        ours, theirs = (read(run_ranks, folder, layout, kind) for kind in (kept, None))
        for mine, numbers in zip(ours, theirs, strict=True):
            assert len(mine) == 20 and all(torch.equal(mine[key], numbers[key]) for key in mine)


def messages_on_rank(folder: str, kind: str | None) -> list[str]:
    """Return what is said of a folder."""
    found: list[str] = []
    importing._warn_once.cache_clear()
    with mock.patch.object(importing.logger, "warning", lambda message, *values: found.append(message % values)):
        blocks_on_rank(folder, ONE, kind)
    return found


def test_what_becomes_of_a_folder_in_fewer_bits_is_said(tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    plain = make_model_folder(tmp_path / "hf", kind="wide")
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=BitsAndBytesConfig(**BITS["nf4"]))
    model.save_pretrained(tmp_path / "four")
    for kind, said in (
        ("nf4_double", "they are kept so"),
        ("int8", "the plain numbers they stand for are quantised again"),
        (None, "they are trained, and exported, as the plain numbers they stand for"),
    ):
        (messages,) = run_ranks(messages_on_rank, 1, str(tmp_path / "four"), kind)
        assert messages == [f"{tmp_path / 'four'} holds matrices in four bits: {said}."]
