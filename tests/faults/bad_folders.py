"""Model folders, adapters, checkpoints and caches that cannot be used, as they come about."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Spoil = Callable[[Path], Any]


def edit(name: str, **changes: Any) -> Spoil:
    """Return what changes keys of a JSON file; `...` takes one out."""

    def spoil(folder: Path) -> None:
        file = folder / name
        keys = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in keys.items() if value is not ...}))

    return spoil


def write(name: str, content: str | bytes) -> Spoil:
    """Return what writes a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str) -> Spoil:
    """Return what removes a file."""
    return lambda folder: (folder / name).unlink()


def cut(name: str, *, by: int = 1000) -> Spoil:
    """Return what shortens a file, as a download that broke off."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-by])


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], name: str = WEIGHTS) -> Spoil:
    """Return what changes the tensors of a file."""
    return lambda folder: save_file(change(load_file(folder / name)), folder / name)


def with_shape(shape: tuple[int, ...]) -> Spoil:
    """Return what gives a tensor another shape."""
    return tensors(lambda found: {**found, NORM: torch.ones(shape)})


def header(content: dict[str, Any]) -> bytes:
    """Return a safetensors file of nothing but a header."""
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


def indexed(index: Any) -> Spoil:
    """Return what renames the weights and writes an index."""

    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))

    return spoil


def as_file(folder: Path) -> None:
    """Make a file of a folder."""
    shutil.rmtree(folder)
    folder.write_text("red")


def emptied(folder: Path) -> None:
    """Leave an empty folder."""
    shutil.rmtree(folder)
    folder.mkdir()


MODELS: dict[str, tuple[Spoil, str]] = {
    "it is not there": (shutil.rmtree, "is not a folder"),
    "it is a file": (as_file, "is not a folder"),
    "it is empty": (emptied, "no tokenizer"),
    # config.json
    "no config.json": (remove(CONFIG), CONFIG),
    "config.json is empty": (write(CONFIG, ""), CONFIG),
    "config.json is no JSON": (write(CONFIG, "{'model_type': 'llama'}"), CONFIG),
    "config.json is a list": (write(CONFIG, "[]"), CONFIG),
    "config.json is deeply nested": (write(CONFIG, "[" * 100_000), CONFIG),
    "config.json is no text": (write(CONFIG, b"\xff\xfe\x00"), CONFIG),
    "config.json is a pointer of Git LFS": (write(CONFIG, "version https://git-lfs.github.com/spec/v1\n"), CONFIG),
    "no model_type": (edit(CONFIG, model_type=...), "architecture None"),
    "a model_type that is a number": (edit(CONFIG, model_type=7), "architecture 7"),
    "another architecture": (edit(CONFIG, model_type="gpt_bigcode"), "gpt_bigcode"),
    "a model of pictures": (edit(CONFIG, model_type="clip"), "clip"),
    "hidden_size is 0": (edit(CONFIG, hidden_size=0), "[22, 0]"),
    "hidden_size is negative": (edit(CONFIG, hidden_size=-32), "[22, -32]"),
    "hidden_size is text": (edit(CONFIG, hidden_size="big"), "hidden_size"),
    "hidden_size is null": (edit(CONFIG, hidden_size=None), CONFIG),
    "hidden_size of another model": (edit(CONFIG, hidden_size=64), "shape"),
    "hidden_size is enormous": (edit(CONFIG, hidden_size=10**12), "1000000000000]"),
    "no heads": (edit(CONFIG, num_attention_heads=0), CONFIG),
    "heads that do not divide": (edit(CONFIG, num_attention_heads=5), "attention heads (5)"),
    "groups that do not divide": (edit(CONFIG, num_key_value_heads=3), "k_proj.weight"),
    "no groups": (edit(CONFIG, num_key_value_heads=0), "k_proj.weight"),
    "no layers": (edit(CONFIG, num_hidden_layers=0), "no place for"),
    "half a layer": (edit(CONFIG, num_hidden_layers=2.5), "num_hidden_layers"),
    "more layers than weights": (edit(CONFIG, num_hidden_layers=6), "layers"),
    "fewer layers than weights": (edit(CONFIG, num_hidden_layers=3), "layers"),
    "a vocabulary of nothing": (edit(CONFIG, vocab_size=0), "[0, 32]"),
    "a vocabulary smaller than the tokenizer's": (edit(CONFIG, vocab_size=5), "[5, 32]"),
    "an activation nobody knows": (edit(CONFIG, hidden_act="swoosh"), "swoosh"),
    "an epsilon that is text": (edit(CONFIG, rms_norm_eps="small"), "rms_norm_eps"),
    "rope nobody knows": (edit(CONFIG, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "spiral"),
    "rope that is text": (edit(CONFIG, rope_parameters="yes"), "rope"),
    "quantised": (edit(CONFIG, quantization_config={"quant_method": "awq", "bits": 4}), "of the quant_method 'awq'"),
    "code of its own": (edit(CONFIG, auto_map={"AutoConfig": "x.Y"}, model_type="mine"), "mine"),
    # weights
    "no weights": (remove(WEIGHTS), WEIGHTS),
    "weights as a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "safetensors"),
    "weights as GGUF": (lambda folder: (folder / WEIGHTS).rename(folder / "model.gguf"), "safetensors"),
    "weights are empty": (write(WEIGHTS, b""), WEIGHTS),
    "weights are cut off": (cut(WEIGHTS), WEIGHTS),
    "weights are cut off in the header": (
        lambda folder: cut(WEIGHTS, by=(folder / WEIGHTS).stat().st_size - 99)(folder),
        WEIGHTS,
    ),
    "weights are a page of a website": (write(WEIGHTS, "<!DOCTYPE html><html>Sign in</html>"), WEIGHTS),
    "weights are a pointer of Git LFS": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid x\n"), "LFS"),
    "weights are a folder": (lambda folder: [(folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()], WEIGHTS),
    "weights are a link to nowhere": (
        lambda folder: [(folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to(folder / "blob")],
        WEIGHTS,
    ),
    "a header that lies": (
        write(WEIGHTS, header({NORM: {"dtype": "F32", "shape": [99], "data_offsets": [0, 8]}})),
        WEIGHTS,
    ),
    "a header of something else": (write(WEIGHTS, header({NORM: 7})), WEIGHTS),
    "no tensor": (tensors(lambda found: {}), "lacks"),
    "a tensor is missing": (tensors(lambda found: {name: found[name] for name in found if name != NORM}), NORM),
    "a tensor too many": (tensors(lambda found: {**found, "model.extra.weight": torch.ones(2)}), "model.extra.weight"),
    "a tensor of another shape": (with_shape((31,)), NORM),
    "a scalar for a tensor": (with_shape(()), NORM),
    "whole numbers": (tensors(lambda found: {name: found[name].to(torch.int8) for name in found}), "quantised"),
    "complex numbers": (tensors(lambda found: {**found, NORM: found[NORM].to(torch.complex64)}), NORM),
    "not a number": (tensors(lambda found: {**found, NORM: found[NORM] * torch.nan}), "not finite"),
    "infinity": (tensors(lambda found: {**found, NORM: found[NORM] / 0}), "not finite"),
    "an index that is no JSON": (indexed("oops"), INDEX),
    "an index without a map": (indexed({"metadata": {}}), INDEX),
    "an index that is a list": (indexed([]), INDEX),
    "an index of numbers": (indexed({"weight_map": {NORM: 7}}), INDEX),
    "an index of nothing": (indexed({"weight_map": {}}), "lacks"),
    "an index of a file that is missing": (
        indexed({"weight_map": {NORM: "model-2.safetensors"}}),
        "model-2.safetensors",
    ),
    "an index that leads elsewhere": (indexed({"weight_map": {NORM: "../x.safetensors"}}), "outside"),
    # the tokenizer
    "no tokenizer": (
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "tokenizer",
    ),
    "tokenizer.json is missing": (remove("tokenizer.json"), "tokenizer"),
    "tokenizer.json is empty": (write("tokenizer.json", ""), "tokenizer"),
    "tokenizer.json is no JSON": (write("tokenizer.json", "{oops"), "tokenizer"),
    "tokenizer.json is something else": (write("tokenizer.json", '{"model": 7}'), "tokenizer"),
    "tokenizer_config.json is no JSON": (write("tokenizer_config.json", "{oops"), "tokenizer"),
    "tokenizer_config.json is a list": (write("tokenizer_config.json", "[]"), "tokenizer"),
    "a tokenizer with code": (
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}, tokenizer_class="MyTokenizer"),
        "trust_remote_code",
    ),
    "no end of text": (edit("tokenizer_config.json", eos_token=None), "EOS"),
    "a chat template that is no template": (edit("tokenizer_config.json", chat_template="{% for %}"), "template"),
    "a chat template that fails": (
        edit("tokenizer_config.json", chat_template="{{ raise_exception('no') }}"),
        "template",
    ),
    "a chat template that is a number": (edit("tokenizer_config.json", chat_template=7), "template"),
}
"""What is wrong with a model folder -> what makes it so, and what the message has to say."""

ADAPTERS: dict[str, tuple[Spoil, str]] = {
    "it is not there": (shutil.rmtree, "is not a folder"),
    "it is a file": (as_file, "is not a folder"),
    "it is empty": (emptied, "config.json"),
    "its configuration is no JSON": (write(ADAPTER, "{oops"), ADAPTER),
    "its configuration is a list": (write(ADAPTER, "[]"), ADAPTER),
    "its configuration is empty": (write(ADAPTER, "{}"), ADAPTER),
    "another method": (edit(ADAPTER, peft_type="LOHA"), "LOHA"),
    "DoRA": (edit(ADAPTER, use_dora=True), "model.peft.lora_tuning.dora=true"),
    "a variant": (edit(ADAPTER, use_qalora=True), "use_qalora"),
    "no expression": (edit(ADAPTER, rank_pattern={"(q_proj": 4}), "no regular expression"),
    "patterns in a list": (edit(ADAPTER, alpha_pattern=["q_proj"]), "no mapping"),
    "modules by number": (edit(ADAPTER, modules_to_save=[3]), "list of names"),
    "a module without tensors": (edit(ADAPTER, modules_to_save=["lm_head"]), "modules_to_save=[lm_head]"),
    "a rank of 0": (edit(ADAPTER, r=0), "r=0 is not possible"),
    "a rank that is text": (edit(ADAPTER, r="big"), "r='big' is not possible"),
    "another rank": (edit(ADAPTER, r=16), "model.peft.lora_tuning.adapter_dim=16"),
    "no rank": (edit(ADAPTER, r=...), "r=None is not possible"),
    "alpha is text": (edit(ADAPTER, lora_alpha="big"), "lora_alpha"),
    "alpha is NaN": (edit(ADAPTER, lora_alpha=float("nan")), "lora_alpha"),
    "no weights": (remove(ADAPTER_WEIGHTS), ADAPTER_WEIGHTS),
    "weights are cut off": (cut(ADAPTER_WEIGHTS, by=100), ADAPTER_WEIGHTS),
    "weights are empty": (write(ADAPTER_WEIGHTS, b""), ADAPTER_WEIGHTS),
    "a tensor is missing": (
        tensors(lambda found: dict(list(found.items())[1:]), ADAPTER_WEIGHTS),
        "is missing",
    ),
    "no tensors": (tensors(lambda found: {}, ADAPTER_WEIGHTS), "no tensors"),
    "tensors of another model": (
        tensors(lambda found: {name: torch.ones(4, 4) for name in found}, ADAPTER_WEIGHTS),
        "shape",
    ),
    "tensors of more layers": (
        tensors(lambda found: {name.replace("layers.1", "layers.9"): found[name] for name in found}, ADAPTER_WEIGHTS),
        "layer",
    ),
    "names nobody knows": (
        tensors(lambda found: {f"x{number}": tensor for number, tensor in enumerate(found.values())}, ADAPTER_WEIGHTS),
        "no projection",
    ),
    "not a number": (
        tensors(lambda found: {name: found[name] * torch.nan for name in found}, ADAPTER_WEIGHTS),
        "not finite",
    ),
}
"""What is wrong with an adapter -> what makes it so, and what the message has to say."""
