"""Documents -> one rank's share of a global batch -> packed rows, the form the model works on.

A packed row is whole documents (prompt + response) laid end to end without padding; attention stays within a document
and positions restart at each one.

Shapes: `n` samples and `k` documents of the KL set of this rank, `d` documents in a row, `T` tokens in a row,
`R` response tokens in a row, `p` / `r` tokens of one prompt / response.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_kto.data.batches.row_images import Picture, RowImages, images_of_row
from nemo_kto.data.batches.upload import upload

Document = tuple[Tensor, Tensor]
"""(prompt [p], response [r]), both int64."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One micro-batch.

    Attributes:
        tokens: [T] int64 token ids.
        position_ids: [T] int64, counted from 0 within each document.
        cu_seqlens: [d+1] int32, where each document starts, and T.
        lengths: [d] the documents' tokens; here too, as numbers, for nobody has to wait for a device to tell them.
        max_seqlen: Tokens of the longest document.
        response_positions: [R] int64, for each response token the place in the row of the token before it, whose
            hidden state predicts it.
        response_tokens: [R] int64, the response tokens' ids.
        document_ids: [R] int64, the document (0 to d-1) each response token belongs to.
        response_lengths: [d] how many response tokens each document has.
        images: Its images; None for none.
        rotary_positions: [3, T] int64, where the model counts positions of images' tokens in time, rows and columns
            and the row has images; else None, and they are those of `position_ids`.
    """

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    max_seqlen: int
    response_positions: Tensor
    response_tokens: Tensor
    document_ids: Tensor
    response_lengths: tuple[int, ...]
    images: RowImages | None = None
    rotary_positions: Tensor | None = None

    @property
    def num_documents(self) -> int:
        """Documents in the row."""
        return len(self.lengths)

    def padded(self, multiple: int) -> "PackedRow":
        """The row with a number of tokens that `multiple` divides, by a last document without responses."""
        missing = -self.tokens.numel() % multiple
        if not missing:
            return self
        end = self.cu_seqlens[-1:] + missing
        counted = torch.arange(missing, device=self.position_ids.device)
        rotary = self.rotary_positions
        return replace(
            self,
            tokens=torch.cat([self.tokens, self.tokens.new_zeros(missing)]),
            position_ids=torch.cat([self.position_ids, counted]),
            cu_seqlens=torch.cat([self.cu_seqlens, end]),
            lengths=(*self.lengths, missing),
            max_seqlen=max(self.max_seqlen, missing),
            response_lengths=(*self.response_lengths, 0),
            rotary_positions=None if rotary is None else torch.cat([rotary, counted.expand(3, -1)], dim=1),
        )

    def shard(self, rank: int, size: int) -> "PackedRow":
        """The `rank`-th of `size` equal parts of the row.

        Tokens, positions and places of images are the part's own; responses are those predicted in it, counted from
        its first token;
        `cu_seqlens`, `lengths` and `max_seqlen` still describe the whole row. `size` divides the number of tokens.
        """
        if size == 1:
            return self
        length, rest = divmod(self.tokens.numel(), size)
        assert not rest, (self.tokens.numel(), size)
        start = rank * length
        mine = (self.response_positions >= start) & (self.response_positions < start + length)
        documents = self.document_ids[mine]
        rotary = self.rotary_positions
        return replace(
            self,
            tokens=self.tokens[start : start + length],
            position_ids=self.position_ids[start : start + length],
            response_positions=self.response_positions[mine] - start,
            response_tokens=self.response_tokens[mine],
            document_ids=documents,
            response_lengths=tuple(torch.bincount(documents, minlength=self.num_documents).tolist()),
            images=None if self.images is None else self.images.between(start, start + length),
            rotary_positions=None if rotary is None else rotary[:, start : start + length],
        )

    def to(self, device: torch.device | str) -> "PackedRow":
        """The row with every tensor on `device`; pictures stay where they are."""
        names = [field.name for field in fields(self) if isinstance(getattr(self, field.name), Tensor)]
        if self.images is None:
            return replace(self, **_uploaded(self, names, device))
        tensors = [getattr(self, name) for name in names]
        *moved, places, features = upload([*tensors, self.images.places, self.images.features], device)
        images = replace(self.images, places=places, features=features)
        changed: dict[str, Any] = dict(zip(names, moved, strict=True))
        return replace(self, **changed, images=images)


def pack_documents(
    documents: Sequence[Document],
    pictures: Sequence[Sequence[Picture]] | None = None,
    *,
    image_token_id: int | None = None,
) -> PackedRow:
    """Lays documents end to end.

    Args:
        documents: At least one (prompt [p >= 1], response [r >= 1]).
        pictures: What the prompt of each document shows, in order; None for nothing.
        image_token_id: The token that stands for what they show.

    Example:
        Prompts [1 2] and [5], responses [3] and [6 7] give tokens [1 2 3 5 6 7], position_ids [0 1 2 0 1 2],
        cu_seqlens [0 3 6], lengths (3 3), response_positions [1 3 4], response_tokens [3 6 7], document_ids [0 1 1],
        response_lengths (1 2).
    """
    assert documents, "a packed row needs at least one document"
    prompt_lengths = [prompt.numel() for prompt, _ in documents]
    response_lengths = [response.numel() for _, response in documents]
    assert min(prompt_lengths) > 0 and min(response_lengths) > 0, (prompt_lengths, response_lengths)
    lengths = [p + r for p, r in zip(prompt_lengths, response_lengths, strict=True)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    positions = [
        torch.arange(start + p - 1, start + p - 1 + r)
        for start, p, r in zip(cu_seqlens.tolist(), prompt_lengths, response_lengths, strict=False)
    ]
    images, rotary = None, None
    if pictures is not None:
        prompts = [prompt for prompt, _ in documents]
        images, rotary = images_of_row(prompts, lengths, pictures, image_token_id=image_token_id)
    return PackedRow(
        tokens=torch.cat([part for document in documents for part in document]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=cu_seqlens.to(torch.int32),
        lengths=tuple(lengths),
        max_seqlen=max(lengths),
        response_positions=torch.cat(positions),
        response_tokens=torch.cat([response for _, response in documents]),
        document_ids=torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(response_lengths)),
        response_lengths=tuple(response_lengths),
        images=images,
        rotary_positions=rotary,
    )


@dataclass(frozen=True, slots=True)
class KTOBatch:
    """One rank's share of one global batch.

    Attributes:
        samples: n (prompt, response).
        kl_samples: k (prompt, response of another sample); empty without a KL set.
        row_sizes: How many consecutive samples each micro-batch holds.
        kl_row_sizes: The same of the KL set.
        pairs: [n, 2] int64, the numbers of the records that prompt and response are of; always on the CPU.
        kl_pairs: [k, 2] int64, the same of the KL set.
        places: [n] int64, the samples' places in the global batch; always on the CPU.
        kl_places: [k] int64, the same among the global batch's KL set.
        desirable: [n] bool.
        weights: [n] float32, 1 for a sample that counts, 0 for one that only fills a place.
        kl_weights: [k] float32, the same of the KL set.
        loss_weights: [n] float32, what each loss is multiplied with; 0 for a sample that only fills a place.
        images: Record -> what its prompt shows, in order, of the records whose prompts are here and show something.
        image_token_id: The token that stands for what they show; None without images.
    """

    samples: list[Document]
    kl_samples: list[Document]
    row_sizes: list[int]
    kl_row_sizes: list[int]
    pairs: Tensor
    kl_pairs: Tensor
    places: Tensor
    kl_places: Tensor
    desirable: Tensor
    weights: Tensor
    kl_weights: Tensor
    loss_weights: Tensor
    images: dict[int, tuple[Picture, ...]] = field(default_factory=dict)
    image_token_id: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels between processes as bytes, and not as PyTorch sends tensors.

        That takes a file descriptor for each one on both sides, room in /dev/shm, of which containers have little, and
        a socket in TMPDIR: where the path of that is longer than 107 bytes, no batch ever arrives.
        """
        parts = [part for document in self.samples + self.kl_samples for part in document]
        lengths = [part.numel() for part in parts]
        others = {field.name: getattr(self, field.name) for field in fields(self)}
        numbers = {name: other.numpy() for name, other in others.items() if isinstance(other, Tensor)}
        rest = self.row_sizes, self.kl_row_sizes, numbers, self.images, self.image_token_id
        return _batch_from_flat, (torch.cat(parts).numpy(), lengths, *rest)

    def to(self, device: torch.device | str, **kwargs: Any) -> "KTOBatch":
        """The batch with labels and weights on `device` (Lightning calls this); rows move one by one when scored."""
        names = ("desirable", "weights", "kl_weights", "loss_weights")
        return replace(self, **_uploaded(self, names, device))

    def sample_rows(self) -> list[PackedRow]:
        """The samples as packed rows, a micro-batch each."""
        return self._rows(self.samples, self.row_sizes, self.pairs)

    def kl_rows(self) -> list[PackedRow]:
        """The KL set as packed rows, a micro-batch each."""
        return self._rows(self.kl_samples, self.kl_row_sizes, self.kl_pairs)

    def _rows(self, documents: list[Document], sizes: list[int], pairs: Tensor) -> list[PackedRow]:
        parts = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
        if not self.images:
            return [pack_documents(documents[start:end]) for start, end in parts]
        pictures = [self.images.get(record, ()) for record in pairs[:, 0].tolist()]
        return [
            pack_documents(documents[start:end], pictures[start:end], image_token_id=self.image_token_id)
            for start, end in parts
        ]


def _uploaded(owner: object, names: Sequence[str], device: torch.device | str) -> dict[str, Any]:
    return dict(zip(names, upload([getattr(owner, name) for name in names], device), strict=True))


def _batch_from_flat(
    tokens: np.ndarray,
    lengths: list[int],
    row_sizes: list[int],
    kl_row_sizes: list[int],
    numbers: dict[str, np.ndarray],
    images: dict[int, tuple[Picture, ...]],
    image_token_id: int | None,
) -> KTOBatch:
    parts = torch.split(torch.from_numpy(tokens), lengths)
    documents = list(zip(parts[::2], parts[1::2], strict=True))
    number = sum(row_sizes)
    tensors: dict[str, Any] = {name: torch.from_numpy(of) for name, of in numbers.items()}
    return KTOBatch(
        documents[:number],
        documents[number:],
        row_sizes,
        kl_row_sizes,
        **tensors,
        images=images,
        image_token_id=image_token_id,
    )
