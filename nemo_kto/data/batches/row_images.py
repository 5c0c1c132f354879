"""Images on their way to a model: as it takes them, and where in a packed row they stand.

Shapes: `I` tokens of a row that stand for images, `T` tokens of the row, `p` tokens of one prompt.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_kto.data.batches.rotary_positions import rotary_positions


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image as a model takes it.

    Attributes:
        key: int64, equal for equal bytes of the file.
        num_tokens: How many tokens of the prompt stand for it.
        grid: Rows and columns of those tokens, where the model counts positions in both; None elsewhere.
        inputs: What the model's vision tower takes, name -> `[k, ...]`, to be joined with other images' along the
            first dimension; empty where nobody runs the tower.
    """

    key: int
    num_tokens: int
    grid: tuple[int, int] | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels between processes as bytes, see `KTOBatch`."""
        inputs = {name: of.numpy() for name, of in self.inputs.items()}
        return _picture_from_numbers, (self.key, self.num_tokens, self.grid, inputs)


@dataclass(frozen=True, slots=True, eq=False)
class RowImages:
    """The images of a packed row.

    Attributes:
        pictures: In the order of the row; one that two documents show is there twice. Always on the CPU.
        places: `[I]` int64, where in the row the tokens are that stand for images, on this rank.
        features: `[I]` int64, which of all pictures' features, laid end to end, each of them takes.
        starts: Where in the whole row, not this rank's part of it, the tokens of each picture begin, which follow one
            on another.
    """

    pictures: tuple[Picture, ...]
    places: Tensor
    features: Tensor
    starts: tuple[int, ...]

    def between(self, start: int, end: int) -> "RowImages":
        """Those whose tokens are in a part of the row, counted from its first token; pictures are those of the row."""
        mine = (self.places >= start) & (self.places < end)
        return replace(self, places=self.places[mine] - start, features=self.features[mine])


def images_of_row(
    prompts: Sequence[Tensor],
    lengths: Sequence[int],
    pictures: Sequence[Sequence[Picture]],
    *,
    image_token_id: int | None,
) -> tuple[RowImages | None, Tensor | None]:
    """Returns the images of a row and its rotary positions, see `PackedRow`; None where there are none.

    Args:
        prompts: The prompt [p] of each document.
        lengths: Tokens of each document.
        pictures: What each prompt shows, in order.
        image_token_id: The token that stands for what they show.
    """
    if not any(pictures):
        return None, None
    places = [_image_places(prompt, shown, image_token_id) for prompt, shown in zip(prompts, pictures, strict=True)]
    images = _row_images(pictures, places, list(itertools.accumulate(lengths, initial=0)))
    if images.pictures[0].grid is None:
        return images, None
    return images, torch.cat(list(map(_document_positions, lengths, pictures, places)), dim=1)


def _image_places(prompt: Tensor, pictures: Sequence[Picture], image_token_id: int | None) -> Tensor:
    """Where in a prompt the tokens are that stand for images: `[i]` int64."""
    if not pictures:
        return torch.empty(0, dtype=torch.int64)
    assert image_token_id is not None
    places: Tensor = (prompt == image_token_id).nonzero().flatten()
    number = sum(picture.num_tokens for picture in pictures)
    assert places.numel() == number, (places.numel(), number)
    return places


def _row_images(pictures: Sequence[Sequence[Picture]], places: Sequence[Tensor], starts: Sequence[int]) -> RowImages:
    in_row = torch.cat([inside + start for inside, start in zip(places, starts, strict=False)])
    shown = tuple(picture for of_document in pictures for picture in of_document)
    firsts = itertools.accumulate((picture.num_tokens for picture in shown[:-1]), initial=0)
    return RowImages(shown, in_row, torch.arange(in_row.numel()), tuple(in_row[list(firsts)].tolist()))


def _document_positions(length: int, pictures: Sequence[Picture], places: Tensor) -> Tensor:
    """See `rotary_positions`."""
    firsts = itertools.accumulate((picture.num_tokens for picture in pictures[:-1]), initial=0)
    grids = [picture.grid for picture in pictures]
    starts = [int(places[first]) for first in firsts] if grids else []
    return rotary_positions(length, [(start, grid) for start, grid in zip(starts, grids, strict=True) if grid])


def _picture_from_numbers(
    key: int, num_tokens: int, grid: tuple[int, int] | None, inputs: dict[str, np.ndarray]
) -> Picture:
    return Picture(key, num_tokens, grid, {name: torch.from_numpy(of) for name, of in inputs.items()})
