"""Folders in fewer bits, for tests of their kinds: how they are read, made, and spoilt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from nemo_kto.errors import KTOError
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.folder_tensors import is_of_activations
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

Tensors = dict[str, torch.Tensor]
DIVISIONS: dict[str, dict[str, int]] = {"TP1": {}, "TP2": {"tensor": 2}, "EP2": {"expert": 2}, "PP2": {"pipeline": 2}}
"""Name of a layout -> its sizes."""


def plain_folder(folder: Path, name: str, **fields: Any) -> Path:
    """Save a tiny model of a family in bfloat16; `fields` change its configuration."""
    config = AutoConfig.for_model(**{**tiny_hf.families()[name].to_dict(), **fields})
    return tiny_hf.make_folder(folder, config, dtype=torch.bfloat16)


def is_linear(name: str) -> bool:
    return "_proj" in name


def rewrite(folder: Path, change: Callable[[Tensors], Any], quantization_config: dict[str, Any] | None = None) -> Path:
    """Change the tensors of a folder with one file, and say in its configuration how they are stored."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)
    if quantization_config is not None:
        keys = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**keys, "quantization_config": quantization_config}, indent=1))
    return folder


def everything(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def as_read(folder: Path) -> Tensors:
    """Return all tensors of a folder as they are read, by name."""
    with SafetensorsFolder(folder) as stored:
        shapes = {name: stored.shape(name) for name in stored.names}
        return {name: stored.read(Piece(name, shape), everything(shape)) for name, shape in shapes.items()}


def assert_blocks_are_parts_of_the_whole(folder: Path, whole: Tensors) -> None:
    """Read blocks with ragged edges of each matrix in fewer bits, and compare them with what all of it is."""
    with SafetensorsFolder(folder) as stored:
        assert stored.quantised
        for name in stored.quantised:
            rows, columns = stored.shape(name)
            for where in (
                (slice(1, max(1, rows - 2)), slice(0, columns)),
                (slice(0, rows), slice(columns // 2, columns)),
                (slice(rows // 2 - 1, min(rows // 2 + 2, rows)), slice(3, columns - 1)),
                (slice(rows - 1, rows), slice(columns - 1, columns)),
                (slice(rows, rows), slice(0, columns)),
            ):
                block = stored.read(Piece(name, (rows, columns)), where)
                assert torch.equal(block, whole[name][where]), (name, where)


def assert_refused(folder: Path, wanted: list[str]) -> None:
    """Judge a folder as a run does, and look for parts of what is said."""
    with pytest.raises(KTOError) as caught:
        check_weights(folder, load_hf_config(folder))
    assert all(part in str(caught.value) for part in [str(folder), *wanted]), str(caught.value)


def put(name: str, tensor: torch.Tensor | None) -> Callable[[Tensors], None]:
    """Return what puts a tensor in place of another, or takes one out."""

    def change(tensors: Tensors) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return change


_DTYPES = (torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


def _spoilt(tensor: torch.Tensor) -> Iterator[torch.Tensor | None]:
    """Yield what could stand in a damaged or a hostile file in place of a tensor."""
    yield None
    yield from (tensor.to(dtype) for dtype in _DTYPES if dtype != tensor.dtype)
    yield tensor.flatten()[:1].reshape(())
    yield tensor.flatten()[:0]
    yield tensor[None]
    if tensor.dim():
        yield torch.cat([tensor, tensor])
        yield tensor.flatten()
        yield tensor[:0]


def assert_what_is_spoilt_is_named_or_read(folder: Path, target: Path, module: str) -> None:
    """Spoil each tensor that a module's matrix is stored in: it is refused in a sentence, or does not matter."""
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys() if name.startswith(f"{module}.")}  # noqa: SIM118
        metadata = {key: value for key, value in (opened.metadata() or {}).items() if key.startswith(f"{module}.")}
    target.mkdir()
    shutil.copyfile(folder / "config.json", target / "config.json")
    stored_in = [name for name in found if not is_of_activations(name)]
    assert len(stored_in) > 1
    for name in stored_in:
        refusals = 0
        for spoilt in _spoilt(found[name]):
            tensors = dict(found)
            put(name, spoilt)(tensors)
            save_file(tensors, target / "model.safetensors", metadata=metadata)
            try:
                with SafetensorsFolder(target) as stored:
                    for matrix in stored.quantised:
                        shape = stored.shape(matrix)
                        stored.read(Piece(matrix, shape), everything(shape))
            except KTOError as error:
                refusals += str(target) in str(error) and module in str(error)
        assert refusals >= 3, name


def convert(source: Path, results: Path, layouts: dict[str, tuple[str, ...]]) -> list[str]:
    """Import and export folders, from what a checkpoint keeps of them, on a rank; return what was said.

    Args:
        source: The folder of the folders.
        results: The folder of what is exported, and of logits.
        layouts: Keys of `DIVISIONS` for so many ranks as there are -> which folders.
    """
    said = heard()
    enable_cpu()
    for layout, names in layouts.items():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        world = 1 if layout == "TP1" else 2
        parallel.initialize(Layout(world_size=world, **DIVISIONS[layout]), seed=1)
        for name in names:
            hf_config = load_hf_config(source / name)
            sequence = layout == "TP2" and dimensions_of(hf_config).mixture is not None
            model = build_gpt(hf_config, Layout(world_size=world, sequence=sequence, **DIVISIONS[layout]))
            check_weights(source / name, hf_config)
            import_hf(model, source / name)
            target, kept = results / layout / name, results / layout / f"{name}.kept"
            if torch.distributed.get_rank() == 0:
                kept.mkdir(parents=True)
                write_source_folder(kept, hf_config, model_folder=source / name, tokenizer_folder=source / name)
            torch.distributed.barrier()
            export_hf([model], hf_config, target, source_folder=kept)
            logits = tiny_hf.packed_logits(model)
            if logits is not None and parallel.position().tp_rank == 0:
                torch.save(logits, results / layout / f"{name}.pt")
    return said
