"""Matrices that a folder stores as small numbers with scales, which most kinds of quantisation do in their own names.

A number is `(stored - zero point) * scale`; those of a tile, some rows and columns, have a scale and a zero point
together. Any form of numbers, `Numbers`, can go with any form of scales, `Scales`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemo_kto.network.weight_rules import Region

FLOATS = ("F64", "F32", "BF16", "F16")
"""Dtypes of scales that are numbers themselves."""
EIGHT_BIT_FLOAT = "F8_E4M3"
"""What the safetensors format calls the floating-point numbers in eight bits that weights are stored in."""
POWERS = "F8_E8M0"
"""The dtype of scales that are powers of two, as such."""
EXPONENTS = "U8"
"""The dtype of scales of which only the exponents are there, as float32 has them."""

_BIAS = 127
"""What is stored of an exponent is so much more."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What three bits mean: an exponent of two bits and one of the fraction (OCP Microscaling Formats 1.0, 5.3.3)."""
FOUR_BIT_FLOATS = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
"""What four bits mean: the first is the sign."""
_AT_ONCE = 1 << 22
"""Most numbers that are made in one go."""
_WORD = 32
"""Bits of the whole numbers that others are packed into."""


class Numbers(Protocol):
    """The numbers of a matrix as they are stored, before scales."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""

    def read(self, where: Region) -> torch.Tensor:
        """Return a block of them in float32."""


@dataclass(frozen=True)
class PlainNumbers:
    """Numbers that are stored one by one.

    Attributes:
        stored: To be sliced.
    """

    stored: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return tuple(self.stored.get_shape())

    def read(self, where: Region) -> torch.Tensor:
        """Return a block of them in float32."""
        block: torch.Tensor = self.stored[where].float()
        return block


@dataclass(frozen=True)
class NumbersInBytes:
    """Two numbers of four bits in a byte, the first in its lower half.

    Attributes:
        stored: Bytes `[rows, columns / 2]`, to be sliced.
        meanings: What each of the sixteen values stands for.
    """

    stored: Any
    meanings: tuple[float, ...] = FOUR_BIT_FLOATS

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        rows, columns = self.stored.get_shape()
        return (rows, 2 * columns)

    def read(self, where: Region) -> torch.Tensor:
        """Return a block of them in float32."""
        rows, columns = where
        first = columns.start // 2
        block = self.stored[rows, first : -(-columns.stop // 2)].view(torch.uint8)
        meanings = torch.tensor(self.meanings)
        numbers: torch.Tensor = meanings[torch.stack([block & 15, block >> 4], dim=-1).int()].flatten(-2)
        return numbers[:, columns.start - 2 * first : columns.stop - 2 * first]


@dataclass(frozen=True)
class NumbersInWords:
    """Whole numbers of a few bits, one behind the other in words of 32 bits, the first in the lowest.

    Zero is in the middle of what they can be. One that meets the end of a word goes on in the next.

    Attributes:
        stored: Words `[rows, columns * bits / 32]`, to be sliced.
        shape: Shape of the matrix.
        bits: Bits of a number.
    """

    stored: Any
    shape: tuple[int, ...]
    bits: int

    def read(self, where: Region) -> torch.Tensor:
        """Return a block of them in float32."""
        rows, columns = where
        first = columns.start * self.bits // _WORD
        words = self.stored[rows, first : -(-columns.stop * self.bits // _WORD)]
        places = torch.arange(columns.start, columns.stop) * self.bits - first * _WORD
        return unpacked(words, places, self.bits)


def unpacked(words: torch.Tensor, places: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the numbers that begin at some bits of the rows of words, in float32.

    Args:
        words: Words `[rows, words]` of 32 bits.
        places: First bits `[numbers]`, counted from the first word's lowest.
        bits: Bits of a number.
    """
    words = torch.cat([words, words[:, -1:]], dim=1).long() & (2**_WORD - 1)  # what ends with its word has a next too
    index = places // _WORD
    both = words[:, index] | (words[:, index + 1] << _WORD)
    numbers: torch.Tensor = (both >> (places % _WORD)) & (2**bits - 1)
    return numbers.sub(2 ** (bits - 1)).float()


