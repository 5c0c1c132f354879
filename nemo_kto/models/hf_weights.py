"""Import and export of a Megatron model's weights from and to a Hugging Face folder, one tensor at a time.

Importing involves no communication: every rank checks the whole folder by its file headers, so that all ranks fail
alike, then reads from disk only the rows and columns it holds. Exporting is collective: the blocks of each tensor
travel to rank 0, which writes them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from nemo_kto.errors import CheckpointError
from nemo_kto.models.gpt import KTOGPTModel
from nemo_kto.models.hf_rules import Leaf, Region, expected_shapes, match, rules_for, sharded_leaves
from nemo_kto.runtime import parallel

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # buffers that old folders store; computed from the configuration
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
_SAMPLES, _SAMPLED_BYTES = 32, 1 << 12


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

    def read(self, name: str, region: Region) -> torch.Tensor:
        """Return one block of a tensor in the file's dtype; nothing else of the tensor is read."""
        block: torch.Tensor = self._slice_of(name)[region]
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


@torch.no_grad()
def import_hf(model: KTOGPTModel, folder: str | Path) -> None:
    """Fill this rank's part of `model` from a Hugging Face folder; values are cast to the parameters' dtype.

    Needs no communication and holds one block of one tensor in memory at a time.

    Raises:
        CheckpointError: The folder has no weights, lacks or has surplus tensors, or they have other shapes.
    """
    rules = rules_for(model)
    with SafetensorsFolder(Path(folder)) as source:
        _check_tensors(source, model)
        for leaf in sharded_leaves(model):
            rule = match(rules, leaf.key)
            block = rule.layout.read(rule.names, leaf.region, source.read)
            leaf.data[: len(block)].copy_(block)
            leaf.data[len(block) :].zero_()


def _check_tensors(source: SafetensorsFolder, model: KTOGPTModel) -> None:
    """Raise a CheckpointError unless the folder holds exactly the model's tensors in the right shapes."""
    expected = expected_shapes(model)
    missing = sorted(expected.keys() - source.names)
    if missing:
        raise CheckpointError(
            f"{source.folder} lacks {listed(missing)}. Its weights are incomplete or belong to another config.json."
        )
    surplus = sorted(name for name in source.names - expected.keys() if not _IGNORED.search(name))
    if model.share_embeddings_and_output_weights and "lm_head.weight" in surplus:
        surplus.remove("lm_head.weight")  # some folders store the tied matrix a second time
    if surplus:
        raise CheckpointError(f"{source.folder} holds tensors its config.json has no place for: {listed(surplus)}.")
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.folder}: {name} has the shape {list(source.shape(name))}, config.json says {list(shape)}."
            )


