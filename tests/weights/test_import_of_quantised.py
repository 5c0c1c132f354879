"""Folders in fewer bits through import and export, divided in every way: the same numbers as in one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.stored import SafetensorsFolder
from nemo_kto.network.weight_rules import Piece
from nemo_kto.weights.import_hf import check_weights
from nemo_kto.weights.source_folder import write_source_folder
from tests.network import tiny_hf
from tests.weights import quantised, test_compressed_tensors_folders, test_models_with_images
from tests.weights.quantised import Tensors

bitsandbytes = pytest.importorskip("bitsandbytes")
ACTIVATIONS = "model.layers.0.self_attn.k_scale"
BITS = {
    "nf4 of transformers": "four",  # a mixture whose experts are plain
    "nf4 of all experts": "four",  # as transformers 4 saved it
    "int8": "eight",
    "W4A16 with zero points": "four",
    "FP8 and NVFP4": "four and eight",
    "nf4 with images": "four",
}
LAYOUTS: dict[str, tuple[str, ...]] = {
    "TP1": tuple(BITS),
    "TP2": tuple(BITS),
    "EP2": ("nf4 of transformers", "nf4 of all experts", "int8"),
    "PP2": ("nf4 with images", "FP8 and NVFP4"),
}
CASES = [(layout, name) for layout, names in LAYOUTS.items() for name in names]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def saved_by_transformers(folder: Path, plain: Path, auto: Any, **settings: Any) -> None:
    auto.from_pretrained(plain, quantization_config=BitsAndBytesConfig(**settings)).save_pretrained(folder)


def in_nf4(tensors: Tensors) -> None:
    """Put bitsandbytes' form in place of each matrix of a layer but its router's."""
    for name in [name for name in tensors if "_proj.weight" in name]:
        codes, state = bitsandbytes.functional.quantize_4bit(tensors.pop(name), quant_type="nf4")
        tensors[name] = codes
        tensors |= {f"{name}.{own}": value for own, value in state.as_dict(packed=True).items()}


def make_folders(root: Path) -> None:
    saved_by_transformers(
        root / "nf4 of transformers",
        quantised.plain_folder(root / "plain" / "1", "qwen3_moe"),
        AutoModelForCausalLM,
        **NF4,
    )
    quantised.plain_folder(root / "nf4 of all experts", "qwen3_moe")
    quantised.rewrite(root / "nf4 of all experts", in_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    saved_by_transformers(
        root / "int8", quantised.plain_folder(root / "plain" / "2", "mixtral"), AutoModelForCausalLM, load_in_8bit=True
    )
    test_compressed_tensors_folders.make_folder(root / "W4A16 with zero points", "llama", {"": "W4A16, zero points"})
    kinds = {"mlp": "NVFP4", "self_attn": "FP8, rows"}
    test_compressed_tensors_folders.make_folder(root / "FP8 and NVFP4", "qwen3", kinds)
    quantised.rewrite(root / "FP8 and NVFP4", lambda tensors: tensors.update({ACTIVATIONS: torch.ones(1)}))
    config = test_models_with_images.wholes()["mistral3"]
    plain = test_models_with_images.make_folder(root / "plain" / "3", config, published=False)
    saved_by_transformers(root / "nf4 with images", plain, AutoModelForImageTextToText, **NF4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the folders."""
    root = tmp_path_factory.mktemp("quantised")
    make_folders(root)
    return root


