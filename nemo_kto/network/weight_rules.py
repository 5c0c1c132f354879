"""What a table consists of that ties Megatron's tensors to those of a Hugging Face folder.

A table is keyed by the names of `sharded.py`; a family's is in its file (`families/`), made of the parts in
`tables.py`. This module imports no torch: which tensors a folder has to hold is known without.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

Region = tuple[slice, ...]
"""A block of a full tensor, one slice with start and stop per dimension."""


@dataclass(frozen=True)
class Piece:
    """Rows of a Hugging Face tensor, one behind the other or taking turns with others, or all of it.

    Attributes:
        name: Name of the tensor; `{layer}` and `{expert}` stand for numbers from 0.
        shape: Shape of the piece.
        first_row: Where it begins in the tensor.
        total_rows: Rows of the tensor; None for those of the piece.
        every: Its rows are so many apart in the tensor: 1 for neighbours.
        transposed: Whether the tensor has columns for the rows that are meant here: input channels come first.
        stacked: Number of the matrices that the tensor holds one behind the other, one for each expert; None where it
            is a single matrix.
        place: Which of them this one is.
        elsewhere: Where other folders keep it, as transformers' own renaming has it.
        keeps_float32: Whether it is written in float32 whatever dtype the model is written in, as transformers does.
    """

    name: str
    shape: tuple[int, ...]
    first_row: int = 0
    total_rows: int | None = None
    every: int = 1
    transposed: bool = False
    stacked: int | None = None
    place: int = 0
    elsewhere: tuple[Piece, ...] = ()
    keeps_float32: bool = False

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        matrices = () if self.stacked is None else (self.stacked,)
        return (*matrices, *self._turned((self.total_rows or self.shape[0], *self.shape[1:])))

    def within(self, region: Region) -> Region:
        """Return where the block `region` of the piece lies in the tensor, with what lies between its rows."""
        rows, *rest = region
        matrices = () if self.stacked is None else (slice(self.place, self.place + 1),)
        start = rows.start * self.every + self.first_row
        stop = start if rows.stop == rows.start else (rows.stop - 1) * self.every + self.first_row + 1
        return (*matrices, *self._turned((slice(start, stop), *rest)))

    def taken_from(self, block: torch.Tensor) -> torch.Tensor:
        """Return the piece's own of what was read where `within` says."""
        matrix = block if self.stacked is None else block[0]
        return (matrix.mT if self.transposed else matrix)[:: self.every]

    def _turned(self, dimensions: tuple[Any, ...]) -> tuple[Any, ...]:
        return dimensions[::-1] if self.transposed else dimensions

    def at(self, layer: int | str, expert: int | str) -> Piece:
        """Return the piece of one layer and expert."""
        return replace(
            self,
            name=self.name.format(layer=layer, expert=expert),
            place=0 if self.stacked is None else int(expert),
            elsewhere=tuple(piece.at(layer, expert) for piece in self.elsewhere),
        )

    def found_among(self, names: Collection[str]) -> list[Piece]:
        """Return where a folder with tensors of these names keeps the piece: nowhere, once, or in several copies."""
        found = (
            replace(piece, name=name, elsewhere=())
            for piece in (self, *self.elsewhere)
            for name in spellings(piece.name)
            if name in names
        )
        return list(found)


_PREFIX = "model."


def spellings(name: str) -> tuple[str, ...]:
    """Return the names that transformers takes for `name`.

    Where a name has no place in the model, it adds the prefix, which is missing where a model was saved without its
    output layer, or takes it away.
    """
    return (name, name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else _PREFIX + name)


_WHOLE = "language_model."


def names_in_whole(name: str) -> tuple[str, ...]:
    """Return what the tensor `name` of a language model is called in a model with images that it is a part of.

    The first is the name that most are published with, the last that of Qwen2.5-VL; transformers 5 has the second.
    """
    if name.startswith(_PREFIX):
        return (_WHOLE + name, f"{_PREFIX}{_WHOLE}{name.removeprefix(_PREFIX)}", name)
    return (_WHOLE + name, name)


def is_of_language_model(name: str) -> bool:
    """Return whether a tensor of a model with images has a name of its language model."""
    return name.removeprefix(_PREFIX).startswith((_WHOLE, "lm_head.", "layers.", "embed_tokens.", "norm."))


def within_whole(rule: Rule) -> Rule:
    """Return the rule of a language model that is a part of a model with images."""
    return replace(rule, pieces=tuple(map(_piece_within_whole, rule.pieces)))


def _piece_within_whole(piece: Piece) -> Piece:
    places = [
        replace(place, name=name, elsewhere=())
        for place in (piece, *piece.elsewhere)
        for name in names_in_whole(place.name)
    ]
    return replace(places[0], elsewhere=tuple(places[1:]))


