"""Samples -> the documents of a batch -> `KTOBatch`; what the loader's workers do."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nemo_kto.data.batches.dealing import DocumentIndex
from nemo_kto.data.batches.packed_rows import KTOBatch
from nemo_kto.data.batches.row_images import Picture
from nemo_kto.data.tokens.image_files import ImageError, bytes_of
from nemo_kto.data.tokens.pictures import ImageReader, SeenImage
from nemo_kto.data.tokens.stored_images import StoredImage
from nemo_kto.data.tokens.tokenization import TokenizedSample
from nemo_kto.errors import DataError


class UnreadableImageError(DataError):
    """An image that could be read when its tokens were made, and cannot now."""

    def __init__(self, message: str) -> None:
        """Keeps the sentence: of an error in a worker, torch makes another one with a whole traceback as message."""
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@dataclass(frozen=True, slots=True)
class KTOItem:
    """A document of a batch.

    Attributes:
        prompt: [p] int64.
        response: [r] int64.
        desirable: True for thumbs up; of the sample that the prompt is of.
        index: Which document it is.
        weight: What the loss of that sample is multiplied with.
        pictures: What the prompt shows, in order.
        image_token_id: The token that stands for those; None without.
    """

    prompt: Tensor
    response: Tensor
    desirable: bool
    index: DocumentIndex
    weight: float = 1.0
    pictures: tuple[Picture, ...] = ()
    image_token_id: int | None = None


class KTODataset(Dataset[KTOItem]):
    """Tokenised samples, looked up by the documents that the samplers deal.

    A prompt and the response of another sample can together be longer than any sample is. Only where that is more than
    the model has positions is such a KL response cut at the end; samples are never cut.
    """

    def __init__(
        self,
        samples: Sequence[TokenizedSample],
        *,
        max_positions: int | None = None,
        images: ImageReader | None = None,
        pixels: bool = True,
    ) -> None:
        """Keeps the samples.

        Args:
            samples: The samples.
            max_positions: The longest document the model is defined for (None: no limit).
            images: Reads their images; None for samples that have none.
            pixels: Whether images are decoded; without, their pictures have no inputs.
        """
        self._samples = samples
        self._max_positions = max_positions
        self._images = images
        self._pixels = pixels

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def __getitem__(self, index: DocumentIndex) -> KTOItem:
        """A sample, or a document of the KL set."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[DocumentIndex]) -> list[KTOItem]:
        """Several of them; DataLoader asks for those of a batch at once, each of whose images is decoded once."""
        known: dict[int, Picture] = {}
        return [self._item(index, known) for index in indices]

    def pictures(self, sample: int) -> tuple[Picture, ...]:
        """What the prompt of a sample shows."""
        return self._pictures(self._samples[sample].images, {})

    def _item(self, index: DocumentIndex, known: dict[int, Picture]) -> KTOItem:
        sample = self._samples[index.prompt]
        response = sample.response
        if index.in_kl_set:
            response = self._samples[index.response].response
            if self._max_positions is not None:
                response = response[: self._max_positions - sample.prompt.numel()]
        pictures = self._pictures(sample.images, known)
        token = self._images.tokens.image_token_id if pictures and self._images is not None else None
        return KTOItem(sample.prompt, response, sample.desirable, index, sample.weight, pictures, token)

    def _pictures(self, images: Sequence[StoredImage], known: dict[int, Picture]) -> tuple[Picture, ...]:
        for image in images:
            if image.key not in known:
                known[image.key] = self._picture(image)
        return tuple(known[image.key] for image in images)

    def _picture(self, image: StoredImage) -> Picture:
        if not self._pixels:
            return Picture(image.key, image.num_tokens, image.grid)
        assert self._images is not None, "samples with images need what reads them"
        try:
            return Picture(image.key, image.num_tokens, image.grid, self._images.inputs(image.read()))
        except ImageError as error:  # its bytes are those that could be decoded before
            raise UnreadableImageError(f"The image {image.place} {error}") from error
        except DataError as error:
            raise UnreadableImageError(str(error)) from error


def picture_of(image: SeenImage, reader: ImageReader) -> Picture:
    """Returns an image that no data set holds as the model takes it."""
    stand = image.stand
    grid = (stand.rows, stand.columns) if stand.rows else None
    return Picture(image.key, stand.num_tokens, grid, reader.inputs(bytes_of(image.image)))


def collate_documents(items: Sequence[KTOItem]) -> KTOBatch:
    """Joins the documents of a batch, each micro-batch's in a row; the `collate_fn` for DataLoader."""
    samples = [item for item in items if not item.index.in_kl_set]
    kl_set = [item for item in items if item.index.in_kl_set]
    weights = torch.tensor([item.index.weight for item in samples], dtype=torch.float32)
    return KTOBatch(
        samples=[(item.prompt, item.response) for item in samples],
        kl_samples=[(item.prompt, item.response) for item in kl_set],
        row_sizes=_row_sizes(samples),
        kl_row_sizes=_row_sizes(kl_set),
        pairs=_pairs(samples),
        kl_pairs=_pairs(kl_set),
        places=torch.tensor([item.index.place for item in samples], dtype=torch.int64),
        kl_places=torch.tensor([item.index.place for item in kl_set], dtype=torch.int64),
        desirable=torch.tensor([item.desirable for item in samples], dtype=torch.bool),
        weights=weights,
        kl_weights=torch.tensor([item.index.weight for item in kl_set], dtype=torch.float32),
        loss_weights=weights * torch.tensor([item.weight for item in samples], dtype=torch.float32),
        images={item.index.prompt: item.pictures for item in items if item.pictures},
        image_token_id=next((item.image_token_id for item in items if item.pictures), None),
    )


def _row_sizes(items: Sequence[KTOItem]) -> list[int]:
    return [len(list(row)) for _, row in itertools.groupby(items, key=lambda item: item.index.row)]


def _pairs(items: Sequence[KTOItem]) -> Tensor:
    numbers = [(item.index.prompt, item.index.response) for item in items]
    return torch.tensor(numbers, dtype=torch.int64).reshape(-1, 2)
