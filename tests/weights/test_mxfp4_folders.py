"""Folders with experts in four bits: what is read and exported are the numbers that transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config

from nemo_kto.errors import KTOError
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.stored import SafetensorsFolder
from nemo_kto.network.weight_rules import Piece
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.export_hf import export_hf
from nemo_kto.weights.import_hf import check_weights, import_hf
from nemo_kto.weights.source_folder import write_source_folder
from tests.distributed_harness import heard
from tests.network import tiny_hf

LAYOUTS = {
    "TP1": Layout(world_size=1),
    "TP2": Layout(world_size=2, tensor=2, sequence=True, expert_tensor=1),
    "EP2": Layout(world_size=2, expert=2),
}
HIDDEN, INNER, EXPERTS = 64, 96, 4  # 32 input channels have an exponent together
FIRST = "model.layers.0.mlp.experts.gate_up_proj"


def make_folder(folder: Path, *, two_files: bool = False) -> Path:
    """Save a gpt-oss model as it is published: experts' matrices in four bits, all else in bfloat16."""
    sizes = {**tiny_hf.SIZES, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    config = GptOssConfig(**sizes, num_experts_per_tok=2, head_dim=16, sliding_window=7, eos_token_id=2)
    tiny_hf.make_folder(folder, config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if not key.endswith("_proj") or ".experts." not in key:
            tensors[key] = tensor.bfloat16()  # norms too
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{key}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(119, 126, shape, generator=generator, dtype=torch.uint8)
    if two_files:  # scales in another file than blocks
        files = {name: f"model-0000{1 + name.endswith('_scales')}-of-00002.safetensors" for name in tensors}
        (folder / "model.safetensors").unlink()
        for file in set(files.values()):
            own = {name: tensor for name, tensor in tensors.items() if files[name] == file}
            save_file(own, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    keys = json.loads((folder / "config.json").read_text())
    del keys["dtype"]  # as published
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    keys["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (folder / "config.json").write_text(json.dumps(keys, indent=1))
    return folder


def dequantised(folder: Path, dtype: torch.dtype) -> Any:
    """Return transformers' model with plain numbers."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    ).eval()


def convert(source: Path, results: Path, names: list[str]) -> list[str]:
    """Import and export the folder, from what a checkpoint keeps of it; return what was said."""
    said = heard()
    enable_cpu()
    hf_config = load_hf_config(source)
    for name in names:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        parallel.initialize(LAYOUTS[name], seed=1)
        model = build_gpt(hf_config, LAYOUTS[name])
        check_weights(source, hf_config)
        import_hf(model, source)
        target, kept = results / name, results / f"{name}.kept"
        if torch.distributed.get_rank() == 0:
            kept.mkdir(parents=True)
            write_source_folder(kept, hf_config, model_folder=source, tokenizer_folder=source)
        torch.distributed.barrier()
        export_hf([model], hf_config, target, source_folder=kept)
        logits = tiny_hf.packed_logits(model)
        if logits is not None and parallel.position().tp_rank == 0:
            torch.save(logits, results / f"{name}.pt")
    return said


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder."""
    return make_folder(tmp_path_factory.mktemp("mxfp4") / "source", two_files=True)


@pytest.fixture(scope="module")
def results(source: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[list[str]]]) -> Path:
    """Return the folder of what each layout made of it."""
    root = tmp_path_factory.mktemp("results")
    (said,) = run_ranks(convert, 1, source, root, ["TP1"])
    run_ranks(convert, 2, source, root, ["TP2", "EP2"])
    assert [text for text in said if "bits" in text] == [
        f"{source} holds matrices in four bits: they are trained, and exported, as the plain numbers they stand for."
    ]
    return root


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers_numbers(source: Path, results: Path, layout: str) -> None:
    model = dequantised(source, torch.float32).float()  # transformers 5.8 leaves the experts in bfloat16
    expected = torch.cat([model(document[None]).logits[0] for document in tiny_hf.documents()])
    torch.testing.assert_close(torch.load(results / f"{layout}.pt"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exported_numbers_are_transformers(source: Path, results: Path, layout: str) -> None:
    """Bit for bit, in bfloat16, under the names that the model has without quantisation, in the source's file."""
    back, theirs = tiny_hf.stored_tensors(results / layout), dequantised(source, torch.bfloat16).state_dict()
    assert back.keys() == theirs.keys()
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    assert all(torch.equal(back[key], theirs[key].bfloat16()) for key in theirs)


def test_the_exported_configuration_says_what_is_there(source: Path, results: Path) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, results / "TP1"))
    del before["quantization_config"]
    assert after == before
    _, info = AutoModelForCausalLM.from_pretrained(results / "TP1", output_loading_info=True)
    assert not any(info.values()), info


def test_a_block_by_hand(tmp_path: Path) -> None:
    """Input channels 31 to 33 of outputs 2 and 4 of the third expert: two exponents, both halves of a byte."""
    folder = make_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    blocks, scales = tensors[f"{FIRST}_blocks"], tensors[f"{FIRST}_scales"]
    for output in (2, 4):
        blocks[2, output, 0, 15] = 0xA0 + 1  # channel 31 is in the upper half: sign, and 2 of the table
        blocks[2, output, 1, 0] = 0x7F  # channel 32 in the lower, 33 in the upper half
        scales[2, output] = torch.tensor([128, 126], dtype=torch.uint8)  # times 2, times a half
    save_file(tensors, folder / "model.safetensors")
    piece = Piece(FIRST, (INNER, HIDDEN), 0, 2 * INNER, every=2, transposed=True, stacked=EXPERTS, place=2)
    with SafetensorsFolder(folder) as stored:
        read = stored.read(piece, (slice(1, 3), slice(31, 34)))
    assert torch.equal(read, torch.tensor([[-2.0, -3.0, 3.0]] * 2))


def without_scales(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{FIRST}_scales"]


def other_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{FIRST}_scales"] = torch.ones(EXPERTS, 2 * INNER, 1, dtype=torch.uint8)


def plain_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{FIRST}_scales"] = torch.ones(EXPERTS, 2 * INNER, 2)


def lone_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight_scales"] = torch.ones(1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (without_scales, [f"lacks {FIRST}_scales"]),
        (other_scales, [f"{FIRST}_blocks (U8, [4, 192, 2, 16])", f"{FIRST}_scales (U8, [4, 192, 1])"]),
        (plain_scales, [f"{FIRST}_scales (F32, [4, 192, 2])"]),
        (lone_scales, ["no place for", "model.norm.weight_scales"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, change: Callable[..., None], wanted: list[str]) -> None:
    folder = make_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(KTOError) as caught:
        check_weights(folder, load_hf_config(folder))
    assert all(part in str(caught.value) for part in [str(folder), *wanted]), str(caught.value)


def test_four_bits_that_the_configuration_does_not_mention_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    keys = json.loads((folder / "config.json").read_text())
    del keys["quantization_config"]
    (folder / "config.json").write_text(json.dumps(keys))
    with pytest.raises(KTOError, match="lacks .*experts.down_proj"):
        check_weights(folder, load_hf_config(folder))
