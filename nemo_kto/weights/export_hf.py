"""Export of a Megatron model's weights to a Hugging Face folder, one tensor at a time.

It is collective: the blocks of each tensor travel to rank 0, which writes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from nemo_kto.network.families import family_of
from nemo_kto.network.family import whole_of
from nemo_kto.network.gpt import VISION_PREFIX, KTOGPTModel
from nemo_kto.network.quantised_weight import QuantisedWeight
from nemo_kto.network.sharded import Leaf, sharded_leaves
from nemo_kto.network.stored import SafetensorsFolder
from nemo_kto.network.weight_rules import Piece, Rule, all_pieces, is_of_language_model, match
from nemo_kto.runtime import parallel
from nemo_kto.weights.folder import NewFolder, configured_dtype, copy_companions
from nemo_kto.weights.shard_writer import ShardWriter
from nemo_kto.weights.source_form import StoredForm, describes, folder_of_whole, stored_form, write_config

logger = logging.getLogger(__name__)

_LARGEST_FILE = 5 * 10**9
"""Bytes above which weights are divided that come from a single file, or from none."""


@torch.no_grad()
def export_hf(
    chunks: Sequence[KTOGPTModel],
    hf_config: PretrainedConfig,
    folder: str | Path,
    *,
    source_folder: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    card: str | None = None,
) -> None:
    """Write a model as a Hugging Face folder; collective over all ranks, rank 0 writes.

    The folder appears under its name when it is complete. Rank 0 holds at most one file's tensors plus one in memory,
    and a layer's experts where they are one tensor.

    Args:
        chunks: This rank's chunks of the model, not wrapped.
        hf_config: Its configuration.
        folder: Folder to create; it may exist only if it is empty.
        source_folder: The folder the model comes from, or what `write_source_folder` made of it, on rank 0; its
            tokenizer, chat template and generation config are copied. If its config.json describes this very model, it
            is kept but for what changed; so are the names of tensors, and, unless told otherwise, dtypes and files.
            What else is in a model that sees images is read from where its weights are, or were when it was made.
        dtype: Dtype of the written weights; None for that of each tensor in the source, or else the one `hf_config`
            names, or the model's own.
        max_shard_bytes: Size above which the weights are divided into several files; None to divide them as the source
            does.
        card: Text of its README.md, on rank 0; None for none.

    Raises:
        CheckpointError: `folder` exists and is not empty, or cannot be written, or the source cannot be read, or is
            not what it was; raised on all ranks.
    """
    failure = f"The model cannot be written to {folder}"
    plan = _Plan(chunks[0], hf_config, NewFolder(Path(folder)), dtype=dtype)

    def start() -> None:
        plan.start(Path(source_folder) if source_folder else None, max_shard_bytes)

    parallel.run_on_rank_zero(start, failure)
    for key, full in gathered_tensors(chunks, order=plan.order):
        if full is not None:
            plan.add(key, full)
    parallel.run_on_rank_zero(lambda: plan.finish(card), failure)


class _Plan:
    """What is written where, on rank 0.

    Args:
        model: A chunk of the model.
        hf_config: Its configuration.
        new: The folder that is made.
        dtype: See `export_hf`.
    """

    def __init__(
        self, model: KTOGPTModel, hf_config: PretrainedConfig, new: NewFolder, *, dtype: torch.dtype | None
    ) -> None:
        self._rules = model.rules()
        frozen = {leaf.key for leaf in model.frozen_leaves()}
        self._trained = [rule for rule in self._rules if rule.key.startswith(VISION_PREFIX) and rule.key not in frozen]
        self._own_dtype = next(model.parameters()).dtype
        self._hf_config = hf_config
        self._new = new
        self._dtype = dtype
        self._companions: Path | None = None
        self._source: Path | None = None
        self._form: StoredForm | None = None
        self._rest: SafetensorsFolder | None = None
        self._passed_on: list[str] = []

    def start(self, companions: Path | None, max_shard_bytes: int | None) -> None:
        """Read how the source stores the model, and make room."""
        self._companions = companions
        if companions is not None and describes(companions, self._hf_config):
            self._source, self._form = companions, stored_form(companions)
        if whole_of(self._hf_config) is not None:
            self._rest = SafetensorsFolder(folder_of_whole(self._form, whole_of(self._hf_config)))
            further = family_of(self._hf_config).further_tensors
            trained = {place.name for piece in all_pieces(self._trained) for place in self._places(piece)}
            own = (
                name
                for name in self._file_of
                if not is_of_language_model(name)
                and not (further and name.startswith(further))
                and name not in trained
            )
            self._passed_on = sorted(own, key=lambda name: (self._file_of[name], name))
        self._new.start()
        self._writer = self._writer_of(max_shard_bytes)

    def order(self, key: str) -> tuple[Any, ...]:
        """Return what the model's tensors are sorted by: the files of the source, then layers."""
        files = [
            self._file_of.get(place.name, "") for piece in self._rule(key).pieces for place in self._places(piece)
        ]
        return (min(files), max(files), natural(key))

    def add(self, key: str, full: torch.Tensor) -> None:
        """Take a full tensor of the model."""
        rule = self._rule(key)
        if self._rest is not None:
            self._pass_on(self._rest, until=self.order(key)[0])
        for piece, tensor in zip(rule.pieces, rule.layout.split(full), strict=True):
            first, *copies = self._places(piece)
            self._writer.add(first, tensor.cpu())
            for copy in copies:
                self._writer.add(copy, tensor.cpu().clone())  # tensors of a file must not share memory

    def finish(self, card: str | None) -> None:
        """Write what is left, and all that stands beside the weights; give the folder its name."""
        if self._rest is not None:
            with self._rest:
                self._pass_on(self._rest, until=None)
        self._writer.finish()
        dtype = self._dtype if self._form is not None else self._own()
        if self._writer.too_large is not None:
            logger.warning(
                "%s holds %.4g, more than float16 can (65504): it is written in bfloat16, as is every other tensor of "
                "which that is true.",
                *self._writer.too_large,
            )
            # else whoever loads the folder would make float16 of it
            named = dtype or configured_dtype(self._hf_config)
            dtype = torch.bfloat16 if named in (None, torch.float16) else dtype
        folder = self._new.partial
        if self._companions is not None:
            copy_companions(self._companions, folder)
        write_config(folder, self._hf_config, source=self._source, dtype=dtype)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        self._new.finish()

    def _pass_on(self, rest: SafetensorsFolder, *, until: str | None) -> None:
        """Take the tensors of the whole that the model is a part of, of files up to that one; None for all."""
        while self._passed_on and (until is None or self._file_of[self._passed_on[0]] <= until):
            name = self._passed_on.pop(0)
            piece = Piece(name, rest.shape(name))
            self._writer.add(piece, rest.read(piece, tuple(slice(0, size) for size in piece.shape)))

    @property
    def _file_of(self) -> dict[str, str]:
        return {} if self._form is None else self._form.file_of

    def _rule(self, key: str) -> Rule:
        return match(self._rules, key)

    def _places(self, piece: Piece) -> list[Piece]:
        """Return where a piece is written: where the source has it, copies of tied matrices included."""
        return piece.found_among(self._file_of) or [piece]

    def _dtype_of(self, piece: Piece) -> torch.dtype:
        if self._form is not None and piece.name in self._file_of:
            stored = self._form.dtype(piece.name)
            if self._dtype is None or not stored.is_floating_point:
                return stored
        return torch.float32 if piece.keeps_float32 else self._own()

    def _own(self) -> torch.dtype:
        """Return the dtype of what no source says more of."""
        return self._dtype or configured_dtype(self._hf_config) or self._own_dtype

    def _writer_of(self, max_shard_bytes: int | None) -> ShardWriter:
        folder, form = self._new.partial, self._form
        if form is None or max_shard_bytes is not None:
            return ShardWriter(folder=folder, dtype_of=self._dtype_of, max_bytes=max_shard_bytes or _LARGEST_FILE)
        if self._dtype is None:
            # the same tensors in the same files; twice the size is for a source that is divided across layers
            return ShardWriter(
                folder=folder, dtype_of=self._dtype_of, max_bytes=2 * form.largest_file, file_of=form.file_of
            )
        limit = form.largest_file if len(form.files) > 1 else max(form.largest_file, _LARGEST_FILE)
        return ShardWriter(folder=folder, dtype_of=self._dtype_of, max_bytes=limit)


