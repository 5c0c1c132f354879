"""Folders of torchao: what is read are the numbers that torchao's tensors stand for.

It is not installed for the tests (see `torchao/make.py`): where it is, these run as well. `test_torchao_files.py` has
what it once made.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TorchAoConfig

from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.stored import SafetensorsFolder
from nemo_kto.weights.import_hf import check_weights
from tests.weights import quantised
from tests.weights.quantised import Tensors

torchao = pytest.importorskip("torchao.quantization")
safetensors_support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")

KINDS: dict[str, tuple[Any, str]] = {
    "int8": (torchao.Int8WeightOnlyConfig(), "eight"),
    "int8, groups": (torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(16)), "eight"),
    "int8, whole": (torchao.Int8WeightOnlyConfig(granularity=torchao.PerTensor()), "eight"),
    "float8": (torchao.Float8WeightOnlyConfig(), "eight"),
    "float8, whole": (torchao.Float8WeightOnlyConfig(granularity=torchao.PerTensor()), "eight"),
    "four bits in eight": (
        torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16)),
        "four",
    ),
    "three bits in eight, zero points": (
        torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int3,
            granularity=torchao.PerAxis(0),
            mapping_type=torchao.MappingType.ASYMMETRIC,
        ),
        "three",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the folders, saved as transformers does; it cannot make all of these kinds itself."""
    root = tmp_path_factory.mktemp("torchao")
    for kind, (config, _) in KINDS.items():
        plain = quantised.plain_folder(root / "plain" / kind, "llama")
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
        torchao.quantize_(model.model, config)
        shutil.copytree(plain, root / kind)
        save_flat(root / kind, {name: value.detach() for name, value in model.state_dict().items()})
    return root


def save_flat(folder: Path, tensors: Tensors) -> None:
    """Save a folder's tensors, torchao's included, as `TorchAoHfQuantizer` does."""
    flat, metadata = safetensors_support.flatten_tensor_state_dict(tensors)
    save_file(
        {key: value.contiguous() for key, value in flat.items()},
        folder / "model.safetensors",
        metadata={**metadata, "format": "pt"},
    )
    quantised.rewrite(folder, lambda tensors: None, {"quant_method": "torchao", "quant_type": {"default": {}}})


def theirs(folder: Path) -> Tensors:
    """Return the tensors that torchao makes of a folder."""
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        metadata = {key: value for key, value in opened.metadata().items() if key != "format"}
    found, rest = safetensors_support.unflatten_tensor_state_dict(load_file(folder / "model.safetensors"), metadata)
    assert not rest
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_torchao(folders: Path, kind: str) -> None:
    check_weights(folders / kind, load_hf_config(folders / kind))
    read, wanted = quantised.as_read(folders / kind), theirs(folders / kind)
    assert read.keys() == wanted.keys()
    with SafetensorsFolder(folders / kind) as stored:
        assert len(stored.quantised) == 28 and stored.bits == f"{KINDS[kind][1]} bits"
        for name in stored.quantised:
            assert torch.equal(read[name].bfloat16(), wanted[name].dequantize()), name
            if not kind.startswith(("four", "three")):  # those have a dtype of their own
                assert torch.equal(read[name], wanted[name].dequantize(torch.float32)), name
        assert all(torch.equal(read[name], wanted[name]) for name in read.keys() - stored.quantised)


@pytest.mark.parametrize("kind", KINDS)
def test_any_block_is_read_alone(folders: Path, kind: str) -> None:
    quantised.assert_blocks_are_parts_of_the_whole(folders / kind, quantised.as_read(folders / kind))


def test_a_folder_that_transformers_saves(tmp_path: Path) -> None:
    plain = quantised.plain_folder(tmp_path / "plain", "qwen3")
    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=settings)
    model.save_pretrained(tmp_path / "model")
    check_weights(tmp_path / "model", load_hf_config(tmp_path / "model"))
    read = quantised.as_read(tmp_path / "model")
    for name, wanted in model.state_dict().items():
        plain_numbers = wanted.dequantize() if hasattr(wanted, "qdata") else wanted
        assert name == "lm_head.weight" or torch.equal(read[name].bfloat16(), plain_numbers), name


