"""The packed rows that answers are made from: whole prompts first, then the newest token of each.

Tensor legend: `p` tokens of a prompt, `b` documents of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_kto.data.batches.packed_rows import PackedRow
from nemo_kto.data.batches.row_images import Picture, RowImages, images_of_row
from nemo_kto.data.tokens.contents import in_brief
from nemo_kto.network.key_value_cache import KeyValueCache


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What is answered.

    Attributes:
        tokens: `[p]` int64 token ids.
        pictures: What it shows, in order.
        image_token_id: The token that stands for what it shows; None without.
        thumbnails: What it shows as pages do, as data URIs; the first few, or none.
    """

    tokens: torch.Tensor
    pictures: tuple[Picture, ...] = ()
    image_token_id: int | None = None
    thumbnails: tuple[str, ...] = ()

    @property
    def in_brief(self) -> torch.Tensor:
        """Its tokens for people to read, see there."""
        return in_brief(self.tokens, self.image_token_id)


@dataclass
class Row:
    """The documents of a micro-batch: those of its prompts whose answers have not ended.

    Attributes:
        prompts: All prompts, of this row and of others.
        texts: The same with their answers so far.
        numbers: Which of them are in this row, ascending; there may be none.
        cache: Their keys and values; None to score whole documents each time.
        switches: Lengths of documents beyond which they have another rotary embedding, see `RotaryEmbedding`.
        whole: Whether the next pass is of whole documents, rather than of their newest tokens.
    """

    prompts: Sequence[Prompt]
    texts: list[list[int]]
    numbers: list[int]
    cache: KeyValueCache | None
    switches: frozenset[int]
    whole: bool = True

    def pack(self, device: torch.device) -> PackedRow:
        """Return what the next pass is of: the documents, or their newest tokens, or, without any, a dummy token.

        The "responses" are the tokens to come: `response_positions` `[b]` are the documents' last tokens.
        """
        texts = [self.texts[number] for number in self.numbers]
        if not self.whole and any(len(text) - 1 in self.switches for text in texts):
            self.whole, self.cache = True, KeyValueCache()  # keys that are kept have the other rotary embedding
        starts = [0 if self.whole else len(text) - 1 for text in texts]
        longest = max(map(len, texts), default=1)
        if self.cache is not None:
            self.cache.begin([len(text) for text in texts], device)
        parts = [torch.tensor(text[start:]) for text, start in zip(texts, starts, strict=True)]
        positions = [torch.arange(start, len(text)) for text, start in zip(texts, starts, strict=True)]
        dummy = torch.zeros(1, dtype=torch.int64)
        starts_and_end = torch.tensor([0, *map(len, parts or [dummy])]).cumsum(0)
        images, rotary = self._images(texts)
        return PackedRow(
            tokens=torch.cat(parts or [dummy]),
            position_ids=torch.cat(positions or [dummy]),
            cu_seqlens=starts_and_end.to(torch.int32),
            lengths=tuple(map(len, parts or [dummy])),
            max_seqlen=longest,
            response_positions=starts_and_end[1 : len(parts) + 1] - 1,
            response_tokens=torch.zeros(len(parts), dtype=torch.int64),
            document_ids=torch.arange(len(parts)),
            response_lengths=(1,) * len(parts) or (0,),
            images=images,
            rotary_positions=rotary,
        )

    def _images(self, texts: Sequence[Sequence[int]]) -> tuple[RowImages | None, torch.Tensor | None]:
        """Return the images and rotary positions of what the next pass is of; see `PackedRow`."""
        prompts, lengths = [self.prompts[number] for number in self.numbers], list(map(len, texts))
        token = next((prompt.image_token_id for prompt in prompts if prompt.pictures), None)
        images, rotary = images_of_row(
            [prompt.tokens for prompt in prompts],
            lengths,
            [prompt.pictures for prompt in prompts],
            image_token_id=token,
        )
        if self.whole:
            return images, rotary
        newest = torch.tensor(lengths).cumsum(0) - 1
        return None, None if rotary is None else rotary[:, newest]

    def go_on(self, unfinished: set[int]) -> None:
        """Leave out the documents that have ended; keys and values of the others are known from now on."""
        kept = [place for place, number in enumerate(self.numbers) if number in unfinished]
        if self.cache is not None:
            self.whole = False
            if len(kept) < len(self.numbers):
                self.cache.keep(kept)
        self.numbers = [self.numbers[place] for place in kept]
