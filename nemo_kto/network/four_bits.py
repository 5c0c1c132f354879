"""Experts that a folder stores in four bits, 32 of which share an exponent (MXFP4, OCP Microscaling Formats 1.0).

They are made plain numbers as they are read, the very ones that transformers' `Mxfp4Dequantize` makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nemo_kto.errors import CheckpointError
from nemo_kto.network.folder_tensors import FolderTensors
from nemo_kto.network.scaled import FOUR_BIT_FLOATS

if TYPE_CHECKING:
    from nemo_kto.network.weight_rules import Region

BLOCKS, SCALES = "_blocks", "_scales"
"""What the names of what is stored of a tensor end with, behind its own."""

_SHARE = 32
"""Numbers that share an exponent: neighbouring input channels."""
_BIAS = 127
"""What is stored of an exponent is so much more."""


@dataclass(frozen=True)
class FourBits:
    """How a folder stores its experts.

    Attributes:
        dtype: The dtype they have as plain numbers, as the safetensors format calls it.
    """

    dtype: str

    @classmethod
    def of(cls, found: Mapping[str, Any], dtype: str, source: str) -> FourBits:
        """Return what a `quantization_config` says, which is nothing more."""
        return cls(dtype)

    def packed(self, tensors: FolderTensors) -> dict[str, FourBitExperts]:
        """Return the experts in four bits among a folder's tensors, by name; see `Quantisation`."""
        found = {}
        for stored in tensors.names:
            name = stored.removesuffix(BLOCKS)
            if name == stored:
                continue
            if name + SCALES not in tensors.names:
                raise CheckpointError(
                    f"{tensors.folder} lacks {name}{SCALES}, the exponents of {stored}. Download it again."
                )
            blocks, scales = tensors.slice_of(stored), tensors.slice_of(name + SCALES)
            shape, of_scales = tuple(blocks.get_shape()), tuple(scales.get_shape())
            dtypes = {blocks.get_dtype(), scales.get_dtype()}
            if dtypes != {"U8"} or len(shape) != 4 or shape != (*of_scales, _SHARE // 2):
                raise CheckpointError(
                    f"{tensors.folder}: {stored} ({blocks.get_dtype()}, {list(shape)}) and {name}{SCALES} "
                    f"({scales.get_dtype()}, {list(of_scales)}) are not what experts in MXFP4 are stored in: bytes, "
                    f"{_SHARE // 2} of them to an exponent. Download the folder again."
                )
            found[name] = FourBitExperts((stored, name + SCALES), blocks, scales)
        return found


@dataclass(frozen=True)
class FourBitExperts:
    """A projection of all experts in four bits; see `quantised.PackedTensor`.

    Attributes:
        parts: Names of the tensors it is stored in.
        blocks: Two numbers a byte, `[e, outputs, inputs / 32, 16]`, to be sliced.
        scales: Exponents `[e, outputs, inputs / 32]`, to be sliced.
    """

    parts: tuple[str, ...]
    blocks: Any
    scales: Any
    bits = 4
    kept_as = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape `[e, inputs, outputs]`, as gpt-oss has it."""
        experts, outputs, groups, _ = self.blocks.get_shape()
        return (experts, groups * _SHARE, outputs)

    def read(self, where: Region) -> torch.Tensor:
        """Return a block of it in float32."""
        experts, inputs, outputs = where
        first = inputs.start // _SHARE
        groups = slice(first, -(-inputs.stop // _SHARE))
        blocks, scales = self.blocks[experts, outputs, groups], self.scales[experts, outputs, groups]
        meanings = torch.tensor(FOUR_BIT_FLOATS)
        in_order = torch.stack([blocks & 15, blocks >> 4], dim=-1)  # the lower half of a byte comes first
        numbers = meanings[in_order.int()].flatten(-2)
        plain = torch.ldexp(numbers, (scales.int() - _BIAS)[..., None]).flatten(-2)
        return plain[..., inputs.start - first * _SHARE : inputs.stop - first * _SHARE].mT

    def scales_of_scales(self) -> None:
        """Return nothing, as its scales are numbers; see `quantised.PackedTensor`."""
