"""Where a model with multimodal rotary embedding counts tokens: in time, in rows and in columns.

Text counts on in all three. The tokens of an image stand at one time, the next one, and at their rows and columns
counted from there; the text behind goes on where the longer side ends. It is the rule of transformers'
`Qwen2_5_VLModel.get_rope_index` for still images.

Shapes: `T` tokens of a document.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of the tokens that stand for an image."""


def rotary_positions(length: int, images: Iterable[tuple[int, Grid]]) -> Tensor:
    """Returns the positions of a document's tokens: `[3, T]` int64, in time, rows and columns.

    Args:
        length: Its tokens.
        images: Of each image, in order, where its first token is, and its grid.
    """
    parts: list[Tensor] = []
    done = position = 0
    for start, (rows, columns) in images:
        parts.append(_text(start - done, position))
        position += start - done
        grid = torch.meshgrid(*map(torch.arange, (1, rows, columns)), indexing="ij")
        parts.append(torch.stack([axis.reshape(-1) for axis in grid]) + position)
        position += max(rows, columns)
        done = start + rows * columns
    return torch.cat([*parts, _text(length - done, position)], dim=1)


def _text(length: int, position: int) -> Tensor:
    return torch.arange(position, position + length).expand(3, -1)