def listed(names: Sequence[str]) -> str:
    """Return the first few of many names, as a text."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more tensors" if more > 0 else "")


@torch.no_grad()
def export_hf(
    chunks: Sequence[KTOGPTModel],
    hf_config: PretrainedConfig,
    folder: str | Path,
    *,
    tokenizer_folder: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    card: str | None = None,
) -> None:
    """Write a model as a Hugging Face folder; collective over all ranks, rank 0 writes.

    The folder appears under its name when it is complete. Rank 0 holds at most one file's tensors plus one in memory.

    Args:
        chunks: This rank's chunks of the model, not wrapped.
        hf_config: Its configuration.
        folder: Folder to create; it may exist only if it is empty.
        tokenizer_folder: Folder whose tokenizer, chat template and generation config are copied; its `config.json`
            too, letter by letter, when it describes this very model.
        dtype: Dtype of the written weights; None for the one `hf_config` names, which is the imported folder's, or
            the model's own if it names none.
        max_shard_bytes: Size above which the weights are divided into several files.
        card: Text of its README.md, on rank 0; None for none.

    Raises:
        CheckpointError: `folder` exists and is not empty, or cannot be written; raised on all ranks.
    """
    new = NewFolder(Path(folder))
    dtype = dtype or configured_dtype(hf_config) or next(chunks[0].parameters()).dtype
    writer = _ShardWriter(new.partial, max_shard_bytes)
    failure = f"The model cannot be written to {folder}"

    def finish() -> None:
        writer.finish()
        _write_companions(new.partial, hf_config, dtype, Path(tokenizer_folder) if tokenizer_folder else None)
        if card is not None:
            (new.partial / "README.md").write_text(card, encoding="utf-8")
        new.finish()

    parallel.run_on_rank_zero(new.start, failure)
    rules = rules_for(chunks[0])
    for key, full in gathered_tensors(chunks):
        if full is not None:
            rule = match(rules, key)
            for name, tensor in zip(rule.names, rule.layout.split(full), strict=True):
                writer.add(name, tensor.to(device="cpu", dtype=dtype))
    parallel.run_on_rank_zero(finish, failure)


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


def gathered_tensors(
    chunks: Sequence[KTOGPTModel], *, adapters: bool = False
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield (key, full tensor) of all stages in turn, on rank 0; (key, None) elsewhere.

    One exchange of names and places, then one message per block that rank 0 does not hold itself. Of equal blocks on
    several ranks (data parallelism, norms, tied embeddings) the lowest rank's is taken.

    Args:
        chunks: This rank's chunks of the model, not wrapped.
        adapters: See `sharded_leaves`.
    """
    rank = dist.get_rank()
    leaves = {(leaf.key, _corner(leaf)): leaf for chunk in chunks for leaf in sharded_leaves(chunk, adapters=adapters)}
    mine = {place: (leaf.global_shape, leaf.region) for place, leaf in leaves.items()}
    everyone: list[dict[tuple[str, tuple[int, ...]], Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    owners: dict[str, dict[tuple[int, ...], int]] = {}
    for owner, places in enumerate(everyone):
        for key, corner in places:
            owners.setdefault(key, {}).setdefault(corner, owner)
    any_parameter = next(chunks[0].parameters())
    for key in sorted(owners, key=_natural):
        full = None
        for corner, owner in owners[key].items():
            global_shape, region = everyone[owner][key, corner]
            if rank == 0:
                full = any_parameter.new_empty(global_shape) if full is None else full
                if owner == 0:
                    full[region] = leaves[key, corner].data
                else:
                    block = full.new_empty([part.stop - part.start for part in region])
                    dist.recv(block, src=owner)
                    full[region] = block
            elif rank == owner:
                dist.send(leaves[key, corner].data.contiguous(), dst=0)
        yield key, full


def _corner(leaf: Leaf) -> tuple[int, ...]:
    return tuple(part.start for part in leaf.region)


def _natural(key: str) -> list[tuple[int, str]]:
    """Return a sort key under which layer 10 follows layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


@dataclass
class _ShardWriter:
    """Collects tensors and writes a file whenever the next one would make it larger than `max_bytes`.

    A file that cannot be written is an error of `finish` only: until then the other ranks go on sending.
    """

    folder: Path
    max_bytes: int
    _pending: dict[str, torch.Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0
    _total_bytes: int = 0
    _files: list[list[str]] = field(default_factory=list)
    _error: OSError | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, give the files their final names and write the index if there are several."""
        self._flush()
        if self._error is not None:
            raise self._error
        count = len(self._files)
        if count == 1:
            self._unnamed(0).rename(self.folder / WEIGHTS_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._unnamed(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        try:
            save_file(self._pending, self._unnamed(len(self._files)), metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            self._error = self._error or OSError(str(error))
        self._files.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _unnamed(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"


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


def _write_companions(folder: Path, config: PretrainedConfig, dtype: torch.dtype, source: Path | None) -> None:
    """Write config.json and copy what else makes a folder loadable."""
    if source is not None:
        copy_companions(source, folder)
    if source is not None and configured_dtype(config) == dtype and _describes(source, config):
        shutil.copyfile(source / "config.json", folder / "config.json")
        return
    written = type(config).from_dict(config.to_dict())
    written.dtype = dtype
    written.save_pretrained(folder)


def _describes(folder: Path, config: PretrainedConfig) -> bool:
    if not (folder / "config.json").is_file():
        return False
    found = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    return {**found, "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
