"""Matrices that a folder stores as compressed-tensors does, the library of vLLM's LLM Compressor.

They are made plain numbers as they are read, the very ones that its `decompress` makes, without it. Which modules are
stored so, and how, the shapes and dtypes of their tensors say; `config_groups` says what there can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_kto.errors import ConfigError
from nemo_kto.network.folder_tensors import FolderTensors, beside
from nemo_kto.network.scaled import (
    EIGHT_BIT_FLOAT,
    EXPONENTS,
    FLOATS,
    Numbers,
    NumbersInBytes,
    NumbersInWords,
    PlainNumbers,
    ScaledMatrix,
    ScaleNumbers,
    Scales,
    shapes_of_scales,
)

_PACKED, _MXFP8, _NVFP4, _MXFP4 = "pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
_ONE_BY_ONE = ("float-quantized", "int-quantized", "naive-quantized", _MXFP8)
_FORMATS = (*_ONE_BY_ONE, _PACKED, _NVFP4, _MXFP4)
"""Formats that are read; others have their zeros taken out, or are put into an order of a GPU's own."""
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_STRUCTURES = (None, "unstructured", "0:0")
"""What `sparsity_config` says of zeros that nobody made: how many there happened to be."""
_UNQUANTISED = "Use the model's unquantised folder."


@dataclass(frozen=True)
class Scheme:
    """How modules are stored.

    Attributes:
        format: One of `_FORMATS`.
        kind: `int` or `float`.
        bits: Bits of a number.
        strategy: What has a scale together, one of `_STRATEGIES`.
        share: Columns of a group, or rows and columns of a block; None for neither.
        symmetric: Whether the numbers are as they are, without zero points.
    """

    format: str
    kind: str
    bits: int
    strategy: str
    share: tuple[int, int] | None
    symmetric: bool

    def tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the rows and columns of a matrix that have a scale together."""
        if self.strategy == "tensor":
            return (shape[0], shape[1])
        return self.share or (1, shape[1])


@dataclass(frozen=True)
class CompressedTensors:
    """How a folder stores its matrices.

    Attributes:
        schemes: What there can be.
        dtype: The dtype they have as plain numbers, as the safetensors format calls it.
    """

    schemes: tuple[Scheme, ...]
    dtype: str

    @classmethod
    def of(cls, found: Mapping[str, Any], dtype: str, source: str) -> CompressedTensors | None:
        """Return what a `quantization_config` says; None for what cannot be understood.

        Raises:
            ConfigError: It is another kind; the message begins with `source`.
        """
        for name in ("sparsity_config", "transform_config"):
            if found.get(name) and not (name == "sparsity_config" and _is_dense(found[name])):
                raise ConfigError(f"{source}.{name}={found[name]} is not supported. {_UNQUANTISED}")
        groups = found.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            return None
        schemes = []
        for name, group in groups.items():
            form = group.get("format") or found.get("format")
            if group.get("weights") is None:
                continue  # its modules compute in fewer bits, and are not stored so
            if form not in _FORMATS:
                raise ConfigError(
                    f"{source}.config_groups.{name}: the format {form} is not supported, only {', '.join(_FORMATS)}. "
                    f"{_UNQUANTISED}"
                )
            schemes.append(_scheme(group["weights"], form, f"{source}.config_groups.{name}.weights"))
        return cls(tuple(dict.fromkeys(schemes)), dtype)

    def packed(self, tensors: FolderTensors) -> dict[str, ScaledMatrix]:
        """Return the matrices in fewer bits among a folder's tensors, by name; see `Quantisation`."""
        found = {}
        for name in tensors.names:
            module, _, own = name.rpartition(".")
            if own == "weight_g_idx":
                raise tensors.error(name, "puts columns into groups in an order of their own, which is not supported")
            if own == "weight_packed" or (own == "weight" and tensors.dtype(name) in (EIGHT_BIT_FLOAT, "I8")):
                found[f"{module}.weight"] = self._matrix(tensors, module, name)
            elif own == "weight" and tensors.dtype(name) in FLOATS and f"{module}.weight_scale" in tensors.names:
                raise tensors.error(
                    name, "has weight_scale, and is not compressed: a model that was being calibrated cannot be read"
                )
        return found

    def _matrix(self, tensors: FolderTensors, module: str, name: str) -> ScaledMatrix:
        """Return the matrix that a module stores as `name`, and what is beside it."""
        scale = f"{module}.weight_scale"
        scales = tensors.part(scale, *FLOATS, EIGHT_BIT_FLOAT, EXPONENTS, of=name)
        tried = []
        with_zeros = f"{module}.weight_zero_point" in tensors.names
        for scheme in sorted(
            self.schemes, key=lambda each: each.symmetric == with_zeros
        ):  # those that agree come first
            numbers = _numbers(tensors, module, name, scheme)
            if numbers is None:
                continue
            tile = scheme.tile(numbers.shape)
            wanted = shapes_of_scales(numbers.shape, tile)
            if tensors.shape(scale) in wanted:
                of_all = f"{module}.weight_global_scale"
                divisor = tensors.one(of_all, *FLOATS, of=name) if scheme.format == _NVFP4 else 1.0
                of_matrix = Scales(ScaleNumbers(scales), tile, numbers.shape, divisor=divisor)
                return ScaledMatrix(
                    (name, *beside(module, tensors.names, *_BESIDE)),
                    numbers,
                    of_matrix,
                    scheme.bits,
                    _zero_points(tensors, module, scheme, of_matrix),
                )
            tried.append(f"{list(wanted[0])} in {scheme.format}")
        fits = f"need scales of the shape {' or '.join(tried)}" if tried else "are not of its config_groups"
        raise tensors.error(
            name,
            f"({tensors.dtype(name)}, {list(tensors.shape(name))}) and {scale} ({scales.get_dtype()}, "
            f"{list(tensors.shape(scale))}) do not fit: such numbers {fits}",
        )


