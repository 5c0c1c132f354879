"""Feedback -> DataLoaders of `KTOBatch`, one global batch (this rank's share of it) at a time."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from nemo_kto.data.batches.dataset import KTODataset, KTOItem, collate_documents
from nemo_kto.data.batches.dealing import Dealer, Division, DocumentIndex
from nemo_kto.data.batches.packed_rows import KTOBatch
from nemo_kto.data.batches.row_images import Picture
from nemo_kto.data.batches.samples import Overlong, Samples, read_samples, split_by_prompt
from nemo_kto.data.batches.sampling import (
    GlobalBatchSampler,
    Share,
    Shuffle,
    ValidationBatchSampler,
    epoch_length,
    own_prompt_pairs,
)
from nemo_kto.data.reading.parts import file_names
from nemo_kto.data.reading.sources import Source
from nemo_kto.data.tokens.cache import TokenCache
from nemo_kto.data.tokens.image_files import thumbnail
from nemo_kto.data.tokens.pictures import ImageTokens
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.store import copy_bad_records
from nemo_kto.data.tokens.tokenization import Encoder
from nemo_kto.errors import DataError
from nemo_kto.quiet import is_global_rank_zero

logger = logging.getLogger(__name__)


_THUMBNAILS = 4
"""Of a prompt, at most."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is read and how it is dealt.

    Attributes:
        train: What to train on; may be empty where no train loader is asked for.
        validation: What `val_dataloader` scores; may be empty.
        validation_fraction: Share of the training samples that is validated on instead, where `validation` is empty;
            no prompt is in both.
        tokenization: How records become tokens.
        images: What to know of a model that takes images; None for one that takes none.
        max_length: Most tokens of prompt and response together, what `append_eod` adds included.
        max_positions: See `KTODataset`.
        overlong: What becomes of longer samples.
        on_bad_record: Whether a record that cannot be used ends the run or is left out.
        cache_dir: See `TokenCache`.
        tokenize_workers: See `TokenCache`.
        global_batch_size: Samples per step over all ranks, in training and in validation.
        kl_fraction: Share of a training batch's prompts that are also paired with another sample's response; in
            validation all are. 0 for none in both.
        kl_group_size: Consecutive samples of a global batch that exchange their responses among themselves, as TRL's
            micro-batches do; None: all of it, so that no prompt meets a response of its own.
        division: Into which micro-batches global batches are divided; `set_position` says for which rank.
        shuffle: How the training data is shuffled.
        seed: Non-negative seed of that order, of what is taken of a source, and of the validation split.
        num_workers: Processes that build batches; 0 builds them in the training process.
    """

    train: Sequence[Source]
    validation: Sequence[Source] = ()
    validation_fraction: float = 0.0
    tokenization: TokenizationSettings = TokenizationSettings()
    images: ImageTokens | None = None
    max_length: int
    max_positions: int | None = None
    overlong: Overlong = "drop"
    on_bad_record: Literal["error", "skip"] = "error"
    cache_dir: Path
    tokenize_workers: int | None = None
    global_batch_size: int
    kl_fraction: float = 1.0
    kl_group_size: int | None = None
    division: Division = Division()
    shuffle: Shuffle = True
    seed: int
    num_workers: int = 0


@dataclass(frozen=True, slots=True)
class _Position:
    """Where this process stands among the data-parallel ranks and in the training data."""

    division: Division
    num_steps: int
    steps_per_epoch: int
    start_step: Callable[[], int]
    pixels: bool = True


class KTODataModule(LightningDataModule):
    """Reads and tokenises feedback, and deals this rank's share of every global batch.

    Use: construct, `prepare()` (before any process group exists, so that bad data stops the run at once),
    `set_position(...)` when the ranks are known, then ask for loaders. The Trainer must leave the samplers alone
    (`use_distributed_sampler=False`).

    Attributes:
        splits: "train" and "validation" -> their samples; only those for which there is data. Filled by `prepare()`.
    """

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keeps the settings; no file is opened before `prepare()`.

        Raises:
            ConfigError: See `Encoder`.
        """
        super().__init__()
        self._settings = settings
        self._encoder = Encoder(tokenizer, settings.tokenization, settings.images)
        self._position: _Position | None = None
        self.splits: dict[str, Samples] = {}

    def prepare(self) -> None:
        """Reads all data, tokenising what has not been tokenised before; a second call does nothing.

        Raises:
            DataError: See `TokenCache`; no sample is left of a split; or the training data is less than one global
                batch. The message begins with the split.
            ConfigError: See `Encoder`.
        """
        if self.splits:
            return
        settings = self._settings
        for split, sources in (("train", settings.train), ("validation", settings.validation)):
            if sources:
                self.splits[split] = self._read(split, sources)
        if settings.validation_fraction and not settings.validation:
            train, validation = split_by_prompt(self.splits["train"], settings.validation_fraction, seed=settings.seed)
            if not len(validation):
                raise DataError("train data: all samples have the same prompt, so none can be kept for validation.")
            self.splits |= {"train": train, "validation": validation}
            _inform("%d samples are trained on, %d with other prompts are validated on", len(train), len(validation))
        if "train" in self.splits:
            epoch_length(len(self.splits["train"]), settings.global_batch_size)
        if settings.global_batch_size == 1 and settings.kl_fraction:
            _warn(
                "global_batch_size is 1: no response can be paired with another prompt, so the KL estimate is that of "
                "the sample itself and its loss stays near 0.5; use at least 4."
            )

    def setup(self, stage: str) -> None:
        """Lightning's hook; the same as `prepare()`."""
        self.prepare()

    def set_position(
        self,
        *,
        dp_rank: int,
        dp_size: int,
        multiple: int = 1,
        num_steps: int,
        steps_per_epoch: int,
        start_step: Callable[[], int],
        pixels: bool = True,
    ) -> None:
        """Says which share of each batch is dealt here and where training stands; see `GlobalBatchSampler`.

        Args:
            dp_rank: This process' place among the data-parallel ranks.
            dp_size: Number of data-parallel ranks.
            multiple: See `Division`.
            num_steps: Steps of the whole run.
            steps_per_epoch: Steps of one pass over the training data.
            start_step: Returns the number of steps taken before.
            pixels: Whether images are decoded here; a process that does not run the model's vision tower needs none.
        """
        division = replace(self._settings.division, dp_rank=dp_rank, dp_size=dp_size, multiple=multiple)
        self._position = _Position(division, num_steps, steps_per_epoch, start_step, pixels)

    def train_dataloader(self) -> DataLoader[KTOItem]:
        """Batches from the current position to the end of the run; its length is that of the whole run.

        Raises:
            DataError: No training files were given, or they hold less than one global batch.
        """
        if "train" not in self.splits:
            raise DataError("No training data was given; name at least one file to train on.")
        return self._loader("train", self._sampler("train", self._known_position(), self._dealer("train").share))

    def val_dataloader(self) -> DataLoader[KTOItem] | list[DataLoader[KTOItem]]:
        """Batches that hold every validation sample once; an empty list when no validation files were given."""
        if "validation" not in self.splits:
            return []
        sampler = self._sampler("validation", self._known_position(), self._dealer("validation").share)
        return self._loader("validation", sampler)

    def global_batches(self, split: str) -> Iterable[list[DocumentIndex]]:
        """What every global batch of the whole run (of "train") or of one validation holds, over all ranks."""
        return self._sampler(split, replace(self._known_position(), start_step=int), list)

    def rank_batch(self, split: str, documents: Sequence[DocumentIndex]) -> KTOBatch:
        """This rank's share of a global batch."""
        return collate_documents(self._dataset(split).__getitems__(self._dealer(split).share(documents)))

    def _dealer(self, split: str) -> Dealer:
        samples = self.splits[split]
        return Dealer(
            self._known_position().division,
            samples.prompt_kept,
            samples.response_kept,
            max_positions=self._settings.max_positions,
        )

    def validated(self, batches: int) -> np.ndarray:
        """[n] bool, which of the samples in the first batches of a validation are desirable."""
        number = self._validation_sampler(list).num_samples(batches)
        return self.splits["validation"].column("desirable")[:number]

    def own_prompt_pairs(self, split: str) -> int:
        """How many samples of the first epoch, or of a validation, groups pair with a response to their own prompt."""
        settings, keys = self._settings, self.splits[split].prompt_keys
        if settings.kl_group_size is None:
            return 0
        if split == "train":
            steps = epoch_length(len(keys), settings.global_batch_size)
            sampler = self._train_sampler(_Position(settings.division, steps, steps, int), list)
            keys = keys[sampler.epoch_order(0)[: steps * settings.global_batch_size]]
        return own_prompt_pairs(keys, settings.kl_group_size)

    def _sampler(self, split: str, position: _Position, share: Share) -> GlobalBatchSampler | ValidationBatchSampler:
        return self._validation_sampler(share) if split == "validation" else self._train_sampler(position, share)

    def _validation_sampler(self, share: Share) -> ValidationBatchSampler:
        return ValidationBatchSampler(
            self.splits["validation"].prompt_keys,
            global_batch_size=self._settings.global_batch_size,
            kl_set=self._settings.kl_fraction > 0,
            kl_group_size=self._settings.kl_group_size,
            share=share,
        )

    def _train_sampler(self, position: _Position, share: Share) -> GlobalBatchSampler:
        return GlobalBatchSampler(
            self.splits["train"].prompt_keys,
            global_batch_size=self._settings.global_batch_size,
            seed=self._settings.seed,
            shuffle=self._settings.shuffle,
            num_steps=position.num_steps,
            steps_per_epoch=position.steps_per_epoch,
            start_step=position.start_step,
            kl_fraction=self._settings.kl_fraction,
            kl_group_size=self._settings.kl_group_size,
            share=share,
        )

    def _read(self, split: str, sources: Sequence[Source]) -> Samples:
        settings = self._settings
        cache = TokenCache(settings.cache_dir, self._encoder, workers=settings.tokenize_workers)
        try:
            samples = read_samples(
                sources,
                partial(cache.tokens_of, skip_bad=settings.on_bad_record == "skip"),
                max_length=settings.max_length,
                overlong=settings.overlong,
                bos_token_id=self._encoder.tokenizer.bos_token_id,
                seed=settings.seed,
            )
            self._describe(split, samples)
            if not len(samples):
                raise DataError(_nothing_left(sources, samples, settings.max_length))
        except DataError as error:
            raise DataError(f"{split} data: {error}") from error
        return samples

    def _describe(self, split: str, samples: Samples) -> None:
        """Logs what a split consists of, and what is likely to be a mistake in it."""
        limit = self._settings.max_length
        counts = [f"{len(samples)} samples ({samples.num_desirable} desirable, {samples.num_undesirable} undesirable)"]
        if samples.num_overlong:
            counts.append(f"{samples.num_overlong} dropped because they exceed {limit} tokens")
        if samples.num_truncated:
            counts.append(f"{samples.num_truncated} cut to {limit} tokens")
        if samples.num_bad:
            counts.append(f"{samples.num_bad} bad records skipped")
        _inform("%s data: %s", split, ", ".join(counts))
        with_images = int((samples.column("images") > 0).sum())
        if with_images:
            _inform("%s data: %d of the samples show images", split, with_images)
        weights = samples.column("weight")
        if len(samples) and (weights != 1).any():
            _inform("%s data: the samples' own weights are %.4g to %.4g", split, weights.min(), weights.max())
        if samples.column("verbatim").any() and self._encoder.tokenizer.chat_template:
            _warn(
                "%s data: prompts and responses are strings, which are joined as they are, although the tokenizer has "
                "a chat template. For a chat model set model.data.prompt_template=chat, unless the strings are in its "
                "format already.",
                split,
            )
        for kind, (count, example) in samples.notes.items():
            _warn("%s data: in %d records, %s. For example %s", split, count, kind, example)
        spelled = int(samples.column("spelled").sum())
        if spelled:
            _inform(
                "%s data: %d samples are strings that spell special tokens, which count as such "
                "(model.data.special_tokens=text makes ordinary text of them)",
                split,
                spelled,
            )

    def list_bad_records(self, file: Path) -> None:
        """Writes down which records were left out, in the process that speaks for the run; removes an older list.

        Raises:
            DataError: The file cannot be written.
        """
        if not is_global_rank_zero():
            return
        stores = {store.folder: store for samples in self.splits.values() for store in samples.stores}
        try:
            if not any(store.num_bad for store in stores.values()):
                file.unlink(missing_ok=True)
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            count = copy_bad_records(list(stores.values()), file)
        except OSError as error:
            raise DataError(f"{file} cannot be written ({error.strerror}).") from error
        _warn("%d bad records were skipped: %s", count, file)

    def digest(self, split: str, *, weights: bool = False) -> str:
        """A digest of a split's tokens and labels in their order, and of the samples' weights if so wished."""
        return self.splits[split].digest(weights=weights)

    @property
    def has_images(self) -> bool:
        """Whether any sample shows an image."""
        return any((samples.column("images") > 0).any() for samples in self.splits.values())

    @property
    def image_token_id(self) -> int | None:
        """The token that stands for images; None where the model takes none."""
        return None if self._encoder.images is None else self._encoder.images.tokens.image_token_id

    def pictures(self, split: str, sample: int) -> tuple[Picture, ...]:
        """Returns what the prompt of a sample shows, decoded."""
        return KTODataset(self.splits[split], images=self._encoder.images).pictures(sample)

    def thumbnails(self, split: str, sample: int) -> tuple[str, ...]:
        """Returns what the prompt of a sample shows, as pages do; the first few."""
        return tuple(thumbnail(image.read()) for image in self.splits[split][sample].images[:_THUMBNAILS])

    @property
    def images_digest(self) -> str | None:
        """A digest of what decides how images become numbers; None without images."""
        images = self._encoder.images
        return images.tokens.digest() if images is not None and self.has_images else None

    def files_of(self, split: str) -> tuple[list[str], np.ndarray]:
        """Returns the names of the files a split was read from, and the number of the one that each sample is of."""
        samples, settings = self.splits[split], self._settings
        sources = settings.validation if split == "validation" and settings.validation else settings.train
        names: list[str] = []
        file_of = samples.column("file").astype(np.int64)
        for number, source in enumerate(sources):
            file_of[samples.store_of == number] += len(names)
            names += file_names(source)
        return names, file_of

    def _known_position(self) -> _Position:
        assert self._position is not None, "set_position(...) must be called before a loader is asked for"
        return self._position

    def _dataset(self, split: str) -> KTODataset:
        return KTODataset(
            self.splits[split],
            max_positions=self._settings.max_positions,
            images=self._encoder.images,
            pixels=self._known_position().pixels,
        )

    def _loader(self, split: str, sampler: GlobalBatchSampler | ValidationBatchSampler) -> DataLoader[KTOItem]:
        return DataLoader(
            self._dataset(split),
            batch_sampler=sampler,
            collate_fn=collate_documents,
            num_workers=self._settings.num_workers,
        )


def _nothing_left(sources: Sequence[Source], samples: Samples, limit: int) -> str:
    lengths = [store.samples["prompt"] + store.samples["response"] for store in samples.stores]
    number = sum(map(len, lengths))
    shortest = f"the shortest has {min(int(found.min()) for found in lengths if len(found))} tokens" if number else ""
    return (
        f"No trainable record is left in {', '.join(source.path for source in sources)}: of {number} records none "
        f"fits into {limit} tokens ({shortest or 'there are none'}). Raise model.data.seq_length or shorten the data."
    )


def _inform(message: str, *values: object) -> None:
    if is_global_rank_zero():
        logger.info(message, *values)


def _warn(message: str, *values: object) -> None:
    if is_global_rank_zero():
        logger.warning(message, *values)
