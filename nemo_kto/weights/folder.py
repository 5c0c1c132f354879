"""Hugging Face folders: what stands beside the weights, how two are told apart, and how a new one appears."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from nemo_kto.errors import CheckpointError, git_lfs_hint

_TOKENIZER_FILES = (
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

_MODEL_FILES = (
    "generation_config.json",
    # of models that see images
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)

_NAMES_SHOWN = 5

_SAMPLES = 32

_SAMPLED_BYTES = 1 << 12


def listed(names: Sequence[str], kind: str = "tensors") -> str:
    """Return the first few of many names of things of a kind, as a text."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more {kind}" if more > 0 else "")


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
    """Return the dtype named by a configuration, if any."""
    named = getattr(config, "dtype", None)
    return getattr(torch, named.removeprefix("torch.")) if isinstance(named, str) else named


def weights_digest(config: PretrainedConfig | None, folder: Path | None) -> str:
    """Return a digest of a model's configuration and of many places of each of its tensors, its ends included.

    Args:
        config: The configuration, if it counts.
        folder: Folder with safetensors files, of a model or an adapter; None for none.

    Raises:
        CheckpointError: One of the files is none.
    """
    fields = {} if config is None else config.to_dict()
    description = {key: value for key, value in fields.items() if key not in ("_name_or_path", "transformers_version")}
    digest = hashlib.blake2b(json.dumps(description, sort_keys=True, default=str).encode(), digest_size=16)
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        try:
            _digest_tensors(file, digest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{file} is no safetensors file that can be read ({error}).{git_lfs_hint(file)}"
            ) from error
    return digest.hexdigest()


def _digest_tensors(file: Path, digest: Any) -> None:
    """Add many places of each tensor of a file: the length of its header (8 bytes), the header, the tensors."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"its header would have {length:,} bytes")
        header = json.loads(stream.read(length))
        for name, tensor in sorted(header.items()):
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in tensor["data_offsets"])
                digest.update(f"{name}:{tensor['dtype']}:{tensor['shape']}:".encode())
                for place in _sampled_places(start, end):
                    stream.seek(place)
                    digest.update(stream.read(min(_SAMPLED_BYTES, end - place)))


_MOST_HEADER_BYTES = 100_000_000
"""What the safetensors library reads at most."""


def _sampled_places(start: int, end: int) -> list[int]:
    """Return where samples of a tensor begin that lies from `start` to `end`; they cover a small one."""
    last = max(start, end - _SAMPLED_BYTES)
    return sorted({start + (last - start) * number // (_SAMPLES - 1) for number in range(_SAMPLES)})


def copy_companions(source: Path, folder: Path, *, of_tokenizer: bool = True, of_model: bool = True) -> None:
    """Copy what stands beside the weights, byte by byte, as far as `source` has it.

    Args:
        source: Where from.
        folder: Where to; files that are there already are replaced.
        of_tokenizer: Copy tokenizer and chat template.
        of_model: Copy the generation config, and what says how images are prepared.
    """
    names = [*(_TOKENIZER_FILES if of_tokenizer else ()), *(_MODEL_FILES if of_model else ())]
    for config, wanted in (("tokenizer_config.json", of_tokenizer), ("config.json", of_model)):
        names += _code_of(source / config) if wanted else []
    for name in names:
        found = source / name
        if found.is_dir():
            shutil.copytree(found, folder / name, dirs_exist_ok=True)
        elif found.is_file():
            shutil.copyfile(found, folder / name)


def _code_of(config: Path) -> list[str]:
    """Return the Python files that a configuration names beside itself, for whoever trusts them; never run here."""
    try:
        named = json.loads(config.read_text(encoding="utf-8")).get("auto_map") or {}
        places = [place for value in named.values() for place in (value if isinstance(value, list) else [value])]
    except (OSError, ValueError, AttributeError):
        return []
    modules = dict.fromkeys(place.split(".")[0] for place in places if isinstance(place, str))
    return [f"{module}.py" for module in modules if module.isidentifier()]  # others are in repositories of their own
