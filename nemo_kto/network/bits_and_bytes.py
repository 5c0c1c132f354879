"""Matrices that a folder stores as bitsandbytes does: NF4 and FP4 (arXiv 2305.14314), LLM.int8() (arXiv 2208.07339).

They are made plain numbers as they are read, the very ones that bitsandbytes makes, without bitsandbytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from nemo_kto.network.folder_tensors import FolderTensors
from nemo_kto.network.scaled import PlainNumbers, ScaledMatrix, ScaleNumbers, Scales, read_in_parts
from nemo_kto.runtime.layout import NF4_BLOCK

if TYPE_CHECKING:
    from nemo_kto.network.weight_rules import Region

TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204),
        -0.25,
    ),
}
"""Kind of four bits -> what each of their values stands for (`bitsandbytes.functional.get_4bit_type`).

Each folder has them too, in `quant_map`; bitsandbytes goes by the kind.
"""

_STATE = ".quant_state.bitsandbytes__"
"""What stands between the names of a matrix in four bits and of their kind, in that of what describes it."""
_MOST_BYTES = 4096
"""Most bytes of a description; it says a few numbers."""
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes knows of numbers that have a scale together."""
_STORAGE = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Dtypes that bytes are stored as, which is for FSDP, with the bytes of one."""
_EIGHT_BITS, _ROW_SCALES, _ORDER = "I8", "SCB", "weight_format"
_PART_OF_127 = 7.874015718698502e-3
"""What bitsandbytes multiplies with instead of dividing by 127."""


class ScalesOfScales(NamedTuple):
    """Scales of a matrix that are stored in eight bits.

    Attributes:
        codes: A byte for each.
        scales: What shares a scale in turn -> that, in float32.
        levels: What each byte stands for, in float32.
        offset: What is added.
        together: Scales that share one.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor
    offset: float
    together: int


@dataclass(frozen=True)
class BitsAndBytes:
    """How a folder stores its matrices; each says itself how.

    Attributes:
        dtype: The dtype they have as plain numbers, as the safetensors format calls it.
    """

    dtype: str

    @classmethod
    def of(cls, found: Mapping[str, Any], dtype: str, source: str) -> BitsAndBytes:
        """Return what a `quantization_config` says: nothing that is needed."""
        return cls(dtype)

    def packed(self, tensors: FolderTensors) -> dict[str, FourBitMatrix | EightBitRows]:
        """Return the matrices in fewer bits among a folder's tensors, by name; see `Quantisation`."""
        found: dict[str, FourBitMatrix | EightBitRows] = {}
        for name in tensors.names:
            matrix, state, kind = name.partition(_STATE)
            if state:
                found[matrix] = _four_bits(tensors, matrix, kind)
            elif tensors.dtype(name) == _EIGHT_BITS and name.endswith(".weight"):
                found[name] = _eight_bits(tensors, name)
        return found


