"""Folders of compressed-tensors: what is read are the numbers that the library's own `decompress` makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.stored import SafetensorsFolder
from nemo_kto.weights.import_hf import check_weights
from tests.weights import quantised
from tests.weights.quantised import Tensors

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

BESIDE = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
KINDS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    # preset of the library -> changes of its weights, the format, how many bits are said
    "FP8": ("FP8", {}, "float-quantized", "eight"),
    "FP8, rows": ("FP8_DYNAMIC", {}, "float-quantized", "eight"),
    "FP8, blocks": ("FP8_BLOCK", {"block_structure": [40, 24]}, "float-quantized", "eight"),
    "FP8, weights alone": ("FP8_DYNAMIC", {"input_activations": None}, "naive-quantized", "eight"),
    "MXFP8": ("MXFP8", {}, "mxfp8-quantized", "eight"),
    "W8A8": ("W8A8", {}, "int-quantized", "eight"),
    "W8A8, zero points": ("W8A8", {"symmetric": False}, "int-quantized", "eight"),
    "W4A16": ("W4A16", {"group_size": 16}, "pack-quantized", "four"),
    "W4A16, groups of eight": ("W4A16", {"group_size": 8}, "pack-quantized", "four"),
    "W4A16, zero points": ("W4A16_ASYM", {"group_size": 8}, "pack-quantized", "four"),
    "W4A16, rows, zero points": (
        "W4A16_ASYM",
        {"group_size": None, "strategy": "channel"},
        "pack-quantized",
        "four",
    ),
    "W4A16, whole": ("W4A16", {"group_size": None, "strategy": "tensor"}, "pack-quantized", "four"),
    "W8A16": ("W8A16", {"group_size": 32}, "pack-quantized", "eight"),
    "W3A16, zero points": ("W3A16", {"group_size": 32, "symmetric": False}, "pack-quantized", "three"),
    "W5A16, rows": ("W5A16", {"group_size": None, "strategy": "channel"}, "pack-quantized", "five"),
    "NVFP4": ("NVFP4", {}, "nvfp4-pack-quantized", "four"),
    "NVFP4A16": ("NVFP4A16", {}, "nvfp4-pack-quantized", "four"),
    "MXFP4A16": ("MXFP4A16", {}, "mxfp4-pack-quantized", "four"),
}


def scheme_of(kind: str) -> QuantizationScheme:
    """Return the library's description of a kind."""
    preset, changes, form, _ = KINDS[kind]
    fields = preset_name_to_scheme(preset, ["Linear"]).model_dump()
    if "input_activations" in changes:
        fields["input_activations"] = None
    if "symmetric" in changes:
        fields["weights"]["zp_dtype"] = None
    fields["weights"] |= {key: value for key, value in changes.items() if key != "input_activations"}
    scheme = QuantizationScheme(**fields)
    assert infer_module_format(torch.nn.Linear, scheme) == form
    return scheme.model_copy(update={"format": form})


