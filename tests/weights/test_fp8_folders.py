"""Folders with matrices in eight bits: what is read and exported are the numbers that transformers makes of them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from megatron.core import parallel_state
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

from nemo_kto.errors import KTOError
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.import_hf import check_weights, import_hf
from tests.network import tiny_hf
from tests.weights.quantised import convert

LARGEST = 448.0  # of what eight bits with four of exponent hold
BLOCKS: dict[str, tuple[int, int] | None] = {
    "ministral3": None,  # as Ministral 3: one scale for each matrix, and one for what goes in
    "minimax_m2": (8, 16),
    "deepseek_v3": (8, 8),
    "phi3": (16, 8),
    "qwen3": (8, 8),
    "mistral": (8, 16),
    "olmo2": (1, 16),
}
POWERS = {"qwen3": torch.float32, "mistral": torch.float8_e8m0fnu, "olmo2": torch.uint8}
"""Those whose scales are powers of two -> how they are stored: as DeepSeek-V3.1, as such, or their exponents."""
LAYOUTS: dict[str, tuple[str, ...]] = {
    "TP1": tuple(BLOCKS),
    "TP2": tuple(BLOCKS),
    "EP2": ("minimax_m2", "deepseek_v3"),
}
CASES = [(layout, name) for layout, names in LAYOUTS.items() for name in names]


def quantised(name: str) -> bool:
    return "_proj" in name or ".experts." in name


def in_eight_bits(
    matrix: torch.Tensor, block: tuple[int, int] | None, powers: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in eight bits and its scales, a tile at a time; tiles at the edges may be smaller."""
    if block is None:
        scale = (matrix.abs().max() / LARGEST).bfloat16()
        return (matrix / scale.float()).to(torch.float8_e4m3fn), scale
    (high, wide), (rows, columns) = block, matrix.shape
    scales = torch.zeros(-(-rows // high), -(-columns // wide))
    stored = torch.zeros(rows, columns)
    for i, j in torch.cartesian_prod(*(torch.arange(size) for size in scales.shape)).tolist():
        tile = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
        scales[i, j] = matrix[tile].abs().max() / LARGEST
        if powers is not None:
            scales[i, j] = 2.0 ** math.ceil(math.log2(scales[i, j]))
        stored[tile] = matrix[tile] / scales[i, j]
    if powers is not None:
        scales = (scales.log2() + 127).to(powers) if powers == torch.uint8 else scales.to(powers)
    return stored.to(torch.float8_e4m3fn), scales


def make_folder(folder: Path, name: str, block: tuple[int, int] | None, **fields: Any) -> Path:
    """Save a model as it is published in eight bits; `fields` change its quantization_config."""
    tiny_hf.make_folder(folder, AutoConfig.for_model(**tiny_hf.families()[name].to_dict()), dtype=torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if not quantised(key):
            tensors[key] = tensor
            continue
        tensors[key], tensors[f"{key}_scale_inv"] = in_eight_bits(tensor.float(), block, POWERS.get(name))
        if block is None:
            tensors[key.replace(".weight", ".activation_scale")] = torch.tensor(0.25)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    keys = json.loads((folder / "config.json").read_text())
    keys["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "static" if block is None else "dynamic",
        "weight_block_size": block,
        "modules_to_not_convert": ["lm_head", "gate"],
        **({"scale_fmt": "ue8m0"} if name in POWERS else {}),
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(keys, indent=1))
    return folder


def dequantised(folder: Path) -> Any:
    """Return transformers' model with plain numbers, in float32."""
    keys = json.loads((folder / "config.json").read_text())["quantization_config"]
    if keys["weight_block_size"] is None and Version(transformers.__version__) < Version("5.9"):
        pytest.skip("transformers 5.8 cannot read a matrix with one scale")
    config = FineGrainedFP8Config(**keys, dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the folders."""
    root = tmp_path_factory.mktemp("fp8")
    for name, block in BLOCKS.items():
        make_folder(root / name, name, block)
    return root


@pytest.fixture(scope="module")
def results(source: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[list[str]]]) -> Path:
    """Return the folder of what each layout made of them."""
    root = tmp_path_factory.mktemp("results")
    (said,) = run_ranks(convert, 1, source, root, {"TP1": LAYOUTS["TP1"]})
    run_ranks(convert, 2, source, root, {name: LAYOUTS[name] for name in LAYOUTS if name != "TP1"})
    assert sorted(text for text in said if "eight bits" in text) == sorted(
        f"{source / name} holds matrices in eight bits: they are trained, and exported, as the plain numbers "
        "they stand for."
        for name in BLOCKS
    )
    return root


@torch.no_grad()
@pytest.mark.parametrize(("layout", "name"), CASES)
def test_logits_are_those_of_transformers_numbers(source: Path, results: Path, layout: str, name: str) -> None:
    model = dequantised(source / name).float()
    expected = torch.cat([model(document[None]).logits[0] for document in tiny_hf.documents()])
    torch.testing.assert_close(torch.load(results / layout / f"{name}.pt"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_exported_numbers_are_transformers(
    source: Path, results: Path, tmp_path: Path, layout: str, name: str
) -> None:
    """Bit for bit, under the names of the source, without anything that computing in eight bits needs."""
    given, back = (tiny_hf.stored_tensors(root / name) for root in (source, results / layout))
    assert back.keys() == {key for key in given if "_scale" not in key}
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    # not read in bfloat16: transformers 5.8 would round the scales first
    theirs = {key: tensor.bfloat16() for key, tensor in dequantised(source / name).state_dict().items()}
    loaded = AutoModelForCausalLM.from_pretrained(results / layout / name, dtype="auto").state_dict()
    assert loaded.keys() == theirs.keys()
    assert all(torch.equal(loaded[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_exported_configuration_says_what_is_there(source: Path, results: Path, name: str) -> None:
    before, after = (json.loads((root / name / "config.json").read_text()) for root in (source, results / "TP1"))
    del before["quantization_config"]
    assert after == before and after["dtype"] == "bfloat16"
    _, info = AutoModelForCausalLM.from_pretrained(results / "TP1" / name, output_loading_info=True)
    assert not any(info.values()), info


def read_ragged(folder: Path) -> None:
    """Compare a matrix whose last tiles are smaller, on each of two tensor-parallel ranks, with its tiles by hand."""
    enable_cpu()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    layout = Layout(world_size=2, tensor=2)
    parallel.initialize(layout, seed=1)
    model = build_gpt(load_hf_config(folder), layout)
    import_hf(model, folder)
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    scales = tensors[f"{key}_scale_inv"]
    assert scales.shape == (5, 3)  # of 32 rows and 48 columns
    matrix = torch.stack(
        [torch.stack([tensors[key][i, j].float() * scales[i // 7, j // 20] for j in range(48)]) for i in range(32)]
    )
    mine = matrix.chunk(2, dim=1)[torch.distributed.get_rank()]
    assert torch.equal(model.decoder.layers[1].mlp.linear_fc2.weight, mine)


def test_tiles_at_the_edges_may_be_smaller(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    """As DeepSeek-V3's own code has it; transformers divides into equal tiles, or refuses."""
    run_ranks(read_ragged, 2, make_folder(tmp_path / "llama", "llama", (7, 20)))


MATRIX = "model.layers.0.mlp.up_proj.weight"


def without_scales(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{MATRIX}_scale_inv"]


def other_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MATRIX}_scale_inv"] = torch.ones(2, 2)


def exponents(tensors: dict[str, torch.Tensor]) -> None:
    scales = tensors[f"{MATRIX}_scale_inv"]
    tensors[f"{MATRIX}_scale_inv"] = torch.ones(scales.shape, dtype=torch.uint8)


def lone_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight_scale_inv"] = torch.ones(1)


@pytest.mark.parametrize(
    ("fields", "change", "wanted"),
    [
        ({"scale_fmt": "ue4m3"}, None, ["config.json", "quantization_config.scale_fmt=ue4m3", "float and ue8m0"]),
        ({"expert_dtype": "fp4"}, None, ["config.json", "quantization_config.expert_dtype=fp4"]),
        ({"quant_method": "gptq"}, None, ["config.json", "'gptq'", "only the quant_methods bitsandbytes, "]),
        ({"weight_block_size": [128]}, None, ["config.json", "'weight_block_size': [128]"]),
        ({"weight_block_size": [0, 128]}, None, ["config.json", "'weight_block_size': [0, 128]"]),
        ({"weight_block_size": [128, 128]}, None, [MATRIX[:14], "weight_block_size=[128, 128]"]),
        ({}, without_scales, [f"lacks {MATRIX}_scale_inv"]),
        ({}, other_scales, [MATRIX, "[48, 32]", "[2, 2]"]),
        ({}, exponents, [f"{MATRIX}_scale_inv is stored as U8", "scale_fmt is not ue8m0"]),
        ({}, lone_scales, ["no place for", "model.norm.weight_scale_inv"]),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, fields: dict[str, Any], change: Callable[..., None] | None, wanted: list[str]
) -> None:
    folder = make_folder(tmp_path / "llama", "llama", (8, 16), **fields)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(KTOError) as caught:
        check_weights(folder, load_hf_config(folder))
    assert all(part in str(caught.value) for part in [str(folder), *wanted]), str(caught.value)


def test_eight_bits_that_the_configuration_does_not_mention_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "quantised", "llama", (8, 16))
    plain = tiny_hf.make_folder(tmp_path / "plain", AutoConfig.for_model(**tiny_hf.families()["llama"].to_dict()))
    shutil.copyfile(plain / "config.json", folder / "config.json")
    with pytest.raises(KTOError, match="scale_inv"):
        check_weights(folder, load_hf_config(folder))