def _four_bits(tensors: FolderTensors, name: str, kind: str) -> FourBitMatrix:
    described_in = f"{name}{_STATE}{kind}"
    if kind not in TABLES:
        raise tensors.error(described_in, f"is of the kind {kind}, and only {' and '.join(TABLES)} are known")
    state = _description(tensors, described_in, name)
    rows, columns = state["shape"]
    size, block = rows * columns, state["blocksize"]
    blocks = -(-size // block)
    stored = tensors.part(name, *_STORAGE, of=name)
    table = tensors.part(f"{name}.quant_map", "F32", of=name)
    nested = f"{name}.nested_absmax" in tensors.names
    scales = [(f"{name}.absmax", ("U8",) if nested else ("F32", "F16", "BF16"), (blocks,))]
    if nested:
        of_scales = state["nested_blocksize"]
        scales += [
            (f"{name}.nested_absmax", ("F32",), (-(-blocks // of_scales),)),
            (f"{name}.nested_quant_map", ("F32",), (256,)),
        ]
    views = []
    for part, dtypes, shape in scales:
        views.append(tensors.part(part, *dtypes, of=name))
        if tensors.shape(part) != shape:
            raise tensors.error(
                part, f"has the shape {list(tensors.shape(part))}, and {rows} x {columns} numbers need {list(shape)}"
            )
    width, of_bytes = _STORAGE[tensors.dtype(name)], tensors.shape(name)
    if len(of_bytes) != 2 or of_bytes[1] != 1 or of_bytes[0] * width != -(-size // 2):
        raise tensors.error(name, f"has the shape {list(of_bytes)}, and {rows} x {columns} numbers do not fit")
    if tuple(table.get_shape()) != (16,) or not torch.allclose(table[...], torch.tensor(TABLES[kind]), atol=1e-6):
        raise tensors.error(f"{name}.quant_map", f"is not what {kind} stands for")
    return FourBitMatrix(
        parts=(name, described_in, f"{name}.quant_map", *(part for part, *_ in scales)),
        shape=(rows, columns),
        kind=kind,
        block=block,
        codes=stored,
        width=width,
        absmax=tuple(views),
        of_scales=state["nested_blocksize"] if nested else 0,
        offset=state["nested_offset"] if nested else 0.0,
    )


def _description(tensors: FolderTensors, described_in: str, name: str) -> dict[str, Any]:
    """Return what a folder says of a matrix in four bits, checked."""
    stored = tensors.part(described_in, "U8", of=name)
    if len(tensors.shape(described_in)) != 1 or tensors.shape(described_in)[0] > _MOST_BYTES:
        raise tensors.error(
            described_in, f"has the shape {list(tensors.shape(described_in))}, which is no description"
        )
    try:
        state = json.loads(bytes(stored[...].tolist()))
    except (ValueError, RecursionError) as error:
        raise tensors.error(described_in, f"is no JSON ({error})") from error
    nested = f"{name}.nested_absmax" in tensors.names
    shape = state.get("shape") if isinstance(state, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_size(size) for size in shape):
        raise tensors.error(described_in, f"says the shape {shape}, which is none of a matrix")
    if state.get("blocksize") not in _BLOCKS:
        raise tensors.error(described_in, f"says the blocksize {state.get('blocksize')}, and known are {_BLOCKS}")
    if nested and not _is_size(state.get("nested_blocksize")):
        raise tensors.error(described_in, f"says the nested_blocksize {state.get('nested_blocksize')}")
    offset = state.get("nested_offset")
    if nested and not (isinstance(offset, int | float) and math.isfinite(offset)):
        raise tensors.error(described_in, f"says the nested_offset {offset}")
    return dict(state)


def _is_size(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and found > 0


@dataclass(frozen=True, kw_only=True)
class FourBitMatrix:
    """A matrix in NF4 or FP4; see `quantised.PackedTensor`.

    Its numbers lie one behind the other, row by row, and so do the blocks that have a scale: one may begin in a row
    and end in the next.

    Attributes:
        parts: Names of the tensors it is stored in.
        shape: Its shape.
        kind: What four bits stand for, see `TABLES`.
        block: Numbers that have a scale together.
        codes: Two numbers a byte, the first in the upper half, to be sliced.
        width: Bytes of what they are stored as.
        absmax: The scales; or bytes, their scales and what each byte stands for.
        of_scales: Scales that have a scale together; 0 where they are numbers themselves.
        offset: What is added to scales that are stored as bytes.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    block: int
    codes: Any
    width: int
    absmax: tuple[Any, ...]
    of_scales: int
    offset: float
    bits = 4

    def read(self, where: Region) -> torch.Tensor:
        """Return a block of it in float32."""
        return read_in_parts(where, self._read, read_columns=self.shape[1])

    def _read(self, where: Region) -> torch.Tensor:
        rows, columns = where
        first, last = rows.start * self.shape[1], rows.stop * self.shape[1]
        numbers = torch.tensor(TABLES[self.kind])[self._values(first, last).int()]
        scales = self._scales(first // self.block, -(-last // self.block)).repeat_interleave(self.block)
        numbers *= scales[first % self.block :][: last - first]
        return numbers.view(-1, self.shape[1])[:, columns]

    @property
    def kept_as(self) -> str | None:
        """The key of the format that has the very numbers; see `quantised.PackedTensor`."""
        return "nf4" if (self.kind, self.block) == ("nf4", NF4_BLOCK) and self.shape[1] % NF4_BLOCK == 0 else None

    def scales_of_scales(self) -> ScalesOfScales | None:
        """Return how its scales are stored; see `quantised.PackedTensor`."""
        if not self.of_scales:
            return None
        codes, scales, levels = (part[...] for part in self.absmax)
        return ScalesOfScales(codes, scales, levels, self.offset, self.of_scales)

    def _values(self, first: int, last: int) -> torch.Tensor:
        """Return the four bits of the numbers from `first` to `last`."""
        found = self._bytes(first // 2, -(-last // 2))
        return torch.stack([found >> 4, found & 15], dim=1).flatten()[first % 2 :][: last - first]

    def _bytes(self, first: int, last: int) -> torch.Tensor:
        """Return the bytes from `first` to `last`."""
        start = first // self.width
        found: torch.Tensor = self.codes[start : -(-last // self.width), :].flatten().view(torch.uint8)
        return found[first - start * self.width :][: last - first]

    def _scales(self, first: int, last: int) -> torch.Tensor:
        """Return the scales of the blocks from `first` to `last` in float32, as bitsandbytes has them."""
        found: torch.Tensor = self.absmax[0][first:last]
        if not self.of_scales:
            return found.float()
        start = first // self.of_scales
        scales = self.absmax[1][start : -(-last // self.of_scales)].repeat_interleave(self.of_scales)
        meanings: torch.Tensor = self.absmax[2][...]
        plain: torch.Tensor = meanings[found.int()] * scales[first - start * self.of_scales :][: last - first]
        return plain.add(self.offset)


def _eight_bits(tensors: FolderTensors, name: str) -> EightBitRows:
    module = name.rpartition(".")[0]
    stored = tensors.slice_of(name)
    scales = tensors.part(f"{module}.{_ROW_SCALES}", "F32", "F16", "BF16", of=name)
    shape = tensors.shape(name)
    if len(shape) != 2 or tensors.shape(f"{module}.{_ROW_SCALES}") not in ((shape[0],), (shape[0], 1)):
        raise tensors.error(
            name, f"has the shape {list(shape)} and scales {list(scales.get_shape())}, and each row needs one"
        )
    parts = [name, f"{module}.{_ROW_SCALES}"]
    if f"{module}.{_ORDER}" in tensors.names:
        parts.append(f"{module}.{_ORDER}")
        order = tensors.one(parts[-1], "U8", "I8", "I32", "I64", of=name)
        if order:
            raise tensors.error(parts[-1], f"is {order:g}, an order of a GPU's own, and only 0, row by row, is known")
    return EightBitRows(tuple(parts), PlainNumbers(stored), Scales(ScaleNumbers(scales), (1, shape[1]), shape), 8)


@dataclass(frozen=True)
class EightBitRows(ScaledMatrix):
    """A matrix in eight bits with a scale for each row, 127 times as large; see `ScaledMatrix`."""

    kept_as: ClassVar[str | None] = "int8"

    def _read(self, where: Region) -> torch.Tensor:
        return super()._read(where) * _PART_OF_127