def compressed(weight: torch.Tensor, scheme: QuantizationScheme, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Return what the library stores a matrix in, by its names in a module; scales that are numbers in a dtype."""
    args, (rows, columns) = scheme.weights, weight.shape
    high, wide = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "block": args.block_structure,
    }.get(args.strategy) or (1, args.group_size)
    tiles = torch.nn.functional.pad(weight.float(), (0, -columns % wide, 0, -rows % high))
    tiles = tiles.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).flatten(2)
    low, top = tiles.amin(-1), tiles.amax(-1)
    state: Tensors = {"weight": weight.float()}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(low.min(), top.max())
    scale, zero = calculate_qparams(low, top, args, state.get("weight_global_scale"))
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    if args.scale_dtype is None:
        state["weight_scale"] = scale.to(dtype).float()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    found = compressor.compress(state, scheme)
    if args.scale_dtype is None:
        found["weight_scale"] = found["weight_scale"].to(dtype)
    return {key: value.contiguous() for key, value in found.items()}


def make_folder(folder: Path, name: str, kinds: dict[str, str], **settings: Any) -> Path:
    """Save a model with matrices of these kinds.

    Args:
        folder: Where.
        name: The family.
        kinds: Part of a matrix' name -> its kind; the first that fits counts.
        settings: Fields of its quantization_config.
    """
    quantised.plain_folder(folder, name, **SIZES)
    schemes = {kind: scheme_of(kind) for kind in kinds.values()}

    def change(tensors: Tensors) -> None:
        for key in [key for key in tensors if quantised.is_linear(key)]:
            kind = next((kind for part, kind in kinds.items() if part in key), None)
            if kind is not None:
                module = key.removesuffix(".weight")
                made = compressed(tensors.pop(key), schemes[kind])
                tensors |= {f"{module}.{own}": value for own, value in made.items()}

    forms = {scheme.format for scheme in schemes.values()}
    groups = {f"group_{number}": scheme for number, scheme in enumerate(schemes.values())}
    config = QuantizationConfig(
        config_groups=groups,
        format=forms.pop() if len(forms) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    return quantised.rewrite(folder, change, {**config.model_dump(mode="json"), **settings})


def theirs(folder: Path, kinds: dict[str, str], dtype: torch.dtype | None) -> Tensors:
    """Return what the library decompresses, by name, with scales that are numbers in a dtype; None for the files'."""
    tensors, found = load_file(folder / "model.safetensors"), {}
    for key in tensors:
        module, _, own = key.rpartition(".")
        if own == "weight_scale":
            kind = next(kind for part, kind in kinds.items() if part in key)
            scheme = scheme_of(kind)
            state = {name: tensors[f"{module}.{name}"] for name in BESIDE if f"{module}.{name}" in tensors}
            if dtype is not None and state["weight_scale"].dtype == torch.bfloat16:
                state["weight_scale"] = state["weight_scale"].to(dtype)
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            found[f"{module}.weight"] = compressor.decompress(state, scheme)["weight"]
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a folder of each kind."""
    root = tmp_path_factory.mktemp("compressed")
    for kind in KINDS:
        make_folder(root / kind, "llama", {"": kind})
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_library(folders: Path, kind: str) -> None:
    folder = folders / kind
    check_weights(folder, load_hf_config(folder))
    read, plain, rounded = (
        quantised.as_read(folder),
        *(theirs(folder, {"": kind}, each) for each in (torch.float32, None)),
    )
    with SafetensorsFolder(folder) as stored:
        assert set(stored.quantised) == plain.keys() and len(plain) == 28
        assert stored.bits == f"{KINDS[kind][3]} bits"
        assert {stored.scales_of_scales(name) for name in plain} == {None} and not stored.has_numbers_of("int8")
    for name, wanted in plain.items():
        assert torch.equal(read[name], wanted.float()) or wanted.dtype == torch.bfloat16, name
        assert torch.equal(read[name].bfloat16(), rounded[name].bfloat16()), name


@pytest.mark.parametrize("kind", KINDS)
def test_any_block_is_read_alone(folders: Path, kind: str) -> None:
    quantised.assert_blocks_are_parts_of_the_whole(folders / kind, quantised.as_read(folders / kind))


@pytest.mark.parametrize("kind", ["FP8", "FP8, rows", "W8A8", "W4A16", "W4A16, zero points", "NVFP4A16"])
def test_numbers_are_those_that_transformers_loads(folders: Path, kind: str) -> None:
    keys = json.loads((folders / kind / "config.json").read_text())["quantization_config"]
    model = AutoModelForCausalLM.from_pretrained(
        folders / kind, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(**keys, dequantize=True)
    )
    read = quantised.as_read(folders / kind)
    loaded = model.state_dict()
    assert loaded.keys() >= read.keys()
    assert all(torch.equal(read[name].bfloat16(), loaded[name].bfloat16()) for name in read)


def test_kinds_of_several_groups(tmp_path: Path) -> None:
    kinds = {"self_attn.o_proj": "W8A8", "self_attn": "FP8, rows", "layers.0.": "W4A16", "layers.1": "NVFP4"}
    folder = make_folder(tmp_path / "model", "llama", kinds)
    check_weights(folder, load_hf_config(folder))
    read, plain = quantised.as_read(folder), theirs(folder, kinds, None)
    assert all(torch.equal(read[name].bfloat16(), plain[name].bfloat16()) for name in plain)
    with SafetensorsFolder(folder) as stored:
        assert set(stored.quantised) == plain.keys() and len(plain) == 4 * 4 + 2 * 3
        assert stored.bits == "four and eight bits"


@pytest.mark.parametrize("first", [0, 1])
def test_groups_that_differ_in_zero_points_alone(tmp_path: Path, first: int) -> None:
    """Some matrices have zero points, some have none; which `config_groups` come first does not matter."""
    kinds = {"mlp": "W4A16, zero points", "self_attn": "W4A16, groups of eight"}
    folder = make_folder(tmp_path / "model", "llama", dict(list(kinds.items())[:: 1 - 2 * first]))
    read, plain = quantised.as_read(folder), theirs(folder, kinds, None)
    assert len(plain) == 28 and all(torch.equal(read[name].bfloat16(), plain[name]) for name in plain)


MODULE = "model.layers.0.self_attn.k_proj"
ACTIVATIONS = (
    *(f"{MODULE}.{name}" for name in ("input_scale", "input_zero_point", "output_scale", "input_global_scale")),
    *(f"model.layers.0.self_attn.{name}" for name in ("k_scale", "v_scale", "q_scale")),
)


def test_what_is_for_computing_in_fewer_bits_is_left_out(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama", {"": "FP8"}, kv_cache_scheme={"num_bits": 8, "type": "float"})
    before = quantised.as_read(folder)
    quantised.rewrite(folder, lambda tensors: tensors.update({name: torch.ones(1) for name in ACTIVATIONS}))
    check_weights(folder, load_hf_config(folder))
    after = quantised.as_read(folder)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with SafetensorsFolder(folder) as stored:
        assert stored.left_out == sorted(ACTIVATIONS)


SPARSE = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
TWO_OF_FOUR = {"format": "dense", "sparsity_structure": "2:4"}


@pytest.mark.parametrize(
    ("kind", "change", "wanted"),
    [
        ("FP8", quantised.put(f"{MODULE}.weight", torch.ones(32, 64)), [f"{MODULE}.weight", "not compressed"]),
        ("FP8", quantised.put(f"{MODULE}.weight_scale", None), [f"lacks {MODULE}.weight_scale"]),
        (
            "FP8",
            quantised.put(f"{MODULE}.weight_scale", torch.ones(7)),
            [f"{MODULE}.weight", "[32, 64]", "[7]", "[1, 1]"],
        ),
        (
            "FP8",
            quantised.put(f"{MODULE}.weight_scale", torch.ones(1, dtype=torch.int32)),
            [f"{MODULE}.weight_scale", "I32"],
        ),
        (
            "FP8",
            quantised.put(f"{MODULE}.weight", torch.ones(32, 64, dtype=torch.int8)),
            [f"{MODULE}.weight", "not of its config_groups"],
        ),
        ("W4A16", quantised.put(f"{MODULE}.weight_shape", None), [f"lacks {MODULE}.weight_shape"]),
        (
            "W4A16",
            quantised.put(f"{MODULE}.weight_shape", torch.tensor([-32, 64])),
            [f"{MODULE}.weight_shape", "-32 x 64"],
        ),
        (
            "W4A16",
            quantised.put(f"{MODULE}.weight_shape", torch.tensor([32, -64])),
            [f"{MODULE}.weight_shape", "32 x -64"],
        ),
        (
            "W4A16",
            quantised.put(f"{MODULE}.weight_shape", torch.tensor([32, 1 << 60])),
            [f"{MODULE}.weight_packed", "[32, 8]"],
        ),
        (
            "W4A16",
            quantised.put(f"{MODULE}.weight_shape", torch.tensor([32, 64, 1])),
            [f"{MODULE}.weight_shape", "[3]"],
        ),
        (
            "W4A16",
            quantised.put(f"{MODULE}.weight_packed", torch.ones(32, 7, dtype=torch.int32)),
            [f"{MODULE}.weight_packed", "[32, 7]"],
        ),
        (
            "W4A16",
            quantised.put(f"{MODULE}.weight_packed", torch.ones(2, 32, 8, dtype=torch.int32)),
            [f"{MODULE}.weight_packed", "[2, 32, 8]"],
        ),
        (
            "W4A16",
            quantised.put(f"{MODULE}.weight_g_idx", torch.arange(64)),
            [f"{MODULE}.weight_g_idx", "order of their own"],
        ),
        (
            "W4A16, zero points",
            quantised.put(f"{MODULE}.weight_zero_point", None),
            [f"lacks {MODULE}.weight_zero_point"],
        ),
        (
            "W4A16, zero points",
            quantised.put(f"{MODULE}.weight_zero_point", torch.ones(32, 8, dtype=torch.int32)),
            [f"{MODULE}.weight_zero_point", "[32, 8]", "[4, 8]"],
        ),
        ("NVFP4", quantised.put(f"{MODULE}.weight_global_scale", None), [f"lacks {MODULE}.weight_global_scale"]),
        (
            "NVFP4",
            quantised.put(f"{MODULE}.weight_global_scale", torch.ones(2)),
            [f"{MODULE}.weight_global_scale", "[2]"],
        ),
        (
            "NVFP4",
            quantised.put(f"{MODULE}.weight_scale", torch.ones(32, 4, dtype=torch.uint8)),
            [f"{MODULE}.weight_packed", "config_groups"],
        ),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, folders: Path, kind: str, change: Any, wanted: list[str]
) -> None:
    folder = Path(shutil.copytree(folders / kind, tmp_path / "model"))
    quantised.assert_refused(quantised.rewrite(folder, change), wanted)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"sparsity_config": SPARSE}, ["config.json", "sparsity_config", "sparse-24-bitmask"]),
        ({"sparsity_config": TWO_OF_FOUR}, ["sparsity_config", "2:4"]),
        ({"transform_config": {"config_groups": {"R1": {}}}}, ["transform_config", "R1"]),
        (
            {"format": "marlin-24", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
            ["group_0", "marlin-24"],
        ),
        ({"config_groups": {"W4A16": ["Linear"]}}, ["'W4A16': ['Linear']"]),
        ({"config_groups": None}, ["'config_groups': None"]),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, folders: Path, fields: dict[str, Any], wanted: list[str]
) -> None:
    folder = Path(shutil.copytree(folders / "W4A16", tmp_path / "model"))
    keys = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantised.assert_refused(quantised.rewrite(folder, lambda tensors: None, {**keys, **fields}), wanted)


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ({"num_bits": 0}, "'num_bits': 0"),
        ({"num_bits": 64}, "'num_bits': 64"),
        ({"group_size": -16}, "'group_size': -16"),
        ({"group_size": 0}, "'group_size': 0"),
        ({"strategy": "attn_head"}, "'strategy': 'attn_head'"),
        ({"type": "float"}, "'type': 'float'"),
        ({"actorder": "group"}, "actorder=group"),
        ({"strategy": "block", "block_structure": "0xFF"}, "'block_structure': '0xFF'"),
    ],
)
def test_other_numbers_are_refused_by_name(
    tmp_path: Path, folders: Path, weights: dict[str, Any], wanted: str
) -> None:
    folder = Path(shutil.copytree(folders / "W4A16", tmp_path / "model"))
    keys = json.loads((folder / "config.json").read_text())["quantization_config"]
    keys["config_groups"]["group_0"]["weights"] |= weights
    quantised.rewrite(folder, lambda tensors: None, keys)
    quantised.assert_refused(folder, ["config.json", "config_groups.group_0.weights", wanted])


def test_zeros_that_nobody_made_are_numbers_as_others(tmp_path: Path, folders: Path) -> None:
    folder = Path(shutil.copytree(folders / "W4A16", tmp_path / "model"))
    keys = json.loads((folder / "config.json").read_text())
    found = {"format": "dense", "sparsity_structure": "unstructured", "global_sparsity": 0.14, "targets": ["Linear"]}
    quantised.rewrite(folder, lambda tensors: None, {**keys["quantization_config"], "sparsity_config": found})
    check_weights(folder, load_hf_config(folder))
    older = json.loads((folder / "config.json").read_text())
    older["compression_config"] = older.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(older))
    check_weights(folder, load_hf_config(folder))
    before = quantised.as_read(folders / "W4A16")
    assert all(torch.equal(read, before[name]) for name, read in quantised.as_read(folder).items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_spoilt_is_named(tmp_path: Path, folders: Path, kind: str) -> None:
    quantised.assert_what_is_spoilt_is_named_or_read(folders / kind, tmp_path / "model", MODULE)
