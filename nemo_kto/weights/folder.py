"""Hugging Face folders: their tensors read one block at a time, what stands beside them, and how a new one appears."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from nemo_kto.errors import CheckpointError
from nemo_kto.network.weight_rules import Piece, Region

WEIGHTS_FILE = "model.safetensors"


INDEX_FILE = "model.safetensors.index.json"


_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


_NAMES_SHOWN = 5


_SAMPLES = 32


_SAMPLED_BYTES = 1 << 12


class SafetensorsFolder:
    """The tensors of a folder with one `model.safetensors` or with shards and an index; a context manager.

    Args:
        folder: Folder of a Hugging Face model.

    Raises:
        CheckpointError: The folder has no weights in the safetensors format, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
        self._file_of = self._locate()

    def __enter__(self) -> SafetensorsFolder:
        """Return the folder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self._stack.close()

    @property
    def names(self) -> set[str]:
        """Names of all tensors of the folder."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the file's header."""
        return tuple(self._slice_of(name).get_shape())

    def read(self, piece: Piece, region: Region) -> torch.Tensor:
        """Return one block of a piece of a tensor in the file's dtype; nothing else of the tensor is read."""
        block: torch.Tensor = self._slice_of(piece.name)[piece.within(region)]
        return block

    def _slice_of(self, name: str) -> Any:
        handle = self._open(self._file_of[name])
        try:
            return handle.get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / self._file_of[name]} lacks the tensor {name}: {error}.") from error

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / file} cannot be read: {error}. Download it again.") from error
        return self._handles[file]

    def _locate(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            try:
                return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{index} is not an index of weights: {error!r}. Download it again.") from error
        if (self.folder / WEIGHTS_FILE).is_file():
            return dict.fromkeys(self._open(WEIGHTS_FILE).keys(), WEIGHTS_FILE)
        hint = ""
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.gguf")):
            hint = " Save the model with transformers' save_pretrained first: only safetensors are read."
        raise CheckpointError(f"{self.folder} holds no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}.{hint}")


def listed(names: Sequence[str]) -> str:
    """Return the first few of many names, as a text."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more tensors" if more > 0 else "")


class NewFolder:
    """A folder that appears under its name when it is complete.

    Attributes:
        partial: Where its files are written until then.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.partial = folder.with_name(folder.name + ".partial")

    def start(self) -> None:
        """Make room; an OSError if there is something already."""
        if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
            raise FileExistsError("it exists already and is not empty. Name another folder or remove it.")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def finish(self) -> None:
        """Give the folder its name."""
        if self._folder.exists():
            self._folder.rmdir()
        self.partial.rename(self._folder)


def configured_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """Return the dtype named by a configuration, if any; transformers 4 calls it `torch_dtype`."""
    named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return getattr(torch, named.removeprefix("torch.")) if isinstance(named, str) else named


def weights_digest(config: PretrainedConfig | None, folder: Path | None) -> str:
    """Return a digest of a model's configuration and of many places of each of its tensors, its ends included.

    Args:
        config: The configuration, if it counts.
        folder: Folder with safetensors files, of a model or an adapter; None for none.
    """
    fields = {} if config is None else config.to_dict()
    description = {key: value for key, value in fields.items() if key not in ("_name_or_path", "transformers_version")}
    digest = hashlib.blake2b(json.dumps(description, sort_keys=True, default=str).encode(), digest_size=16)
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        # a file is the length of its header (8 bytes), the header, and the tensors at the offsets it names
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            for name, tensor in sorted(header.items()):
                if name != "__metadata__":
                    start, end = (8 + length + offset for offset in tensor["data_offsets"])
                    digest.update(f"{name}:{tensor['dtype']}:{tensor['shape']}:".encode())
                    for place in _sampled_places(start, end):
                        stream.seek(place)
                        digest.update(stream.read(min(_SAMPLED_BYTES, end - place)))
    return digest.hexdigest()


def _sampled_places(start: int, end: int) -> list[int]:
    """Return where samples of a tensor begin that lies from `start` to `end`; they cover a small one."""
    last = max(start, end - _SAMPLED_BYTES)
    return sorted({start + (last - start) * number // (_SAMPLES - 1) for number in range(_SAMPLES)})


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation config, byte by byte, as far as `source` has them."""
    for name in _COMPANIONS:
        found = source / name
        if found.is_dir():
            shutil.copytree(found, folder / name)
        elif found.is_file():
            shutil.copyfile(found, folder / name)
