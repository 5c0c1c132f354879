"""Matrices that a folder stores as torchao writes its tensors into safetensors files, which transformers does.

They are made plain numbers as they are read, the very ones that torchao makes, without torchao: what is in a file is a
few plain tensors for each, and a description in the file's header, JSON without anything that runs.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_kto.network.folder_tensors import FolderTensors
from nemo_kto.network.scaled import (
    EIGHT_BIT_FLOAT,
    FLOATS,
    Numbers,
    NumbersInBytes,
    PlainNumbers,
    ScaledMatrix,
    ScaleNumbers,
    Scales,
    shapes_of_scales,
)

_PLAIN = ("Tensor", "torch.Tensor")
_KINDS = {"Float8Tensor": 8, "Int8Tensor": 8, "IntxUnpackedToInt8Tensor": 8, "Int4Tensor": 4}
"""Classes of tensors that are read -> bits of a number; others are in an order of a GPU's own."""
_SIGNED = (*range(8), *range(-8, 0))
"""What four bits mean as a whole number with a sign."""
_WHOLE_NUMBERS = [f"int{bits}" for bits in range(1, 9)]
_BEFORE = "act_pre_scale"
_PARTS = ("qdata", "scale", "zero_point", "act_quant_scale", "act_quant_zero_point", _BEFORE)
"""What a tensor can be stored in; what goes into it is scaled with the last, and the two before are for computing."""


@dataclass(frozen=True)
class TorchAO:
    """How a folder stores its matrices; each says itself how.

    Attributes:
        dtype: The dtype they have as plain numbers, as the safetensors format calls it.
    """

    dtype: str

    @classmethod
    def of(cls, found: Mapping[str, Any], dtype: str, source: str) -> TorchAO:
        """Return what a `quantization_config` says: nothing that is needed."""
        return cls(dtype)

    def packed(self, tensors: FolderTensors) -> dict[str, ScaledMatrix]:
        """Return the matrices in fewer bits among a folder's tensors, by name; see `Quantisation`."""
        found = {}
        for name, text in tensors.metadata.items():
            if "." not in name:
                continue
            try:
                described = json.loads(text)
                kind, fields = described["_type"], described.get("_data")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise tensors.error(
                    name, f"is described in the file's header by no JSON of torchao's ({error!r})"
                ) from error
            if kind in _PLAIN:
                continue
            if not isinstance(kind, str) or kind not in _KINDS or not isinstance(fields, dict):
                raise tensors.error(name, f"is a {kind} of torchao, and only {', '.join(_KINDS)} can be read")
            found[name] = _matrix(tensors, name, kind, fields)
        return found


def _matrix(tensors: FolderTensors, name: str, kind: str, fields: Mapping[str, Any]) -> ScaledMatrix:
    """Return a matrix of a kind that has these `fields`."""
    module, _, own = name.rpartition(".")
    prefix = f"{module}._{own}_"
    parts = [f"{prefix}{part}" for part in _PARTS if f"{prefix}{part}" in tensors.names]
    if f"{prefix}{_BEFORE}" in parts:
        raise tensors.error(
            name, f"has {_BEFORE}, which scales what goes into it: plain numbers cannot stand for that"
        )
    in_pairs = kind == "Int4Tensor"
    stored = tensors.part(f"{prefix}qdata", *((EIGHT_BIT_FLOAT,) if kind == "Float8Tensor" else ("I8", "U8")), of=name)
    if len(stored.get_shape()) != 2:
        raise tensors.error(name, f"has the shape {list(stored.get_shape())}, which is none of a matrix")
    numbers: Numbers = NumbersInBytes(stored, _SIGNED) if in_pairs else PlainNumbers(stored)
    tile = _tile(fields.get("block_size"), numbers.shape)
    wanted = [] if tile is None else shapes_of_scales(numbers.shape, tile)
    read = []
    for part in ("scale", "zero_point") if f"{prefix}zero_point" in parts else ("scale",):
        found = tensors.part(f"{prefix}{part}", *FLOATS, *(("I8",) if part == "zero_point" else ()), of=name)
        shape = tensors.shape(f"{prefix}{part}")
        if tile is None or (shape[::-1] != wanted[0] if in_pairs else shape not in wanted):
            raise tensors.error(
                name,
                f"has the shape {list(numbers.shape)} and scales or zero points {list(shape)}, which do not fit with "
                f"its block_size {fields.get('block_size')}",
            )
        read.append(Scales(ScaleNumbers(found, turned=in_pairs), tile, numbers.shape))
    scales, zeros = read[0], read[1] if len(read) > 1 else None
    return ScaledMatrix(
        tuple(parts),
        numbers,
        scales,
        _bits(kind, fields),
        zero_points=None if in_pairs else zeros,
        offsets=zeros if in_pairs else None,
    )


def _tile(block: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the rows and columns that have a scale together, if `block` says so."""
    is_block = (
        isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
    )
    return (block[0], block[1]) if is_block and not any(map(operator.mod, shape, block)) else None


def _bits(kind: str, fields: Mapping[str, Any]) -> int:
    """Return the bits of a number; those of the one kind are fewer than what they are stored in."""
    meant = fields.get("target_dtype")
    named = str(meant.get("_data")) if isinstance(meant, dict) else ""
    return int(named[-1]) if named in _WHOLE_NUMBERS else _KINDS[kind]
