"""What is kept of documents that go on, for passes that compute their newest tokens only.

Tensor legend: `T` tokens of a packed row, `b` documents whose keys and values are kept, `m` tokens of the longest of
them, `g` key/value heads of this rank, `d` channels of a head, of a key and of a value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

_MORE_ROOM = 64
"""Fewest tokens by which the memory for keys and values grows."""


class KeyValueCache:
    """Keys and values of a row's documents, kept so that a document can go on by computing its newest token only.

    A layer of linear attention keeps states instead, see `hold`.

    The first pass takes whole documents, every later one the newest token of each. What comes in a row behind the `b`
    documents only fills it up; nothing of it is kept. With context parallelism each rank has its heads of all tokens.
    """

    def __init__(self) -> None:
        # layer -> keys and values [b, g, room, d], or states
        self._stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._lengths: list[int] = []
        self._newest = torch.empty(0, dtype=torch.int64)

    def begin(self, lengths: Sequence[int], device: torch.device) -> None:
        """Prepare for a pass after which the documents have `lengths`, its own tokens included, on `device`."""
        self._lengths = list(lengths)
        self._newest = torch.tensor(self._lengths, dtype=torch.int64, device=device) - 1

    def keep(self, documents: Sequence[int]) -> None:
        """Forget all documents but those with these numbers, ascending, counted from 0 in the row."""
        chosen = torch.tensor(documents, dtype=torch.int64, device=self._newest.device)
        self._stored = {layer: (keys[chosen], values[chosen]) for layer, (keys, values) in self._stored.items()}

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self._lengths)

    def hold(self, layer: int, states: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Keep a layer's states of all documents, `[b, ...]` each, in the place of those before."""
        self._stored[layer] = states

    def held(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `hold` was last given for the layer, of the documents that are left."""
        return self._stored[layer]

    def holds(self, layer: int) -> bool:
        """Return whether the layer with this number has had its first pass."""
        return layer in self._stored

    def start(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a layer's keys and values of whole documents, `[T, g, d]` each."""
        self._stored[layer] = (self._by_document(key), self._by_document(value))

    def _by_document(self, row: torch.Tensor) -> torch.Tensor:
        """Return `[b, g, m, d]` from the documents' tokens one behind the other, `[T, g, d]`."""
        _, heads, channels = row.shape
        # zeros, as memory behind a document's end is read and then masked: zero times NaN would be NaN
        stored = row.new_zeros(len(self._lengths), heads, max(self._lengths, default=0), channels)
        end = 0
        for document, length in enumerate(self._lengths):
            start, end = end, end + length
            stored[document, :, :length] = row[start:end].transpose(0, 1)
        return stored

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values `[b, g, m, d]` of all tokens, those of each document's newest one added.

        Args:
            layer: Number of the layer.
            key: `[T, g, d]`, of which the first `b` are the documents' newest tokens.
            value: `[T, g, d]`.
        """
        keys, values = self._stored[layer]
        self._stored[layer] = (self._with_newest(keys, key), self._with_newest(values, value))
        longest = max(self._lengths, default=0)
        keys, values = self._stored[layer]
        return keys[:, :, :longest], values[:, :, :longest]

    def _with_newest(self, stored: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Return `[b, g, room, d]` with the newest tokens `[T, g, d]` added, in more memory if there is no room."""
        missing = max(self._lengths, default=0) - stored.shape[2]
        if missing > 0:
            # by half as much again, so that copying takes a constant share of a token's time
            room = max(missing, stored.shape[2] // 2, _MORE_ROOM)
            stored = F.pad(stored, (0, 0, 0, room))
        documents = torch.arange(len(stored), device=stored.device)
        stored[documents, :, self._newest] = row[: len(documents)]
        return stored

    def visible(self, window: int | None) -> torch.Tensor:
        """Return `[b, m]` bool: the tokens that each document's newest one sees, `window` or all before itself."""
        longest = max(self._lengths, default=0)
        distance = self._newest[:, None] - torch.arange(longest, device=self._newest.device)
        return (distance >= 0) if window is None else (distance >= 0) & (distance <= window)
