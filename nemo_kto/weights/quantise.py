"""From the tensors of a Hugging Face folder to weights in fewer bits, some rows at a time.

A matrix's numbers and scales are those that bitsandbytes makes of the folder's matrix, whatever the layout: of a row
whose numbers share a scale all is read, also where other ranks have the rest, and for scales of scales the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from nemo_kto.errors import CheckpointError
from nemo_kto.network.bits_and_bytes import ScalesOfScales
from nemo_kto.network.quantised_weight import (
    SCALES_BLOCK,
    Nf4,
    Parts,
    QuantisedWeight,
    groups_of,
    scale_levels,
)
from nemo_kto.network.sharded import Leaf
from nemo_kto.network.weight_rules import Layout, Piece, Reader, Region
from nemo_kto.runtime.layout import NF4_BLOCK

_AT_ONCE = 1 << 20
"""Most numbers of a matrix that are read in one go where only its scales are wanted."""


class Quantiser:
    """Fills a weight in fewer bits.

    Args:
        leaf: A block of it.
        layout: How the folder's tensors make it up.
        pieces: Those tensors.
        reader: Reads them.
        stored_scales: Returns how the scales of a tensor are stored, where it has some in eight bits, else None.
    """

    def __init__(
        self,
        leaf: Leaf,
        layout: Layout,
        pieces: Sequence[Piece],
        reader: Reader,
        stored_scales: Callable[[str], ScalesOfScales | None],
    ) -> None:
        self._columns = leaf.global_shape[1]
        self._layout, self._pieces, self._reader = layout, pieces, reader
        self._stored_scales = stored_scales
        self._tables: dict[Piece, _Scales] = {}

    def fill(self, weight: QuantisedWeight, region: Region) -> None:
        """Set rows of the weight, which lie at `region` of the full tensor.

        Raises:
            CheckpointError: A number is too large for the format.
        """
        kind = weight.format
        rows, columns = region
        wanted = slice(0, self._columns) if kind.whole_rows else columns
        block = self._layout.read(self._pieces, (rows, wanted), self._reader).to(weight.device)
        parts = kind.quantised(block)
        if kind.whole_rows:
            parts["codes"] = parts["codes"][:, columns]
        if not parts["scales"].isfinite().all():
            raise CheckpointError(
                f"{self._pieces[0].name} holds numbers that int8, whose rows are float16 before, cannot have. Use "
                "model.peft.quantize_base=nf4."
            )
        if isinstance(kind, Nf4) and kind.double:
            parts |= self._scales_of_scales(rows, columns, weight.device)
        weight.write(parts)

    def _scales_of_scales(self, rows: slice, columns: slice, device: torch.device) -> Parts:
        """Return what the scales of some rows are kept as, in the order of the full tensor's rows."""
        region = (rows, slice(columns.start // NF4_BLOCK, columns.stop // NF4_BLOCK))

        def read(name: str) -> torch.Tensor:
            def reader(piece: Piece, where: Region) -> torch.Tensor:
                return self._table(piece, device).parts(piece, where)[name]

            return self._layout.read(self._pieces, region, reader)

        return {name: read(name) for name in ("scale_codes", "scale_scales", "scale_offset", "scale_place")}

    def _table(self, piece: Piece, device: torch.device) -> _Scales:
        whole = _matrix_of(piece)
        if whole not in self._tables:
            stored = self._stored_scales(whole.name)
            self._tables[whole] = _Scales.as_stored(whole, stored, device) or _Scales.of(whole, self._reader, device)
        return self._tables[whole]


def _matrix_of(piece: Piece) -> Piece:
    """Return the folder's matrix that a piece is of; an expert in a tensor of all is a matrix of its own."""
    return Piece(piece.name, piece.tensor_shape) if _is_rows(piece) else piece


def _is_rows(piece: Piece) -> bool:
    """Return whether a piece is neighbouring rows of a tensor that is a single matrix."""
    return piece.stacked is None and not piece.transposed and piece.every == 1


@dataclass(frozen=True)
class _Scales:
    """The scales of a matrix in eight bits, as bitsandbytes' `quantize_4bit(compress_statistics=True)` makes them.

    Attributes:
        codes: `[rows, scales of a row]`.
        scales: Scale of each `SCALES_BLOCK` of them, row by row; some zeros behind.
        offset: Their mean, which was taken away.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def as_stored(cls, matrix: Piece, stored: ScalesOfScales | None, device: torch.device) -> _Scales | None:
        """Return those that the folder has, if it has them in this form."""
        rows, columns = matrix.shape
        number = rows * (columns // NF4_BLOCK)
        if stored is None or (stored.together, stored.codes.numel()) != (SCALES_BLOCK, number):
            return None
        if not torch.equal(stored.levels, scale_levels(stored.levels.device)):
            return None
        scales = stored.scales.to(device)
        return cls(stored.codes.to(device).view(rows, -1), _padded(scales, columns), scales.new_tensor(stored.offset))

    @classmethod
    def of(cls, matrix: Piece, reader: Reader, device: torch.device) -> _Scales:
        """Return them; the matrix is read to its end."""
        first = torch.cat([_largest(reader(matrix, region).to(device)) for region in _rows(matrix)])
        # the same on every device and for any number of threads, whose sums in float32 differ in their last bit
        offset = first.double().mean().float()
        codes, scales = _in_eight_bits((first - offset).flatten())
        return cls(codes.view_as(first), _padded(scales, matrix.shape[1]), offset)

    def parts(self, piece: Piece, where: Region) -> Parts:
        """Return what is kept of a piece's rows and scales.

        Args:
            piece: A piece of the matrix.
            where: Its rows, and which scales of each.
        """
        if _is_rows(piece):
            where = piece.within(where)
        rows, columns = where
        number, device = columns.stop - columns.start, self.codes.device
        first = torch.arange(rows.start, rows.stop, device=device)[:, None] * self.codes.shape[1] + columns.start
        groups = torch.arange(groups_of(number), device=device)
        return {
            "scale_codes": self.codes[rows, columns],
            "scale_scales": self.scales[first // SCALES_BLOCK + groups],
            "scale_offset": self.offset.expand(len(first), 1),
            "scale_place": (first % SCALES_BLOCK).int(),
        }


def _in_eight_bits(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest level of each number, beside the greatest of its block, and what is greatest in each.

    As bitsandbytes' `quantize_blockwise` for GPUs; its library for CPUs takes a neighbour of one level in 600.
    """
    missing = -len(numbers) % SCALES_BLOCK
    blocks = torch.nn.functional.pad(numbers, (0, missing)).view(-1, SCALES_BLOCK)
    scales = blocks.abs().amax(1)
    levels = scale_levels(numbers.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None], between)
    return codes.to(torch.uint8).flatten()[: len(numbers)], scales


def _padded(scales: torch.Tensor, columns: int) -> torch.Tensor:
    """Return scales with as many zeros behind as the last row of so many columns can ask for."""
    return torch.cat([scales, scales.new_zeros(groups_of(columns // NF4_BLOCK) + 1)])


def _rows(matrix: Piece) -> Iterator[Region]:
    """Yield all of a matrix, some rows at a time."""
    rows, columns = matrix.shape
    at_once = max(1, _AT_ONCE // columns)
    for start in range(0, rows, at_once):
        yield slice(start, min(start + at_once, rows)), slice(0, columns)


def _largest(block: torch.Tensor) -> torch.Tensor:
    """Return the scales of rows `[rows, columns / NF4_BLOCK]` float32: the greatest absolute numbers."""
    return block.float().unflatten(1, (-1, NF4_BLOCK)).abs().amax(-1)
