"""Matrices that a folder stores in eight bits, with a scale for each block or one in all (DeepSeek-V3, section 3.3).

They are made plain numbers as they are read: `weight * weight_scale_inv`, as transformers' `Fp8Dequantize` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_kto.errors import CheckpointError, ConfigError

FIELD = "quantization_config"
STORED_AS = "F8_E4M3"
"""What the safetensors format calls the dtype of such matrices."""
SCALE = "_scale_inv"
"""What the names of their scales end with, behind the matrix's own."""
BESIDE = ("activation_scale", "input_scale")
"""What stands beside a matrix for computing in eight bits, and means nothing without."""

_BLOCK = (128, 128)
_OTHERWISE = {"scale_fmt": "float", "expert_dtype": "fp8"}
"""Fields, with the values beside which matrices can be read."""
_SAFETENSORS = {"float32": "F32", "float16": "F16"}


@dataclass(frozen=True)
class Quantisation:
    """How a folder stores its matrices.

    Attributes:
        block: Rows and columns that share a scale; None where each matrix has one.
        dtype: The dtype they have as plain numbers, as the safetensors format calls it: that of config.json, bfloat16
            if it names none.
    """

    block: tuple[int, int] | None
    dtype: str = "BF16"

    @classmethod
    def of(cls, keys: Mapping[str, Any], source: str | Path) -> Quantisation | None:
        """Return what the keys of a config.json say; None where nothing is quantised.

        Raises:
            ConfigError: It is another kind of quantisation; the message begins with `source`.
        """
        found = keys.get(FIELD)
        if found is None:
            return None
        block = found.get("weight_block_size", _BLOCK) if isinstance(found, dict) else ()
        if not isinstance(found, dict) or found.get("quant_method") != "fp8" or not _is_block(block):
            raise ConfigError(
                f"{source}: {FIELD} is {found}. Quantised weights cannot be trained, and only those of the "
                "quant_method fp8 can be read as plain numbers. Use the model's unquantised folder."
            )
        for name, known in _OTHERWISE.items():
            if found.get(name, known) != known:
                raise ConfigError(
                    f"{source}: {FIELD}.{name}={found[name]} is not supported, only {known}. Use the model's "
                    "unquantised folder."
                )
        dtype = str(keys.get("dtype") or keys.get("torch_dtype")).removeprefix("torch.")
        return cls(None if block is None else (int(block[0]), int(block[1])), _SAFETENSORS.get(dtype, "BF16"))

    @classmethod
    def of_folder(cls, folder: Path) -> Quantisation | None:
        """Return what the config.json of a folder says; None where there is none, or it cannot be read."""
        try:
            keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return cls.of(keys, folder / "config.json") if isinstance(keys, dict) else None

    def check(self, place: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> None:
        """Raise a CheckpointError, which begins with `place`, unless scales of a shape can be those of a matrix."""
        if self.block is None:
            wanted = [(), (1,), (1, 1)]
        else:
            wanted = [tuple(-(-size // step) for size, step in zip(shape, self.block, strict=False))]
        if len(shape) != 2 or scales not in wanted:
            raise CheckpointError(
                f"{place} has the shape {list(shape)} and scales {list(scales)}, which do not fit with "
                f"{FIELD}.weight_block_size={self.block and list(self.block)}. Use the model's unquantised folder."
            )

    def plain(self, stored: torch.Tensor, rows: slice, columns: slice, scales: Any) -> torch.Tensor:
        """Return a block of a matrix in float32.

        Args:
            stored: The block as it is stored.
            rows: Which rows of the matrix it has.
            columns: Which columns.
            scales: The matrix's scales, to be sliced.
        """
        if self.block is None:
            return stored.float() * scales[...].float().reshape(())
        (high, wide), offsets = self.block, []
        tiles = []
        for place, step in ((rows, high), (columns, wide)):
            first = place.start // step
            tiles.append(slice(first, -(-place.stop // step)))
            offsets.append(slice(place.start - first * step, place.stop - first * step))
        factors = scales[tuple(tiles)].float().repeat_interleave(high, 0).repeat_interleave(wide, 1)
        return stored.float() * factors[offsets[0], offsets[1]]


def _is_block(block: Any) -> bool:
    """Return whether this says how many rows and columns share a scale."""
    if block is None:
        return True
    return isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