def _is_dense(sparsity: Any) -> bool:
    """Return whether zeros are stored as other numbers are, and nothing depends on where they are."""
    return (
        isinstance(sparsity, dict)
        and sparsity.get("format") == "dense"
        and sparsity.get("sparsity_structure") in _STRUCTURES
    )


_BESIDE = ("weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape")


def _scheme(weights: Any, form: str, source: str) -> Scheme:
    """Return what is said of a group's weights.

    Raises:
        ConfigError: It cannot be understood; the message begins with `source`.
    """
    fields = weights if isinstance(weights, dict) else {}
    bits, kind, strategy = fields.get("num_bits"), fields.get("type", "int"), fields.get("strategy")
    size, block = fields.get("group_size"), fields.get("block_structure")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if fields.get("actorder") in ("group", "dynamic", True):
        raise ConfigError(f"{source}.actorder={fields['actorder']} is not supported. {_UNQUANTISED}")
    share = None
    if strategy in ("group", "tensor_group"):
        share = (1, size)
    elif strategy == "block":
        if isinstance(block, str) and len(block) < 32:  # as it was written at first: 128x128
            block = [int(part) if part.isdecimal() else None for part in block.split("x")]
        share = tuple(block) if isinstance(block, list) and len(block) == 2 else (None, None)
    is_size = share is None or all(isinstance(each, int) and each > 0 for each in share)
    kinds = {_PACKED: ("int",), _NVFP4: ("float",), _MXFP4: ("float",)}.get(form, ("int", "float"))
    known_bits = (4,) if form in (_NVFP4, _MXFP4) else range(1, 9)
    if bits not in known_bits or kind not in kinds or strategy not in _STRATEGIES or not is_size:
        raise ConfigError(f"{source} is {weights}, and the format {form} cannot be read with these. {_UNQUANTISED}")
    return Scheme(form, kind, bits, strategy, share, fields.get("symmetric", True) is not False)  # type: ignore[arg-type]


def _numbers(tensors: FolderTensors, module: str, name: str, scheme: Scheme) -> Numbers | None:
    """Return the numbers that a module stores as `name`, if they can be of a scheme; None if not."""
    stored, stored_as, shape = tensors.slice_of(name), tensors.dtype(name), tensors.shape(name)
    scales = tensors.dtype(f"{module}.weight_scale")
    if len(shape) != 2:
        raise tensors.error(name, f"has the shape {list(shape)}, which is none of a matrix")
    if scheme.format == _PACKED and stored_as == "I32" and scales in FLOATS:
        plain = _shape_of_packed(tensors, module, name)
        words = -(-plain[1] * scheme.bits // 32)
        return NumbersInWords(stored, plain, scheme.bits) if shape == (plain[0], words) else None
    if scheme.format in (_NVFP4, _MXFP4) and stored_as == "U8":
        is_ours = scales == (EIGHT_BIT_FLOAT if scheme.format == _NVFP4 else EXPONENTS)
        return NumbersInBytes(stored) if is_ours else None
    if scheme.format in _ONE_BY_ONE and stored_as == ("I8" if scheme.kind == "int" else EIGHT_BIT_FLOAT):
        is_ours = scales == EXPONENTS if scheme.format == _MXFP8 else scales in FLOATS
        return PlainNumbers(stored) if is_ours else None
    return None


def _shape_of_packed(tensors: FolderTensors, module: str, name: str) -> tuple[int, int]:
    written = f"{module}.weight_shape"
    found = tensors.part(written, "I64", "I32", of=name)
    if tensors.shape(written) != (2,):
        raise tensors.error(written, f"has the shape {list(tensors.shape(written))}, and should be two numbers")
    rows, columns = found[...].tolist()
    if rows != tensors.shape(name)[0] or columns < 1:
        raise tensors.error(written, f"says {rows} x {columns}, and {name} has the shape {list(tensors.shape(name))}")
    return rows, columns


_PLAIN_ZEROS = ("I8", "I32", "I64", EIGHT_BIT_FLOAT, *FLOATS)


def _zero_points(tensors: FolderTensors, module: str, scheme: Scheme, scales: Scales) -> Scales | None:
    """Return what is taken off a matrix' numbers before they are scaled."""
    name = f"{module}.weight_zero_point"
    # the library takes none off pairs either; those of symmetric ones, which early versions wrote, are all zero
    if scheme.format in (_NVFP4, _MXFP4) or (scheme.symmetric and name not in tensors.names):
        return None
    packed = scheme.format == _PACKED and scheme.strategy in ("group", "channel") and not scheme.symmetric
    stored = tensors.part(name, *(("I32",) if packed else _PLAIN_ZEROS), of=f"{module}.weight")
    wanted = shapes_of_scales(scales.shape, scales.tile)
    if packed:
        rows, columns = wanted[0]
        wanted = [(-(-rows * scheme.bits // 32), columns)]
    if tensors.shape(name) not in wanted:
        raise tensors.error(name, f"has the shape {list(tensors.shape(name))}, and should have {list(wanted[0])}")
    return Scales(ScaleNumbers(stored, packed=scheme.bits if packed else None), scales.tile, scales.shape)