def test_four_bits_in_pairs(tmp_path: Path) -> None:
    """By hand, as MSLK quantises for `Int4Tensor`: `number * scale + zero_point`; a CPU cannot make one."""
    folder = quantised.plain_folder(tmp_path / "model", "llama")
    numbers = torch.tensor([[-8, 7, 0, 1], [3, -1, -2, 5]], dtype=torch.int8)
    pairs = (numbers[:, ::2] & 15) | (numbers[:, 1::2] << 4)
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]]).bfloat16()  # of groups 0 and 1, for outputs 0 and 1
    zero = torch.tensor([[1.0, 0.0], [-2.0, 0.5]]).bfloat16()
    tensor = torchao.Int4Tensor(pairs, scale, zero, [1, 2], torch.Size((2, 4)))
    save_flat(folder, {"a.weight": tensor})
    wanted = torch.tensor([[-8 * 0.5 + 1, 7 * 0.5 + 1, 0 - 2, 1.0 - 2], [6.0, -2.0, -2 * 0.25 + 0.5, 5 * 0.25 + 0.5]])
    read = quantised.as_read(folder)
    assert torch.equal(read["a.weight"], wanted)
    quantised.assert_blocks_are_parts_of_the_whole(folder, read)


MATRIX = "model.layers.0.self_attn.k_proj.weight"
STORED = "model.layers.0.self_attn.k_proj._weight_"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (quantised.put(f"{STORED}qdata", None), [f"lacks {STORED}qdata", MATRIX]),
        (quantised.put(f"{STORED}scale", None), [f"lacks {STORED}scale"]),
        (quantised.put(f"{STORED}scale", torch.ones(3)), [MATRIX, "[3]", "[1, 32]"]),
        (quantised.put(f"{STORED}zero_point", torch.ones(3, dtype=torch.int8)), [MATRIX, "[3]"]),
        (quantised.put(f"{STORED}qdata", torch.ones(16, 32)), [f"{STORED}qdata", "F32"]),
        (quantised.put(f"{STORED}qdata", torch.ones(2, 16, 32, dtype=torch.int8)), [MATRIX, "[2, 16, 32]"]),
        (quantised.put(f"{STORED}act_pre_scale", torch.ones(32)), [MATRIX, "act_pre_scale"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, folders: Path, change: Any, wanted: list[str]) -> None:
    folder = Path(shutil.copytree(folders / "int8", tmp_path / "model"))
    quantised.assert_refused(quantised.rewrite(folder, change), wanted)


def described(kind: str, **fields: Any) -> str:
    return json.dumps({"_type": kind, "_data": {"block_size": [1, 32], **fields}})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", ["no JSON"]),
        ("[" * 100_000, ["no JSON"]),
        ("[1]", ["no JSON"]),
        ("{}", ["no JSON"]),
        (json.dumps({"_type": "Int8Tensor", "_data": None}), ["Int8Tensor"]),
        (json.dumps({"_type": ["Int8Tensor"], "_data": {}}), ["Int8Tensor"]),
        (described("Int4TilePackedTo4dTensor"), ["Int4TilePackedTo4dTensor", "Int8Tensor"]),
        (described("posix.system"), ["posix.system"]),
        (described("Int8Tensor", block_size=[1, 0]), ["block_size [1, 0]"]),
        (described("Int8Tensor", block_size=[-1, 32]), ["block_size [-1, 32]"]),
        (described("Int8Tensor", block_size=[1, 5]), ["block_size [1, 5]"]),
        (described("Int8Tensor", block_size="all"), ["block_size all"]),
    ],
)
def test_descriptions_that_cannot_be_understood_are_named(
    tmp_path: Path, folders: Path, text: str, wanted: list[str]
) -> None:
    folder = Path(shutil.copytree(folders / "int8", tmp_path / "model"))
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata={**metadata, MATRIX: text})
    quantised.assert_refused(folder, [MATRIX, *wanted])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_spoilt_is_named(tmp_path: Path, folders: Path, kind: str) -> None:
    module = MATRIX.removesuffix(".weight")
    quantised.assert_what_is_spoilt_is_named_or_read(folders / kind, tmp_path / "model", module)
