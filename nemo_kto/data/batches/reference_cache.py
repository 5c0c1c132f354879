"""Log-probs of the reference on disk: computed once, looked up in training instead of holding the reference's weights.

A document is named by two numbers: the sample whose prompt it has, and the sample whose response. Equal numbers name a
sample itself, others a pair of the KL set. So what is stored does not depend on batches, epochs or layouts; a run that
deals other pairs finds those it shares with earlier ones and adds the rest.

A cache is a folder: `key.json` says what the numbers were computed from, `part-*.safetensors` hold them. Parts are
only ever added whole, so that a run that is killed loses no more than the part it was about to write.

Shapes: `n` documents.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_kto.errors import CheckpointError, ConfigError

Key = Mapping[str, str | int | float | bool | None]
"""What a cache was computed from: the name of a thing, in words for a message, -> its value or digest."""

_KEY_FILE = "key.json"
_PARTS = "part-*.safetensors"
_PARTIAL = ".partial"


class LogprobTable:
    """The log-probs of one split's documents.

    Args:
        num_samples: Samples of the split.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._names = torch.empty(0, dtype=torch.int64)
        self._values = torch.empty(0, dtype=torch.float32)

    def __len__(self) -> int:
        """Number of documents."""
        return self._names.numel()

    def names(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Return what documents are stored under: `[n]` int64.

        Args:
            prompts: `[n]` int64, the samples whose prompts they have.
            responses: `[n]` int64, the samples whose responses they have.
        """
        return prompts * self._num_samples + responses

    def knows(self, names: Tensor) -> Tensor:
        """Return which of `names` `[n]` are there: `[n]` bool."""
        if not len(self):
            return torch.zeros(names.shape, dtype=torch.bool)
        return self._names[self._places(names)] == names

    def look_up(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Return the log-probs of documents that are all there: `[n]` float32, natural log; see `names`."""
        names = self.names(prompts, responses)
        assert bool(self.knows(names).all()), "the cache was not filled for this run"
        return self._values[self._places(names)]

    def add(self, names: Tensor, values: Tensor) -> None:
        """Add documents `[n]` int64 with log-probs `[n]` float32; of equal names the first one counts."""
        names, order = torch.cat([self._names, names]).sort(stable=True)
        values = torch.cat([self._values, values])[order]
        first = torch.ones_like(names, dtype=torch.bool)
        first[1:] = names[1:] != names[:-1]
        self._names, self._values = names[first], values[first]

    def contents(self) -> tuple[Tensor, Tensor]:
        """Return all names `[n]` int64, ascending, and their log-probs `[n]` float32."""
        return self._names, self._values

    def _places(self, names: Tensor) -> Tensor:
        return torch.searchsorted(self._names, names).clamp_max(len(self) - 1)


class ReferenceCache:
    """A folder of log-probs, and their tables in memory.

    One process creates, reads and writes it: others on other machines may see a file later.

    Args:
        folder: The folder.
        key: What the numbers are computed from.
        num_samples: Split -> number of its samples.

    Attributes:
        tables: Split -> log-probs.
    """

    def __init__(self, folder: Path, *, key: Key, num_samples: Mapping[str, int]) -> None:
        self.folder = folder
        self._key = dict(key)
        self.tables = {split: LogprobTable(number) for split, number in num_samples.items()}

    def check(self) -> None:
        """Raise unless the folder is new or holds numbers computed from the same things.

        Raises:
            ConfigError: They were computed from other things; the message names them.
            CheckpointError: The folder holds something else, or cannot be read.
        """
        file = self.folder / _KEY_FILE
        if not file.is_file():
            # what a killed job left is nothing; nor is the key of one that makes the folder at this moment
            if self.folder.exists() and (
                not self.folder.is_dir()
                or any(child.suffix != _PARTIAL and child.name != _KEY_FILE for child in self.folder.iterdir())
            ):
                raise CheckpointError(
                    f"{self.folder} is no cache of reference log-probs, and not empty. Name another folder in "
                    "model.kto.reference.cache_dir."
                )
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}). Remove {self.folder}.") from error
        different = [name for name in {**self._key, **found} if found.get(name) != self._key.get(name)]
        if different:
            raise ConfigError(
                f"The reference log-probs in {self.folder} were computed with another "
                f"{' and another '.join(different)}. Name another folder in model.kto.reference.cache_dir, or remove "
                "this one."
            )

    def create(self) -> None:
        """Make the folder; the first of several jobs that do so at once says what it is of.

        Raises:
            OSError: That is impossible.
            ConfigError: See `check`.
            CheckpointError: See `check`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _KEY_FILE).exists():
            partial = self.folder / f"key-{uuid.uuid4().hex}{_PARTIAL}"
            partial.write_text(json.dumps(self._key, indent=2) + "\n", encoding="utf-8")
            with contextlib.suppress(FileExistsError):
                os.link(partial, self.folder / _KEY_FILE)
            partial.unlink()
        self.check()

    def read(self) -> None:
        """Fill the tables with what has been written so far.

        Raises:
            CheckpointError: A part is damaged.
        """
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {split: [] for split in self.tables}
        for file in sorted(self.folder.glob(_PARTS)):
            try:
                tensors = load_file(file)
                for split, found in parts.items():
                    if f"{split}.names" in tensors:
                        found.append((tensors[f"{split}.names"], tensors[f"{split}.values"]))
            except (OSError, SafetensorError, KeyError) as error:
                raise CheckpointError(
                    f"{file} cannot be read ({error}). Remove it; its part is computed again."
                ) from error
        for split, found in parts.items():
            self.add(split, found)

    def add(self, split: str, found: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add several (names, values) to a split's table."""
        if found:
            names, values = zip(*found, strict=True)
            self.tables[split].add(torch.cat(names), torch.cat(values))

    def write_part(self, found: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> None:
        """Write (names, values) of some splits as one more part; an OSError if that is impossible."""
        tensors: dict[str, Tensor] = {}
        for split, pieces in found.items():
            if pieces:
                names, values = zip(*pieces, strict=True)
                tensors |= {f"{split}.names": torch.cat(names), f"{split}.values": torch.cat(values)}
        # in the order of time: of two jobs that score the same document, the first one's value counts
        part = self.folder / f"part-{time.time_ns():020d}-{uuid.uuid4().hex}.safetensors"
        partial = part.with_suffix(_PARTIAL)
        try:
            save_file(tensors, partial)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        partial.rename(part)
