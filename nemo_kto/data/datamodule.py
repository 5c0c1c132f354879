"""Feedback files -> DataLoaders of `KTOBatch`, one global batch (this rank's share of it) at a time."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from nemo_kto.data.batching import KTOBatch, KTODataset, KTOItem, collate_pairs
from nemo_kto.data.records import read_feedback
from nemo_kto.data.sampling import GlobalBatchSampler, PairIndex, Shuffle, ValidationBatchSampler, epoch_length
from nemo_kto.data.tokenization import TokenizationResult, tokenize_records
from nemo_kto.errors import DataError

logger = logging.getLogger(__name__)

Files = Sequence[str | Path]
T = TypeVar("T", Sequence[PairIndex], Tensor)


@dataclass(frozen=True, slots=True)
class _Position:
    """Where this process stands among the data-parallel ranks and in the training data."""

    dp_rank: int
    dp_size: int
    num_steps: int
    steps_per_epoch: int
    start_step: Callable[[], int]


class KTODataModule(LightningDataModule):
    """Reads and tokenises feedback, and deals this rank's share of every global batch.

    Use: construct, `prepare()` (before any process group exists, so that bad data stops the run at once),
    `set_position(...)` when the ranks are known, then ask for loaders. The Trainer must leave the samplers alone
    (`use_distributed_sampler=False`).

    Attributes:
        splits: "train" and "validation" -> tokenised samples; only those for which files were given. Filled by
            `prepare()`.
    """

    def __init__(
        self,
        *,
        train_files: Files,
        validation_files: Files = (),
        format: str,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        max_positions: int | None = None,
        append_eod: bool,
        global_batch_size: int,
        shuffle: Shuffle,
        seed: int,
        num_workers: int,
    ) -> None:
        """Keeps the settings; no file is opened before `prepare()`.

        Args:
            train_files: JSONL files to train on; may be empty where no train loader is asked for.
            validation_files: JSONL files that `val_dataloader` scores; may be empty.
            format: See `read_feedback`.
            tokenizer: See `tokenize_records`.
            max_length: See `tokenize_records`.
            max_positions: See `KTODataset`.
            append_eod: See `tokenize_records`.
            global_batch_size: Samples per step over all ranks, in training and in validation.
            shuffle: How the training data is shuffled.
            seed: Non-negative seed of that order.
            num_workers: Processes that build batches; 0 builds them in the training process.
        """
        super().__init__()
        self._files = {"train": train_files, "validation": validation_files}
        self._format = format
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._max_positions = max_positions
        self._append_eod = append_eod
        self._global_batch_size = global_batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._num_workers = num_workers
        self._position: _Position | None = None
        self.splits: dict[str, TokenizationResult] = {}

    def prepare(self) -> None:
        """Reads and tokenises every file; a second call does nothing.

        Raises:
            DataError: See `read_feedback` and `tokenize_records`; also when the training data is less than one global
                batch. The message begins with the split.
            ConfigError: See `read_feedback` and `tokenize_records`.
        """
        for split, files in self._files.items():
            if files and split not in self.splits:
                self.splits[split] = self._prepare_split(split, files)
        if "train" in self.splits:
            epoch_length(len(self.splits["train"].samples), self._global_batch_size)
        _warn_without_kl(self._global_batch_size)

    def setup(self, stage: str) -> None:
        """Lightning's hook; the same as `prepare()`."""
        self.prepare()

    def set_position(
        self, *, dp_rank: int, dp_size: int, num_steps: int, steps_per_epoch: int, start_step: Callable[[], int]
    ) -> None:
        """Says which share of each batch is dealt here and where training stands; see `GlobalBatchSampler`.

        Args:
            dp_rank: This process' place among the data-parallel ranks.
            dp_size: Number of data-parallel ranks.
            num_steps: Steps of the whole run.
            steps_per_epoch: Steps of one pass over the training data.
            start_step: Returns the number of steps taken before.
        """
        self._position = _Position(dp_rank, dp_size, num_steps, steps_per_epoch, start_step)

    def train_dataloader(self) -> DataLoader[KTOItem]:
        """Batches from the current position to the end of the run; its length is that of the whole run.

        Raises:
            DataError: No training files were given, or they hold less than one global batch.
        """
        if "train" not in self.splits:
            raise DataError("No training data was given; name at least one JSONL file to train on.")
        return self._loader("train", self._sampler("train", self._known_position()))

    def val_dataloader(self) -> DataLoader[KTOItem] | list[DataLoader[KTOItem]]:
        """Batches that hold every validation sample once; an empty list when no validation files were given."""
        if "validation" not in self.splits:
            return []
        return self._loader("validation", self._sampler("validation", self._known_position()))

    def global_batches(self, split: str) -> Iterable[list[PairIndex]]:
        """What every global batch of the whole run (of "train") or of one validation holds, over all ranks."""
        everything = replace(self._known_position(), dp_rank=0, dp_size=1, start_step=int)
        return self._sampler(split, everything)

    def rank_batch(self, split: str, pairs: Sequence[PairIndex]) -> KTOBatch:
        """This rank's share of a global batch."""
        dataset = self._dataset(split)
        return collate_pairs([dataset[pair] for pair in self.rank_share(pairs)])

    def rank_share(self, places: T) -> T:
        """This rank's share of what belongs to the places of a global batch, a list or a tensor."""
        position = self._known_position()
        share = len(places) // position.dp_size
        return places[position.dp_rank * share : (position.dp_rank + 1) * share]

    def _sampler(self, split: str, position: _Position) -> GlobalBatchSampler | ValidationBatchSampler:
        if split == "validation":
            return ValidationBatchSampler(
                self._prompt_keys(split),
                global_batch_size=self._global_batch_size,
                dp_rank=position.dp_rank,
                dp_size=position.dp_size,
            )
        return GlobalBatchSampler(
            self._prompt_keys(split),
            global_batch_size=self._global_batch_size,
            dp_rank=position.dp_rank,
            dp_size=position.dp_size,
            seed=self._seed,
            shuffle=self._shuffle,
            num_steps=position.num_steps,
            steps_per_epoch=position.steps_per_epoch,
            start_step=position.start_step,
        )

    def _prepare_split(self, split: str, files: Files) -> TokenizationResult:
        try:
            records = read_feedback(files, format=self._format)
            result = tokenize_records(
                records, self._tokenizer, max_length=self._max_length, append_eod=self._append_eod
            )
        except DataError as error:
            raise DataError(f"{split} data: {error}") from error
        _log_split(split, result, num_records=len(records), max_length=self._max_length)
        if isinstance(records[0].prompt, str) and self._tokenizer.chat_template:
            _warn_about_plain_strings(split)
        return result

    def digest(self, split: str) -> str:
        """A digest of a split's tokens and labels in their order; equal on every machine."""
        digest = hashlib.blake2b(digest_size=16)
        for sample in self.splits[split].samples:
            digest.update(f"{sample.prompt_key}:{int(sample.desirable)}:".encode())
            digest.update(sample.response.numpy().tobytes())
        return digest.hexdigest()

    def _prompt_keys(self, split: str) -> list[int]:
        return [sample.prompt_key for sample in self.splits[split].samples]

    def _known_position(self) -> _Position:
        assert self._position is not None, "set_position(...) must be called before a loader is asked for"
        return self._position

    def _dataset(self, split: str) -> KTODataset:
        return KTODataset(self.splits[split].samples, max_positions=self._max_positions)

    def _loader(self, split: str, sampler: GlobalBatchSampler | ValidationBatchSampler) -> DataLoader[KTOItem]:
        return DataLoader(
            self._dataset(split),
            batch_sampler=sampler,
            collate_fn=collate_pairs,
            num_workers=self._num_workers,
        )


@rank_zero_only
def _log_split(split: str, result: TokenizationResult, *, num_records: int, max_length: int) -> None:
    logger.info(
        "%s data: %d records, %d kept (%d desirable, %d undesirable), %d dropped because they exceed %d tokens",
        split,
        num_records,
        len(result.samples),
        result.num_desirable,
        result.num_undesirable,
        result.num_overlong,
        max_length,
    )


@rank_zero_only
def _warn_about_plain_strings(split: str) -> None:
    logger.warning(
        "%s data: prompts and responses are strings, which are joined as they are, although the tokenizer has a chat "
        "template. For a chat model write them as messages, unless the strings are in its format already.",
        split,
    )


@rank_zero_only
def _warn_without_kl(global_batch_size: int) -> None:
    if global_batch_size == 1:
        logger.warning(
            "global_batch_size is 1: no response can be paired with another prompt, so the KL estimate is that of the "
            "sample itself and its loss stays near 0.5; use at least 4."
        )
