"""Matrices that a folder stores in eight bits, with a scale for each block or one in all (DeepSeek-V3, section 3.3).

They are made plain numbers as they are read: `weight * weight_scale_inv`, as transformers' `Fp8Dequantize` does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_kto.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

    from nemo_kto.network.weight_rules import Region

STORED_AS = "F8_E4M3"
"""What the safetensors format calls the dtype of such matrices."""
SCALE = "_scale_inv"
"""What the names of their scales end with, behind the matrix's own."""
BESIDE = ("activation_scale", "input_scale")
"""What stands beside a matrix for computing in eight bits, and means nothing without."""

_BLOCK = (128, 128)
_EXPONENTS = "ue8m0"
"""`scale_fmt` of scales that are powers of two, whatever they are stored as; DeepSeek-V3.1 has them in float32."""
_KNOWN = {"scale_fmt": ("float", _EXPONENTS), "expert_dtype": ("fp8",)}
"""Fields, with the values beside which matrices can be read, the default first."""
_NUMBERS = ("F64", "F32", "BF16", "F16", "F8_E8M0")
"""Dtypes of scales that are numbers themselves."""
_BYTES = "U8"
"""Dtype of scales of which only the exponents are there, as float32 has them."""
_BIAS = 127


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
    name = "eight bits"

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
        return cls(size, found.get("scale_fmt") == _EXPONENTS, dtype)

    def packed(self, names: Collection[str], slice_of: Callable[[str], Any], folder: str) -> dict[str, EightBitMatrix]:
        """Return the matrices in eight bits among a folder's tensors, by name; see `Quantisation`."""
        found = {}
        for name in names:
            stored = slice_of(name)
            if stored.get_dtype() != STORED_AS:
                continue
            if name + SCALE not in names:
                raise CheckpointError(f"{folder} lacks {name}{SCALE}, the scales of {name}. Download it again.")
            scales = slice_of(name + SCALE)
            if scales.get_dtype() not in (*_NUMBERS, *([_BYTES] if self.exponents else [])):
                raise CheckpointError(
                    f"{folder}: {name}{SCALE} is stored as {scales.get_dtype()}, no number"
                    + ("." if self.exponents else f", and quantization_config.scale_fmt is not {_EXPONENTS}.")
                )
            self._check(f"{folder}: {name}", tuple(stored.get_shape()), tuple(scales.get_shape()))
            module = name.rpartition(".")[0]
            others = (name + SCALE, *(f"{module}.{beside}" for beside in BESIDE))
            parts = (name, *(other for other in others if other in names))
            found[name] = EightBitMatrix(parts, stored, scales, self.block)
        return found

    def _check(self, place: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> None:
        """Raise a CheckpointError, which begins with `place`, unless scales of a shape can be those of a matrix."""
        if self.block is None:
            wanted = [(), (1,), (1, 1)]
        else:
            wanted = [tuple(-(-size // step) for size, step in zip(shape, self.block, strict=False))]
        if len(shape) != 2 or scales not in wanted:
            raise CheckpointError(
                f"{place} has the shape {list(shape)} and scales {list(scales)}, which do not fit with "
                f"quantization_config.weight_block_size={self.block and list(self.block)}. Use the model's "
                "unquantised folder."
            )


@dataclass(frozen=True)
class EightBitMatrix:
    """A matrix in eight bits; see `quantised.PackedTensor`.

    Attributes:
        parts: Names of the tensors it is stored in.
        stored: The matrix, to be sliced.
        scales: Its scales, to be sliced.
        block: See `EightBits`.
    """

    parts: tuple[str, ...]
    stored: Any
    scales: Any
    block: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.stored.get_shape())

    def read(self, where: Region) -> torch.Tensor:
        """Return a block of it in float32."""
        block: torch.Tensor = self.stored[where].float()
        if self.block is None:
            return block * _numbers(self.scales[...]).reshape(())
        (high, wide), offsets = self.block, []
        tiles = []
        for place, step in ((where[0], high), (where[1], wide)):
            first = place.start // step
            tiles.append(slice(first, -(-place.stop // step)))
            offsets.append(slice(place.start - first * step, place.stop - first * step))
        factors = _numbers(self.scales[tuple(tiles)]).repeat_interleave(high, 0).repeat_interleave(wide, 1)
        return block * factors[offsets[0], offsets[1]]


def _numbers(scales: torch.Tensor) -> torch.Tensor:
    """Return scales in float32; bytes are exponents."""
    numbers = scales.float()
    return numbers if scales.is_floating_point() else (numbers - _BIAS).exp2()


def _is_block(block: Any) -> bool:
    """Return whether this says how many rows and columns share a scale."""
    if block is None:
        return True
    return isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
