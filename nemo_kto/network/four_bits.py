"""Experts that a folder stores in four bits, 32 of which share an exponent (MXFP4, OCP Microscaling Formats 1.0).

They are made plain numbers as they are read, the very ones that transformers' `Mxfp4Dequantize` makes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_kto.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from nemo_kto.network.weight_rules import Region

BLOCKS, SCALES = "_blocks", "_scales"
"""What the names of what is stored of a tensor end with, behind its own."""

_SHARE = 32
"""Numbers that share an exponent: neighbouring input channels."""
_BIAS = 127
"""What is stored of an exponent is so much more."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What three bits mean: an exponent of two bits and one of the fraction (section 5.3.3); the fourth is the sign."""


@dataclass(frozen=True)
class FourBits:
    """How a folder stores its experts.

    Attributes:
        dtype: The dtype they have as plain numbers, as the safetensors format calls it.
    """

    dtype: str
    name = "four bits"

    @classmethod
    def of(cls, found: Mapping[str, Any], dtype: str, source: str) -> FourBits:
        """Return what a `quantization_config` says, which is nothing more."""
        return cls(dtype)

    def packed(self, names: Collection[str], slice_of: Callable[[str], Any], folder: str) -> dict[str, FourBitExperts]:
        """Return the experts in four bits among a folder's tensors, by name; see `Quantisation`."""
        found = {}
        for stored in names:
            name = stored.removesuffix(BLOCKS)
            if name == stored:
                continue
            if name + SCALES not in names:
                raise CheckpointError(f"{folder} lacks {name}{SCALES}, the exponents of {stored}. Download it again.")
            blocks, scales = slice_of(stored), slice_of(name + SCALES)
            shape, of_scales = tuple(blocks.get_shape()), tuple(scales.get_shape())
            dtypes = {blocks.get_dtype(), scales.get_dtype()}
            if dtypes != {"U8"} or len(shape) != 4 or shape != (*of_scales, _SHARE // 2):
                raise CheckpointError(
                    f"{folder}: {stored} ({blocks.get_dtype()}, {list(shape)}) and {name}{SCALES} "
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape `[e, inputs, outputs]`, as gpt-oss has it."""
        experts, outputs, groups, _ = self.blocks.get_shape()
        return (experts, groups * _SHARE, outputs)

    def read(self, where: Region) -> torch.Tensor:
        """Return a block of it in float32."""
        import torch

        experts, inputs, outputs = where
        first = inputs.start // _SHARE
        groups = slice(first, -(-inputs.stop // _SHARE))
        blocks, scales = self.blocks[experts, outputs, groups], self.scales[experts, outputs, groups]
        meanings = torch.tensor([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)])
        in_order = torch.stack([blocks & 15, blocks >> 4], dim=-1)  # the lower half of a byte comes first
        numbers = meanings[in_order.int()].flatten(-2)
        plain = torch.ldexp(numbers, (scales.int() - _BIAS)[..., None]).flatten(-2)
        return plain[..., inputs.start - first * _SHARE : inputs.stop - first * _SHARE].mT
