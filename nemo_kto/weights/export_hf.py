"""Import and export of a Megatron model's weights from and to a Hugging Face folder, one tensor at a time.

Importing involves no communication: every rank checks the whole folder by its file headers, so that all ranks fail
alike, then reads from disk only the rows and columns it holds. Exporting is collective: the blocks of each tensor
travel to rank 0, which writes them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from nemo_kto.network.gpt import KTOGPTModel
from nemo_kto.network.sharded import Leaf, sharded_leaves
from nemo_kto.network.weight_rules import Piece, match
from nemo_kto.runtime import parallel
from nemo_kto.weights.folder import INDEX_FILE, WEIGHTS_FILE, NewFolder, configured_dtype, copy_companions


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
    rules = chunks[0].rules()
    for key, full in gathered_tensors(chunks):
        if full is not None:
            rule = match(rules, key)
            for piece, tensor in zip(rule.pieces, rule.layout.split(full), strict=True):
                writer.add(piece, tensor.to(device="cpu", dtype=dtype))
    parallel.run_on_rank_zero(finish, failure)


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
    """Joins pieces to tensors, and writes a file whenever the next tensor would make it larger than `max_bytes`.

    A file that cannot be written is an error of `finish` only: until then the other ranks go on sending.
    """

    folder: Path
    max_bytes: int
    _pieces: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    _pending: dict[str, torch.Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0
    _total_bytes: int = 0
    _files: list[list[str]] = field(default_factory=list)
    _error: OSError | None = None

    def add(self, piece: Piece, values: torch.Tensor) -> None:
        """Take a piece of a tensor; the tensor is written once all its rows are there."""
        pieces = self._pieces.setdefault(piece.name, {})
        pieces[piece.first_row] = values
        if sum(map(len, pieces.values())) < piece.tensor_shape[0]:
            return
        parts = [part for _, part in sorted(self._pieces.pop(piece.name).items())]
        tensor = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_bytes:
            self._flush()
        self._pending[piece.name] = tensor
        self._pending_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, give the files their final names and write the index if there are several."""
        assert not self._pieces, f"the table lacks rows of {list(self._pieces)}"
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
