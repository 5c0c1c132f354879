"""Which data-parallel rank, and which micro-batch of it, each document of a global batch goes to."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nemo_kto.errors import ConfigError


class DocumentIndex(NamedTuple):
    """A document of a global batch: a prompt and a response, of a sample or of the KL set.

    Attributes:
        prompt: Index of the record whose prompt it begins with.
        response: Index of the record whose response follows; the same one, but in the KL set.
        place: Its number among the samples, or among the KL set, of the global batch.
        in_kl_set: Whether it belongs to the KL set.
        weight: 1 for a document that counts, 0 for one that only fills a place.
        row: Number of its micro-batch among those of its rank.
    """

    prompt: int
    response: int
    place: int
    in_kl_set: bool = False
    weight: float = 1.0
    row: int = 0


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a global batch is divided.

    Attributes:
        dp_rank: This process' place among the data-parallel ranks.
        dp_size: Number of data-parallel ranks.
        micro_batch_size: Samples of a micro-batch.
        kl_micro_batch_size: Documents of a micro-batch of the KL set.
        micro_batch_tokens: Instead of these two, the most tokens of a micro-batch; a longer document is one alone.
        multiple: The micro-batches of a rank are a multiple of this.
        by_length: Whether documents are dealt so that ranks, and micro-batches of a rank, have as many tokens as each
            other; else in their order.
    """

    dp_rank: int = 0
    dp_size: int = 1
    micro_batch_size: int = 1
    kl_micro_batch_size: int = 1
    micro_batch_tokens: int | None = None
    multiple: int = 1
    by_length: bool = True


class Dealer:
    """Takes this rank's share of global batches; every rank gets as many documents."""

    def __init__(
        self,
        division: Division,
        prompt_lengths: np.ndarray,
        response_lengths: np.ndarray,
        *,
        max_positions: int | None = None,
    ) -> None:
        """Keeps the division.

        Args:
            division: See there.
            prompt_lengths: [N] tokens of each record's prompt.
            response_lengths: [N] tokens of each record's response.
            max_positions: Most tokens of a document (None: no limit).
        """
        self._division = division
        self._prompt_lengths = prompt_lengths
        self._response_lengths = response_lengths
        self._max_positions = max_positions

    def share(self, documents: Sequence[DocumentIndex]) -> list[DocumentIndex]:
        """This rank's documents of a global batch: samples, then KL set, micro-batch after micro-batch.

        Raises:
            ConfigError: Ranks and micro-batches cannot share them.
        """
        samples = [document for document in documents if not document.in_kl_set]
        kl_set = [document for document in documents if document.in_kl_set]
        mine = self._mine(samples, self._division.micro_batch_size)
        return mine + self._mine(kl_set, self._division.kl_micro_batch_size) if kl_set else mine

    def _mine(self, documents: list[DocumentIndex], size: int) -> list[DocumentIndex]:
        division, lengths = self._division, [self._length(document) for document in documents]
        unit = division.dp_size * (size if division.micro_batch_tokens is None else division.multiple)
        if len(documents) % unit:
            raise ConfigError(
                f"{len(documents)} documents of a global batch cannot be divided by {unit}: every one of the "
                f"{division.dp_size} data-parallel ranks must get as many micro-batches."
            )
        groups = self._groups(range(len(documents)), lengths, division.dp_size)
        if division.micro_batch_tokens is not None:
            rows = self._rows_of_tokens(groups, lengths)
        else:
            mine = groups[division.dp_rank]
            rows = self._groups(mine, lengths, len(mine) // size)
        return [documents[place]._replace(row=number) for number, row in enumerate(rows) for place in row]

    def _groups(self, places: Sequence[int], lengths: list[int], number: int) -> list[list[int]]:
        """Divides places into groups of as many each."""
        size = len(places) // number
        if self._division.by_length:
            return _balanced(places, lengths, number, most=size)
        return [list(places[start : start + size]) for start in range(0, number * size, size)]

    def _rows_of_tokens(self, groups: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """This rank's micro-batches, their number the least with which those of every rank are small enough."""
        multiple, most = self._division.multiple, self._division.micro_batch_tokens
        assert most is not None
        rows: list[list[list[int]]] = [[] for _ in groups]
        number = len(groups[0])
        # tried from the number that full micro-batches would need up to one document in each
        fewest = min(number, -(-max(sum(lengths[place] for place in group) for group in groups) // most))
        for count in range(-(-fewest // multiple) * multiple, number + 1, multiple):
            rows = [_balanced(group, lengths, count) for group in groups]
            together = [row for of_rank in rows for row in of_rank if len(row) > 1]
            if all(sum(lengths[place] for place in row) <= most for row in together):
                break
        return rows[self._division.dp_rank]

    def _length(self, document: DocumentIndex) -> int:
        length = int(self._prompt_lengths[document.prompt] + self._response_lengths[document.response])
        return length if self._max_positions is None else min(length, self._max_positions)


def _balanced(
    places: Sequence[int], lengths: Sequence[int], number: int, *, most: int | None = None
) -> list[list[int]]:
    """Deals places to groups of similar length: the longest first, each to the shortest group that has room.

    Args:
        places: Which ones.
        lengths: Of all places.
        number: Groups.
        most: Places of each group; None for any number.

    Returns:
        Each group's places, ascending; groups in the order of their first place.
    """
    groups: list[list[int]] = [[] for _ in range(number)]
    shortest = [(0, group) for group in range(number)]
    for place in sorted(places, key=lambda place: (-lengths[place], place)):
        length, group = heapq.heappop(shortest)
        groups[group].append(place)
        if len(groups[group]) != most:
            heapq.heappush(shortest, (length + lengths[place], group))
    return sorted(sorted(group) for group in groups)
