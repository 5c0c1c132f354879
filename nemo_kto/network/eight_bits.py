"""Matrices that a folder stores in eight bits, with scales for blocks (DeepSeek-V3, section 3.3), rows, or in all.

They are made plain numbers as they are read: `weight * weight_scale_inv`, as transformers' `Fp8Dequantize` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.network.folder_tensors import FolderTensors
from nemo_kto.network.scaled import (
    EIGHT_BIT_FLOAT,
    EXPONENTS,
    FLOATS,
    POWERS,
    PlainNumbers,
    ScaledMatrix,
    ScaleNumbers,
    Scales,
    shapes_of_scales,
)

SCALE, SCALE_OF_OTHERS = "_scale_inv", "_scale"
"""What the names of scales end with, behind the matrix's own: as DeepSeek calls them, and most others."""

_BLOCK = (128, 128)
_UE8M0 = "ue8m0"
"""`scale_fmt` of scales that are powers of two, whatever they are stored as; DeepSeek-V3.1 has them in float32."""
_KNOWN = {"scale_fmt": ("float", _UE8M0), "expert_dtype": ("fp8",)}
"""Fields, with the values beside which matrices can be read, the default first."""


@dataclass(frozen=True)
class EightBits:
    """How a folder stores its matrices.

    Attributes:
        block: Rows and columns that share a scale; None where each matrix has one.
        exponents: Whether scales are powers of two, and may be stored as their exponents.
        dtype: The dtype they have as plain numbers, as the safetensors format calls it.
    """

    block: tuple[int, int] | None
    exponents: bool
    dtype: str

    @classmethod
    def of(cls, found: Mapping[str, Any], dtype: str, source: str) -> EightBits | None:
        """Return what a `quantization_config` says; None for what cannot be understood.

        Raises:
            ConfigError: A field has a value beside which matrices cannot be read; the message begins with `source`.
        """
        block = found.get("weight_block_size", _BLOCK)
        if not _is_block(block):
            return None
        for name, known in _KNOWN.items():
            if found.get(name, known[0]) not in known:
                raise ConfigError(
                    f"{source}.{name}={found[name]} is not supported, only {' and '.join(known)}. Use the model's "
                    "unquantised folder."
                )
        size = None if block is None else (int(block[0]), int(block[1]))
        return cls(size, found.get("scale_fmt") == _UE8M0, dtype)

    def packed(self, tensors: FolderTensors) -> dict[str, ScaledMatrix]:
        """Return the matrices in eight bits among a folder's tensors, by name; see `Quantisation`."""
        return {name: self._matrix(tensors, name) for name in tensors.names if tensors.dtype(name) == EIGHT_BIT_FLOAT}

    def _matrix(self, tensors: FolderTensors, name: str) -> ScaledMatrix:
        if name + SCALE not in tensors.names and name + SCALE_OF_OTHERS in tensors.names:
            return with_scales(tensors, name)
        if name + SCALE not in tensors.names:
            raise CheckpointError(f"{tensors.folder} lacks {name}{SCALE}, the scales of {name}. Download it again.")
        shape, scales, stored_as = tensors.shape(name), tensors.shape(name + SCALE), tensors.dtype(name + SCALE)
        if stored_as not in (*FLOATS, POWERS, *([EXPONENTS] if self.exponents else [])):
            raise CheckpointError(
                f"{tensors.folder}: {name}{SCALE} is stored as {stored_as}, no number"
                + ("." if self.exponents else f", and quantization_config.scale_fmt is not {_UE8M0}.")
            )
        if len(shape) != 2 or scales not in _scales_of(shape, self.block):
            raise CheckpointError(
                f"{tensors.folder}: {name} has the shape {list(shape)} and scales {list(scales)}, which do not fit "
                f"with quantization_config.weight_block_size={self.block and list(self.block)}. Use the model's "
                "unquantised folder."
            )
        tile = self.block or (shape[0], shape[1])
        found = Scales(ScaleNumbers(tensors.slice_of(name + SCALE)), tile, shape)
        return ScaledMatrix((name, name + SCALE), PlainNumbers(tensors.slice_of(name)), found, 8)


def _is_block(block: Any) -> bool:
    """Return whether this says how many rows and columns share a scale."""
    if block is None:
        return True
    return isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)


def _scales_of(shape: tuple[int, ...], block: tuple[int, int] | None) -> list[tuple[int, ...]]:
    return shapes_of_scales(shape, (shape[0], shape[1])) if block is None else shapes_of_scales(shape, block)[:1]


@dataclass(frozen=True)
class EightBitRowsOrWhole:
    """Matrices in eight bits with `weight_scale`: one for each row (FBGEMM), or one in all.

    Attributes:
        dtype: The dtype they have as plain numbers, as the safetensors format calls it.
    """

    dtype: str

    @classmethod
    def of(cls, found: Mapping[str, Any], dtype: str, source: str) -> EightBitRowsOrWhole:
        """Return what a `quantization_config` says: nothing that is needed."""
        return cls(dtype)

    def packed(self, tensors: FolderTensors) -> dict[str, ScaledMatrix]:
        """Return the matrices in eight bits among a folder's tensors, by name; see `Quantisation`."""
        names = [name for name in tensors.names if tensors.dtype(name) == EIGHT_BIT_FLOAT]
        return {name: with_scales(tensors, name) for name in names}


def with_scales(tensors: FolderTensors, name: str) -> ScaledMatrix:
    """Return a matrix in eight bits with a scale for each row, or one in all.

    Raises:
        CheckpointError: There are none, or they do not fit.
    """
    scale = name + SCALE_OF_OTHERS
    found = tensors.part(scale, *FLOATS, of=name)
    shape, scales = tensors.shape(name), tensors.shape(scale)
    if len(shape) == 2:
        for tile in ((shape[0], shape[1]), (1, shape[1])):
            if scales in shapes_of_scales(shape, tile):
                of_matrix = Scales(ScaleNumbers(found), tile, shape)
                return ScaledMatrix((name, scale), PlainNumbers(tensors.slice_of(name)), of_matrix, 8)
    raise tensors.error(
        name, f"has the shape {list(shape)} and scales {list(scales)}: neither one for each row nor one in all"
    )