def stacked(name: str, *shapes: tuple[int, ...]) -> tuple[Piece, ...]:
    """Return the pieces of these `shapes` that make up the tensor `name`, one below the other."""
    ends = list(itertools.accumulate(shape[0] for shape in shapes))
    return tuple(Piece(name, shape, end - shape[0], ends[-1]) for shape, end in zip(shapes, ends, strict=True))


Reader = Callable[[Piece, Region], "torch.Tensor"]
"""Reads a block of a piece."""


class Layout(Protocol):
    """How pieces of Hugging Face tensors make up one Megatron tensor."""

    def read(self, pieces: Sequence[Piece], region: Region, reader: Reader) -> torch.Tensor:
        """Return the block `region` of the Megatron tensor, without its rows of padding.

        No more of the pieces is read than the block holds.
        """
        ...

    def split(self, full: torch.Tensor) -> list[torch.Tensor]:
        """Return the pieces, in their order, that make up the Megatron tensor `full`."""
        ...


@dataclass(frozen=True)
class Same:
    """One tensor, the same in both."""

    def read(self, pieces: Sequence[Piece], region: Region, reader: Reader) -> torch.Tensor:
        """Return the block as it is."""
        return reader(pieces[0], region)

    def split(self, full: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensor as it is."""
        return [full]


@dataclass(frozen=True)
class PaddedVocab:
    """One tensor with a row per token; Megatron's has rows of zeros behind the real ones.

    Attributes:
        vocab_size: Number of real rows.
    """

    vocab_size: int

    def read(self, pieces: Sequence[Piece], region: Region, reader: Reader) -> torch.Tensor:
        """Return the real rows of the block."""
        rows, *rest = region
        return reader(pieces[0], (slice(min(rows.start, self.vocab_size), min(rows.stop, self.vocab_size)), *rest))

    def split(self, full: torch.Tensor) -> list[torch.Tensor]:
        """Return the real rows."""
        return [full[: self.vocab_size]]


@dataclass(frozen=True)
class ByHead:
    """Tensors whose rows belong to heads; Megatron keeps those of each head of a kind together.

    So queries, keys and values become q..q k v | q..q k v | ..., one part per key/value head with its query heads.

    Attributes:
        rows: Rows that each of the tensors has for a head.
    """

    rows: tuple[int, ...]

    def read(self, pieces: Sequence[Piece], region: Region, reader: Reader) -> torch.Tensor:
        """Return the block, which holds whole heads, reading the rows of those heads of the pieces."""
        import torch  # weights are moved, a configuration is not judged

        rows, *rest = region
        of_head = sum(self.rows)
        first, last = rows.start // of_head, rows.stop // of_head
        assert (first * of_head, last * of_head) == (rows.start, rows.stop), (region, of_head)
        parts = []
        for piece, size in zip(pieces, self.rows, strict=True):
            part = reader(piece, (slice(first * size, last * size), *rest))
            parts.append(part.reshape(last - first, size, *part.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def split(self, full: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors."""
        by_head = full.reshape(-1, sum(self.rows), *full.shape[1:])
        return [part.flatten(0, 1) for part in by_head.split(self.rows, dim=1)]  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        key: Name of the Megatron tensor; `{layer}` and `{expert}` stand for numbers from 0.
        pieces: What it is made of.
        layout: How.
        layers: The layers that have it; for a name without `{layer}`, one number that does not matter.
        experts: Number of experts that have it; for a name without `{expert}`, 1.
    """

    key: str
    pieces: tuple[Piece, ...]
    layout: Layout = Same()
    layers: Sequence[int] = (0,)
    experts: int = 1

    def at(self, layer: int | str, expert: int | str) -> Rule:
        """Return the rule of one tensor."""
        pieces = tuple(piece.at(layer, expert) for piece in self.pieces)
        return Rule(self.key.format(layer=layer, expert=expert), pieces, self.layout)


_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def match(rules: Sequence[Rule], key: str) -> Rule:
    """Return the rule of the Megatron tensor `key`, with the numbers of layer and expert filled in.

    Raises:
        KeyError: The table has no rule for `key`: it does not describe this model.
    """
    layer, expert = _LAYER.search(key), _EXPERT.search(key)
    generic = _EXPERT.sub("{expert}", _LAYER.sub("{layer}", key))
    for rule in rules:
        if rule.key in (key, generic):
            return rule.at(layer[0] if layer else 0, expert[0] if expert else 0)
    raise KeyError(f"no rule for the Megatron tensor {key}")


def all_pieces(rules: Iterable[Rule]) -> Iterator[Piece]:
    """Yield every piece that a model is made of."""
    for rule in rules:
        for layer, expert in itertools.product(rule.layers, range(rule.experts)):
            yield from rule.at(layer, expert).pieces


def expected_shapes(rules: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a Hugging Face folder, by the name its family is published with."""
    return {piece.name: piece.tensor_shape for piece in all_pieces(rules)}