@pytest.fixture(scope="module")
def results(source: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[list[str]]]) -> Path:
    """Return the folder of what each layout made of them."""
    root = tmp_path_factory.mktemp("results")
    (said,) = run_ranks(quantised.convert, 1, source, root, {"TP1": LAYOUTS["TP1"]})
    run_ranks(quantised.convert, 2, source, root, {name: LAYOUTS[name] for name in LAYOUTS if name != "TP1"})
    assert sorted(text for text in said if "holds matrices" in text) == sorted(
        f"{source / name} holds matrices in {bits} bits: they are trained, and exported, as the plain numbers they "
        "stand for."
        for name, bits in BITS.items()
    )
    (left_out,) = (text for text in said if "left out" in text)
    assert left_out.startswith(f"{source / 'FP8 and NVFP4'}: tensors that are for computing, or keeping keys")
    assert f"are left out, 1 in all, such as {ACTIVATIONS}: " in left_out
    return root


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_exported_numbers_are_those_of_the_folder(source: Path, results: Path, layout: str, name: str) -> None:
    """Bit for bit, under plain names; tests of each kind show that its numbers are its library's."""
    wanted, back = quantised.as_read(source / name), tiny_hf.stored_tensors(results / layout / name)
    assert back.keys() == wanted.keys()
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    with SafetensorsFolder(source / name) as stored:
        for key, plain in wanted.items():
            assert back[key].dtype == dtypes[stored.dtype(key)]
            assert torch.equal(back[key], plain.to(back[key].dtype)), key


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_logits_are_those_of_transformers(source: Path, results: Path, tmp_path: Path, layout: str, name: str) -> None:
    """Of the plain numbers in float32, which training has, not of what is exported."""
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(quantised.as_read(source / name), plain / "model.safetensors", metadata={"format": "pt"})
    keys = json.loads((source / name / "config.json").read_text())
    del keys["quantization_config"]
    (plain / "config.json").write_text(json.dumps(keys))
    if "images" in name:
        expected = test_models_with_images.logits_of(test_models_with_images.load(plain))
    else:
        expected = tiny_hf.transformers_logits(plain)
    torch.testing.assert_close(torch.load(results / layout / f"{name}.pt"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BITS)
def test_the_exported_configuration_says_what_is_there(source: Path, results: Path, name: str) -> None:
    before, after = (json.loads((root / name / "config.json").read_text()) for root in (source, results / "TP1"))
    del before["quantization_config"]
    assert after == before
    auto = AutoModelForImageTextToText if "images" in name else AutoModelForCausalLM
    _, info = auto.from_pretrained(results / "TP1" / name, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_the_language_model_may_say_it(source: Path, results: Path, tmp_path: Path, field: str) -> None:
    """Its configuration in that of a model with images, and compressed-tensors by the name it had at first."""
    given = source / "nf4 with images"
    keys = json.loads((given / "config.json").read_text())
    keys["text_config"][field] = keys.pop("quantization_config")
    folder, kept = tmp_path / "model", tmp_path / "kept"
    shutil.copytree(given, folder)
    kept.mkdir()
    (folder / "config.json").write_text(json.dumps(keys))
    config = load_hf_config(folder)
    check_weights(folder, config)
    read, wanted = quantised.as_read(folder), quantised.as_read(given)
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    write_source_folder(kept, config, model_folder=folder, tokenizer_folder=folder)
    before, after = (json.loads((root / "config.json").read_text()) for root in (results / "TP1" / given.name, kept))
    assert after == before


class Counted:
    """A tensor of a file that counts the bytes of what is read of it."""

    def __init__(self, stored: Any, reads: list[int]) -> None:
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype
        self._stored, self._reads = stored, reads

    def __getitem__(self, where: Any) -> torch.Tensor:
        block: torch.Tensor = self._stored[where]
        self._reads.append(block.nbytes)
        return block


def test_only_what_a_block_needs_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the rows costs an eighth of the bytes, a few at a time; of columns, rows of NF4 have no parts."""
    shape = (6144, 4096)
    tensors = {"a_proj.weight": torch.zeros(shape)}
    in_nf4(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    reads: list[int] = []
    slice_of = SafetensorsFolder._slice_of
    monkeypatch.setattr(SafetensorsFolder, "_slice_of", lambda folder, name: Counted(slice_of(folder, name), reads))
    whole = sum(value.nbytes for value in tensors.values())
    with SafetensorsFolder(tmp_path) as stored:
        reads.clear()
        stored.read(Piece("a_proj.weight", shape), (slice(768, 1536), slice(0, 4096)))
        assert abs(sum(reads) - whole / 8) < 5000
        reads.clear()
        block = stored.read(Piece("a_proj.weight", shape), (slice(0, 6144), slice(512, 1024)))
        assert block.shape == (6144, 512)
        assert sum(reads) <= whole + 5000 and max(reads) <= whole / 5


def test_tied_matrices_in_fewer_bits_are_compared_as_numbers(tmp_path: Path) -> None:
    """An output layer that is stored so too is the embedding if it stands for the same numbers, and only then."""
    folder = quantised.plain_folder(tmp_path / "model", "llama", tie_word_embeddings=True)

    def change(tensors: Tensors) -> None:
        embedding = tensors.pop("model.embed_tokens.weight").float()
        for name in ("model.embed_tokens", "lm_head"):
            scale = embedding.abs().amax(1) / 127
            tensors[f"{name}.weight"] = (embedding / scale[:, None]).round().to(torch.int8)
            tensors[f"{name}.SCB"] = scale * 127

    quantised.rewrite(folder, change, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert load_hf_config(folder).tie_word_embeddings
    other = load_file(folder / "model.safetensors")["lm_head.SCB"] * 2
    quantised.rewrite(folder, lambda tensors: tensors.update({"lm_head.SCB": other}))
    assert not load_hf_config(folder).tie_word_embeddings
