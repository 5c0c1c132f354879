"""Matrices as torchao has stored them: what is read are the numbers that it made of them; see `torchao/make.py`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.weights import quantised

FILES = Path(__file__).with_name("torchao")
WANTED = load_file(FILES / "wanted.safetensors")
CONFIG = {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}, "dtype": "bfloat16"}


@pytest.mark.parametrize("kind", sorted(WANTED))
def test_stored_numbers_are_torchaos(tmp_path: Path, kind: str) -> None:
    shutil.copyfile(FILES / f"{kind}.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    read = quantised.as_read(tmp_path)
    assert read.keys() == {"a.weight"} and torch.equal(read["a.weight"].bfloat16(), WANTED[kind])
    quantised.assert_blocks_are_parts_of_the_whole(tmp_path, read)


def test_every_file_is_of_a_kind() -> None:
    assert {file.stem for file in FILES.glob("*.safetensors")} == WANTED.keys() | {"wanted"} and len(WANTED) == 7
