"""Folders of bitsandbytes: what is read are the numbers that transformers and bitsandbytes make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nemo_kto.network.stored import SafetensorsFolder
from tests.weights import quantised
from tests.weights.quantised import Tensors

bitsandbytes = pytest.importorskip("bitsandbytes")
ops = pytest.importorskip("bitsandbytes.backends.default.ops")

SIZES = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
"""bitsandbytes' own CPU kernel goes wrong where a block of 64 numbers begins within a row."""
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("llama", NF4),
    "nf4, scales in eight bits": ("qwen3", {**NF4, "bnb_4bit_use_double_quant": True}),
    "nf4, stored in bfloat16": (
        "mistral",
        {**NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16},
    ),
    "fp4": ("olmo2", {"load_in_4bit": True}),
    "fp4, stored in float32": (
        "llama",
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.float32},
    ),
    "nf4, some modules plain": ("phi3", {**NF4, "llm_int8_skip_modules": ["lm_head", "o_proj"]}),
    "nf4, a mixture": ("qwen3_moe", {**NF4, "bnb_4bit_use_double_quant": True}),
    "int8": ("llama", {"load_in_8bit": True}),
    "int8, a mixture": ("mixtral", {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "gate", "q_proj"]}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the folders, saved by transformers."""
    root = tmp_path_factory.mktemp("bitsandbytes")
    for kind, (name, settings) in KINDS.items():
        plain = quantised.plain_folder(root / "plain" / kind, name, **SIZES)
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=BitsAndBytesConfig(**settings))
        model.save_pretrained(root / kind)
    return root


def theirs(folder: Path, dtype: torch.dtype) -> Tensors:
    """Return what transformers loads, matrices in fewer bits as bitsandbytes makes them plain in a dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = dtype
            found[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            plain = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            found[f"{name}.weight"] = plain.to(dtype)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_bitsandbytes(folders: Path, kind: str) -> None:
    read, plain, rounded = quantised.as_read(folders / kind), *(theirs(folders / kind, dtype) for dtype in DTYPES)
    with SafetensorsFolder(folders / kind) as stored:
        in_fewer_bits = set(stored.quantised)
        assert stored.bits == ("eight bits" if "int8" in kind else "four bits")
        assert {stored.dtype(name) for name in stored.names} == {"BF16"}
    assert len(in_fewer_bits) >= 4
    for name in in_fewer_bits:
        assert torch.equal(read[name], plain[name]), name
        assert torch.equal(read[name].bfloat16(), rounded[name]), name
    # what is not stored so is what it was, experts included, which transformers leaves as they are
    before = load_file(folders / "plain" / kind / "model.safetensors")
    assert read.keys() == before.keys()
    assert all(torch.equal(read[name], before[name]) for name in read.keys() - in_fewer_bits)


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_any_block_is_read_alone(folders: Path, kind: str) -> None:
    quantised.assert_blocks_are_parts_of_the_whole(folders / kind, quantised.as_read(folders / kind))


def one_matrix(folder: Path, shape: tuple[int, int], *, storage: torch.dtype = torch.uint8, **settings: Any) -> Any:
    """Save a folder with one matrix in four bits, and return what bitsandbytes makes of it in float32, and its codes.

    Its plain PyTorch makes it: the CPU kernel goes wrong where a block begins within a row.
    """
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes, state = bitsandbytes.functional.quantize_4bit(matrix, quant_storage=storage, **settings)
    folder.mkdir()
    described = {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file({"a.weight": codes, **described}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    scales = state.absmax
    if state.nested:
        scales = bitsandbytes.functional.dequantize_blockwise(scales, state.state2) + state.offset
    plain = ops._dequantize_4bit_compute.__wrapped__(
        codes.view(torch.uint8).flatten(), scales, state.code, state.blocksize, shape, torch.float32
    )
    return plain, codes


@pytest.mark.parametrize("shape", [(40, 96), (7, 33), (5, 512)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 128, 1024])
@pytest.mark.parametrize("nested", [True, False])
def test_blocks_of_other_sizes(tmp_path: Path, shape: tuple[int, int], kind: str, block: int, nested: bool) -> None:
    folder = tmp_path / "model"
    wanted, _ = one_matrix(folder, shape, blocksize=block, quant_type=kind, compress_statistics=nested)
    read = quantised.as_read(folder)
    assert torch.equal(read["a.weight"], wanted)
    quantised.assert_blocks_are_parts_of_the_whole(folder, read)
    with SafetensorsFolder(folder) as stored:
        assert not stored.has_numbers_of("nf4")


MATRIX = "model.layers.0.mlp.up_proj.weight"
STATE = f"{MATRIX}.quant_state.bitsandbytes__nf4"


def describe(**fields: Any) -> Any:
    """Return what changes the description of a matrix."""

    def change(tensors: Tensors) -> None:
        said = {**json.loads(bytes(tensors[STATE].tolist())), **fields}
        tensors[STATE] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return change


def as_bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


DOUBLE = "nf4, scales in eight bits"


@pytest.mark.parametrize(
    ("kind", "change", "wanted"),
    [
        (DOUBLE, quantised.put(f"{MATRIX}.absmax", None), [f"lacks {MATRIX}.absmax"]),
        (DOUBLE, quantised.put(f"{MATRIX}.quant_map", None), [f"lacks {MATRIX}.quant_map"]),
        (DOUBLE, quantised.put(f"{MATRIX}.nested_quant_map", None), [f"lacks {MATRIX}.nested_quant_map"]),
        (DOUBLE, quantised.put(f"{MATRIX}.nested_absmax", None), [f"{MATRIX}.absmax is stored as U8"]),
        (DOUBLE, quantised.put(f"{MATRIX}.nested_absmax", torch.ones(2)), [f"{MATRIX}.nested_absmax", "[2]", "[1]"]),
        (
            DOUBLE,
            quantised.put(f"{MATRIX}.absmax", torch.ones(3, dtype=torch.uint8)),
            [f"{MATRIX}.absmax", "[3]", "[192]"],
        ),
        (DOUBLE, quantised.put(f"{MATRIX}.quant_map", torch.linspace(-1, 1, 16)), [f"{MATRIX}.quant_map", "nf4"]),
        (DOUBLE, quantised.put(f"{MATRIX}.quant_map", torch.ones(15)), [f"{MATRIX}.quant_map", "nf4"]),
        (DOUBLE, quantised.put(MATRIX, None), [f"lacks {MATRIX}"]),
        (DOUBLE, quantised.put(MATRIX, torch.ones(700, 1, dtype=torch.uint8)), [MATRIX, "[700, 1]", "192 x 64"]),
        (DOUBLE, quantised.put(MATRIX, torch.ones(6144, dtype=torch.uint8)), [MATRIX, "[6144]"]),
        (DOUBLE, quantised.put(MATRIX, torch.ones(6144, 1, dtype=torch.int64)), [MATRIX, "I64"]),
        (DOUBLE, quantised.put(STATE, None), [f"{MATRIX}.absmax"]),
        (DOUBLE, quantised.put(STATE, as_bytes("{")), [STATE, "no JSON"]),
        (DOUBLE, quantised.put(STATE, as_bytes("[" * 3000)), [STATE, "no JSON"]),
        (DOUBLE, quantised.put(STATE, as_bytes("[1]")), [STATE, "shape None"]),
        (DOUBLE, quantised.put(STATE, torch.ones(1 << 20, dtype=torch.uint8)), [STATE, "[1048576]"]),
        (DOUBLE, quantised.put(STATE, torch.ones(8)), [STATE, "F32"]),
        (DOUBLE, quantised.put(f"{STATE[:-3]}int2", as_bytes("{}")), [f"{STATE[:-3]}int2", "nf4 and fp4"]),
        (DOUBLE, describe(shape=[-192, -64]), [STATE, "[-192, -64]"]),
        (DOUBLE, describe(shape=[192, 64, 1]), [STATE, "[192, 64, 1]"]),
        (DOUBLE, describe(shape=[10**30, 64]), [MATRIX, "10000"]),
        (DOUBLE, describe(shape=[64, 192]), [MATRIX, "[64, 192]", "[192, 64]"]),
        (DOUBLE, describe(shape=None), [STATE, "shape None"]),
        (DOUBLE, describe(blocksize=0), [STATE, "blocksize 0"]),
        (DOUBLE, describe(blocksize=-64), [STATE, "blocksize -64"]),
        (DOUBLE, describe(nested_blocksize=0), [STATE, "nested_blocksize 0"]),
        (DOUBLE, describe(nested_offset="zero"), [STATE, "nested_offset zero"]),
        (DOUBLE, describe(nested_offset=float("nan")), [STATE, "nested_offset nan"]),
        ("int8", quantised.put(f"{MATRIX[:-7]}.SCB", None), [f"lacks {MATRIX[:-7]}.SCB", MATRIX]),
        ("int8", quantised.put(f"{MATRIX[:-7]}.SCB", torch.ones(47)), [MATRIX, "[192, 64]", "[47]"]),
        (
            "int8",
            quantised.put(f"{MATRIX[:-7]}.weight_format", torch.tensor(2, dtype=torch.uint8)),
            ["weight_format", "is 2"],
        ),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, folders: Path, kind: str, change: Any, wanted: list[str]
) -> None:
    folder = Path(shutil.copytree(folders / kind, tmp_path / "model"))
    quantised.assert_refused(quantised.rewrite(folder, change), wanted)


@pytest.mark.parametrize("kind", [DOUBLE, "nf4, stored in bfloat16", "fp4", "int8"])
def test_what_is_spoilt_is_named(tmp_path: Path, folders: Path, kind: str) -> None:
    module = MATRIX.removesuffix(".weight")
    quantised.assert_what_is_spoilt_is_named_or_read(folders / kind, tmp_path / "model", module)
