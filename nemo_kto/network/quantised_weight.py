"""Frozen weights in four or eight bits, which become plain numbers each time something is computed with them.

The formats are bitsandbytes': NF4, whose blocks of 64 input channels share a scale (QLoRA, arXiv 2305.14314, section
3), its scales in eight bits too if so wanted ("double quantization", ibid.), and rows of integers with a scale each
(LLM.int8(), arXiv 2208.07339, without its second matrix of outliers). A row's numbers depend on that row alone, and
with double quantisation on a matrix of the Hugging Face folder: so they are the same however a layout divides rows and
columns. bitsandbytes makes plain numbers of them. They are quantised by PyTorch's operators, as it does itself where
it has no library: its kernels for GPUs and for CPUs do not always round alike, and a run may go on, or be merged, on
the other device.

torchao has formats of both kinds too. But its NF4 always quantises scales as well, with statistics of whatever part of
a matrix it is given, which the layout would decide; and what transformers loads in four bits is bitsandbytes'.

Tensor legend: `o/i` output and input channels of a linear layer on this rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from nemo_kto.errors import ConfigError
from nemo_kto.network.bits_and_bytes import TABLES
from nemo_kto.runtime.bits import bitsandbytes
from nemo_kto.runtime.layout import NF4_BLOCK

SCALES_BLOCK = 256
"""Scales of a matrix, row by row, that share a scale of their own where they are quantised too."""

_LEAST = 1e-38
"""What stands for the greatest number of a block of zeros."""
_AT_ONCE = 1 << 24
"""Numbers of eight bits that are made plain together."""

Parts = dict[str, torch.Tensor]
"""What a weight is kept as; the first dimension of each is the weight's rows."""