@dataclass(frozen=True)
class Scales:
    """A number for each tile of a matrix: its scale, or its zero point.

    Attributes:
        numbers: One for each tile, `[rows, columns]` of tiles.
        tile: Rows and columns that have one together.
        shape: Shape of the matrix.
        factor: What all are multiplied with.
        divisor: What all are divided by.
    """

    numbers: ScaleNumbers
    tile: tuple[int, int]
    shape: tuple[int, ...]
    factor: float = 1.0
    divisor: float = 1.0

    def read(self, where: Region) -> torch.Tensor:
        """Return those of the numbers of a block, in float32: of its shape, or to be broadcast to it."""
        parts, widths, offsets = [], [], []
        for place, step, size in zip(where, self.tile, self.shape, strict=True):
            step = max(1, min(step, size))
            first = place.start // step
            parts.append(slice(first, -(-place.stop // step)))
            widths.append(1 if step == size else step)
            offsets.append(
                slice(None) if widths[-1] == 1 else slice(place.start - first * step, place.stop - first * step)
            )
        found = self.numbers.read((parts[0], parts[1]))
        for dimension, width in enumerate(widths):
            if width > 1:
                found = found.repeat_interleave(width, dimension)
        found = found[offsets[0], offsets[1]]
        if self.factor != 1.0:
            found = found * self.factor
        return found if self.divisor == 1.0 else found / self.divisor


@dataclass(frozen=True)
class ScaleNumbers:
    """Numbers of tiles as they are stored.

    Attributes:
        stored: To be sliced: `[rows, columns]` of tiles, or without a dimension of which there is one.
        packed: Bits of a number where they are packed into words along the rows; None for others.
        turned: Whether it is `[columns, rows]`.
    """

    stored: Any
    packed: int | None = None
    turned: bool = False

    def read(self, tiles: tuple[slice, slice]) -> torch.Tensor:
        """Return those of some tiles in float32, `[rows, columns]`."""
        rows, columns = tiles
        if self.packed is not None:
            first = rows.start * self.packed // _WORD
            words = self.stored[first : -(-rows.stop * self.packed // _WORD), columns]
            places = torch.arange(rows.start, rows.stop) * self.packed - first * _WORD
            return unpacked(words.mT, places, self.packed).mT
        dimensions = len(self.stored.get_shape())
        if dimensions == 2:
            found = self.stored[columns, rows].mT if self.turned else self.stored[rows, columns]
        else:
            found = self.stored[rows][:, None] if dimensions else self.stored[...].reshape(1, 1)
        numbers: torch.Tensor = found.float()
        is_exponent = self.stored.get_dtype() == EXPONENTS
        return torch.ldexp(torch.ones(()), numbers.int() - _BIAS) if is_exponent else numbers


def shapes_of_scales(shape: tuple[int, ...], tile: tuple[int, int]) -> list[tuple[int, ...]]:
    """Return the shapes that scales may have, one for each tile of a matrix."""
    rows, columns = (-(-size // max(1, step)) for size, step in zip(shape, tile, strict=True))
    found: list[tuple[int, ...]] = [(rows, columns)]
    if columns == 1:
        found.append((rows,))
        if rows == 1:
            found.append(())
    return found


def read_in_parts(
    where: Region, read: Callable[[Region], torch.Tensor], *, read_columns: int | None = None
) -> torch.Tensor:
    """Return a block of a matrix in float32, made some rows at a time: on the way numbers take more room than that.

    Args:
        where: The block.
        read: Returns a block of fewer rows.
        read_columns: Columns that are read for the block; None for its own.
    """
    rows, columns = where
    wide = columns.stop - columns.start if read_columns is None else read_columns
    at_once = max(1, _AT_ONCE // max(1, wide))
    block = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
    for start in range(rows.start, rows.stop, at_once):
        stop = min(start + at_once, rows.stop)
        block[start - rows.start : stop - rows.start] = read((slice(start, stop), columns))
    return block


@dataclass(frozen=True)
class ScaledMatrix:
    """A matrix of small numbers with scales; see `quantised.PackedTensor`.

    Attributes:
        parts: Names of the tensors it is stored in.
        numbers: Its numbers.
        scales: Their scales.
        bits: Bits of a number.
        zero_points: What is taken off the numbers first.
        offsets: What is added to the products.
    """

    parts: tuple[str, ...]
    numbers: Numbers
    scales: Scales
    bits: int
    kept_as: ClassVar[str | None] = None
    zero_points: Scales | None = None
    offsets: Scales | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.numbers.shape

    def read(self, where: Region) -> torch.Tensor:
        """Return a block of it in float32."""
        return read_in_parts(where, self._read)

    def _read(self, where: Region) -> torch.Tensor:
        block = self.numbers.read(where)
        if self.zero_points is not None:
            block = block - self.zero_points.read(where)
        block = block * self.scales.read(where)
        return block if self.offsets is None else block + self.offsets.read(where)

    def scales_of_scales(self) -> None:
        """Return nothing, as its scales are numbers; see `quantised.PackedTensor`."""
