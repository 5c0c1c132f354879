"""Folders in fewer bits, for tests of their kinds: how they are read, made, and spoilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from nemo_kto.errors import KTOError
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.stored import SafetensorsFolder
from nemo_kto.network.weight_rules import Piece
from nemo_kto.weights.import_hf import check_weights
from tests.network import tiny_hf

Tensors = dict[str, torch.Tensor]


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
                (slice(1, rows - 2), slice(0, columns)),
                (slice(0, rows), slice(columns // 2, columns)),
                (slice(rows // 2 - 1, rows // 2 + 2), slice(3, columns - 1)),
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