class Format(Protocol):
    """How numbers are kept in fewer bits."""

    @property
    def whole_rows(self) -> bool:
        """Whether a row can only be quantised in whole."""

    def bytes_of(self, rows: int, columns: int) -> int:
        """Return what a matrix takes."""

    def empty(self, rows: int, columns: int) -> Parts:
        """Return the parts of a matrix, values still to be set, on the current device.

        Raises:
            ConfigError: A matrix with so many columns cannot be kept so.
        """

    def quantised(self, block: torch.Tensor) -> Parts:
        """Return the parts of rows; of those whose scales are quantised too, with plain `scales` instead."""

    def plain(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the rows that parts stand for."""


class Nf4:
    """Four bits for a number, whose levels are quantiles of the normal distribution, and a scale for 64 of them.

    Args:
        double: Whether scales are kept in eight bits.
    """

    whole_rows = False

    def __init__(self, *, double: bool) -> None:
        self.double = double

    def bytes_of(self, rows: int, columns: int) -> int:
        """See `Format`."""
        scales = columns // NF4_BLOCK
        return rows * (columns // 2 + (scales + 4 * (groups_of(scales) + 2) if self.double else 4 * scales))

    def empty(self, rows: int, columns: int) -> Parts:
        """See `Format`."""
        if columns % NF4_BLOCK:
            raise ConfigError(
                f"{NF4_BLOCK} input channels share a scale, and a linear layer has {columns} on each rank: this "
                "layout cannot have the base in nf4."
            )
        scales = columns // NF4_BLOCK
        parts = {"codes": torch.empty(rows, columns // 2, dtype=torch.uint8)}
        if not self.double:
            return parts | {"scales": torch.empty(rows, scales)}
        return parts | {
            "scale_codes": torch.empty(rows, scales, dtype=torch.uint8),
            "scale_scales": torch.empty(rows, groups_of(scales)),
            "scale_offset": torch.empty(rows, 1),
            "scale_place": torch.empty(rows, 1, dtype=torch.int32),
        }

    def quantised(self, block: torch.Tensor) -> Parts:
        """See `Format`."""
        blocks = block.float().unflatten(1, (-1, NF4_BLOCK))
        scales = blocks.abs().amax(-1)
        levels = torch.tensor(TABLES["nf4"], device=block.device)
        numbers = (blocks * (1 / scales.clamp(min=_LEAST))[..., None]).clamp_(-1, 1)
        values = torch.bucketize(numbers, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).flatten(1)
        return {"codes": (values[:, ::2] << 4) | values[:, 1::2], "scales": scales}

    def plain(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `Format`."""
        bitsandbytes()
        codes, scales = parts["codes"], self._scales(parts)
        shape = (len(codes), 2 * codes.shape[1])
        made: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes, scales.flatten(), NF4_BLOCK, "nf4", shape, dtype
        )
        return made

    def _scales(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scales `[o, i / 64]` float32."""
        if not self.double:
            return parts["scales"]
        codes = parts["scale_codes"]
        places = (parts["scale_place"] + torch.arange(codes.shape[1], device=codes.device)) // SCALES_BLOCK
        levels = scale_levels(codes.device)[codes.int()]
        return levels * parts["scale_scales"].gather(1, places) + parts["scale_offset"]


class Int8:
    """Eight bits for a number, and a scale for each row."""

    whole_rows = True

    def bytes_of(self, rows: int, columns: int) -> int:
        """See `Format`."""
        return rows * (columns + 4)

    def empty(self, rows: int, columns: int) -> Parts:
        """See `Format`."""
        return {"codes": torch.empty(rows, columns, dtype=torch.int8), "scales": torch.empty(rows)}

    def quantised(self, block: torch.Tensor) -> Parts:
        """See `Format`."""
        halves = block.half()
        scales = halves.abs().amax(1).float()
        codes = torch.round(halves * (127.0 / scales.clamp(min=_LEAST))[:, None]).to(torch.int8)
        return {"codes": codes, "scales": scales}

    def plain(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `Format`."""
        bitsandbytes()
        codes, scales = parts["codes"], parts["scales"]
        made = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        at_once = max(1, _AT_ONCE // max(1, codes.shape[1]))  # in float32, before they have the dtype
        for start in range(0, len(codes), at_once):
            rows = slice(start, start + at_once)
            made[rows] = torch.ops.bitsandbytes.int8_vectorwise_dequant.default(codes[rows], scales[rows])
        return made


FORMATS: dict[str, Format] = {"nf4": Nf4(double=False), "nf4_double": Nf4(double=True), "int8": Int8()}


def groups_of(scales: int) -> int:
    """Return how many blocks of scales so many of a row can lie in."""
    return (scales - 1 + SCALES_BLOCK - 1) // SCALES_BLOCK + 1


@functools.cache  # the host would wait for a copy in each product
def scale_levels(device: torch.device) -> torch.Tensor:
    """Return what the 256 codes of scales stand for, between -1 and 1 (arXiv 2110.02861, section 1.3)."""
    with _disable_current_modes():  # in a dry run, too, they are numbers
        levels: torch.Tensor = bitsandbytes().functional.create_dynamic_map().to(device)
    return levels


class QuantisedWeight(torch.Tensor):
    """A matrix in fewer bits that takes part in computations as the plain numbers it stands for.

    It has the shape and dtype of those. Rows can be sliced, and rows and columns exchanged, which gives views; each
    other operator gets plain numbers, made for it alone: autograd keeps the matrix in fewer bits, and the backward
    pass makes them again.

    Attributes:
        kind: Key of `FORMATS`.
        parts: What it is kept as.
        turned: Whether it is the transpose of what the parts stand for.
    """

    kind: str
    parts: Parts
    turned: bool

    @staticmethod
    def __new__(
        cls, kind: str, parts: Parts, columns: int, dtype: torch.dtype, *, turned: bool = False
    ) -> QuantisedWeight:
        """Return the matrix that `parts` are, with so many input channels."""
        codes = parts["codes"]
        shape = (columns, len(codes)) if turned else (len(codes), columns)
        made: QuantisedWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=codes.device
        )
        made.kind, made.parts, made.turned = kind, parts, turned
        return made

    @classmethod
    def empty(cls, kind: str, rows: int, columns: int, *, dtype: torch.dtype) -> QuantisedWeight:
        """Return a matrix whose values are still to be set; see `Format.empty`."""
        return cls(kind, FORMATS[kind].empty(rows, columns), columns, dtype)

    @property
    def format(self) -> Format:
        """How it is kept."""
        return FORMATS[self.kind]

    def plain(self) -> torch.Tensor:
        """Return the plain numbers."""
        made = self.format.plain(self.parts, self.dtype)
        return made.t() if self.turned else made

    def write(self, parts: Parts) -> None:
        """Take other values over, which are in the same format."""
        for name, part in self.parts.items():
            part.copy_(parts[name])

    def _nothing(self) -> torch.Tensor:
        """Return a tensor like the plain one, of which no number is to be looked at."""
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)

    def _with(self, parts: Parts, *, turned: bool | None = None) -> QuantisedWeight:
        columns, now = self.shape[0 if self.turned else 1], self.turned if turned is None else turned
        return QuantisedWeight(self.kind, parts, columns, self.dtype, turned=now)

    def __repr__(self, **kwargs: Any) -> str:
        return f"QuantisedWeight({self.kind}, {tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what is done to rows to the parts; let all else be done to plain numbers."""
        aten, first = torch.ops.aten, args[0] if args else None
        if isinstance(first, QuantisedWeight):
            if func is aten.detach.default:
                return first._with(first.parts)
            if func is aten.t.default:
                return first._with(first.parts, turned=not first.turned)
            rows = _ROWS.get(func)
            if rows is not None and not first.turned and (len(args) < rows or args[rows - 1] == 0):
                pieces = {name: func(part, *args[1:], **(kwargs or {})) for name, part in first.parts.items()}
                if isinstance(next(iter(pieces.values())), torch.Tensor):
                    return first._with(pieces)
                return [
                    first._with(dict(zip(pieces, each, strict=True))) for each in zip(*pieces.values(), strict=True)
                ]
        written = (argument for place, argument in enumerate(args) if _is_written(func, place))
        if any(isinstance(argument, QuantisedWeight) for argument in written):
            raise TypeError(f"{func} would change a weight in fewer bits, which only QuantisedWeight.write does.")
        numbers = QuantisedWeight._nothing if func in _LIKE else QuantisedWeight.plain
        plain = tree_map_only(QuantisedWeight, numbers, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def _is_written(func: Any, place: int) -> bool:
    """Return whether an operator writes into an argument."""
    alias = func._schema.arguments[place].alias_info
    return alias is not None and alias.is_write


_ROWS = {
    torch.ops.aten.slice.Tensor: 2,
    torch.ops.aten.split.Tensor: 3,
    torch.ops.aten.split_with_sizes.default: 3,
}
"""Operators that take rows -> where among their arguments the dimension is, which is 0 where it is left out."""

_LIKE = {
    getattr(torch.ops.aten, name).default
    for name in (
        "empty_like",
        "full_like",
        "new_empty",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones_like",
        "zeros_like",
    )
}
"""Operators that ask for shape, dtype and device only."""


@contextmanager
def weights_quantised(kind: str | None, classes: tuple[type, ...], *, until: type) -> Iterator[None]:
    """Keep weights of linear layers that are made inside a `with` block in fewer bits.

    Each is made as its layer makes it, and replaced at once: there is one at a time.

    Args:
        kind: Key of `FORMATS`; None to change nothing.
        classes: The layers' classes.
        until: Class of a module that, once it has been made, is the last with such layers: of what comes behind the
            transformer's layers nothing is kept in fewer bits.
    """
    if kind is None:
        yield
        return

    def replace(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> Any:
        if name != "weight" or parameter is None or not isinstance(module, classes):
            return None
        with torch.device(parameter.device):
            weight = QuantisedWeight.empty(kind, *parameter.shape, dtype=parameter.dtype)
        return torch.nn.Parameter(weight, requires_grad=False)

    def stop(module: torch.nn.Module, name: str, made: torch.nn.Module | None) -> None:
        if isinstance(made, until):
            hook.remove()

    hook = register_module_parameter_registration_hook(replace)
    stopping = register_module_module_registration_hook(stop)
    try:
        yield
    finally:
        hook.remove()
        stopping.remove()


@contextmanager
def plain_weights(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Give models plain weights, in the host's memory and still to be set, for those in fewer bits, inside a block."""
    layers: list[Any] = [
        module
        for model in models
        for module in model.modules()
        if isinstance(getattr(module, "weight", None), QuantisedWeight)
    ]
    before = [layer.weight for layer in layers]
    try:
        for layer in layers:
            weight = torch.empty(layer.weight.shape, dtype=layer.weight.dtype, device="cpu")
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.weight = weight