def gathered_tensors(
    chunks: Sequence[KTOGPTModel], *, adapters: bool = False, order: Callable[[str], Any] | None = None
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield (key, full tensor) of all stages in turn, on rank 0; (key, None) elsewhere.

    One exchange of names and places, one broadcast of the names' order, then one message per block that rank 0 does
    not hold itself. Of equal blocks on several ranks (data parallelism, norms, tied embeddings) the lowest rank's is
    taken.

    Args:
        chunks: This rank's chunks of the model, not wrapped.
        adapters: See `sharded_leaves`.
        order: What the keys are sorted by, on rank 0; None for the order of layers.
    """
    rank = dist.get_rank()
    leaves = {(leaf.key, _corner(leaf)): leaf for chunk in chunks for leaf in sharded_leaves(chunk, adapters=adapters)}
    mine = {place: (leaf.global_shape, leaf.region, leaf.data.dtype) for place, leaf in leaves.items()}
    everyone: list[dict[tuple[str, tuple[int, ...]], Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    owners: dict[str, dict[tuple[int, ...], int]] = {}
    for owner, places in enumerate(everyone):
        for key, corner in places:
            owners.setdefault(key, {}).setdefault(corner, owner)
    # of what is exchanged; a weight may lie in the host's memory (`adapters_merged`)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    keys = sorted(owners, key=order or natural) if rank == 0 else list(owners)
    dist.broadcast_object_list(keys, src=0)
    for key in keys:
        full = None
        for corner, owner in owners[key].items():
            global_shape, region, dtype = everyone[owner][key, corner]
            if rank == 0:
                full = torch.empty(global_shape, dtype=dtype, device=device) if full is None else full
                if owner == 0:
                    full[region] = _plain(leaves[key, corner])
                else:
                    block = full.new_empty([part.stop - part.start for part in region])
                    dist.recv(block, src=owner)
                    full[region] = block
            elif rank == owner:
                dist.send(_plain(leaves[key, corner]).contiguous().to(device), dst=0)
        yield key, full


def _plain(leaf: Leaf) -> torch.Tensor:
    return leaf.data.plain() if isinstance(leaf.data, QuantisedWeight) else leaf.data


def _corner(leaf: Leaf) -> tuple[int, ...]:
    return tuple(part.start for part in leaf.region)


def natural(key: str) -> list[tuple[int, str]]:
    """Return a sort key under which layer 10 follows layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]
