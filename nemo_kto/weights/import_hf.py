"""From a Hugging Face folder into a Megatron model, one tensor at a time."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_kto.algorithms.finite import is_finite
from nemo_kto.errors import CheckpointError
from nemo_kto.network.families import family_of
from nemo_kto.network.family import whole_of
from nemo_kto.network.gpt import VISION_PREFIX, KTOGPTModel
from nemo_kto.network.quantised_weight import QuantisedWeight
from nemo_kto.network.sharded import Leaf, sharded_leaves
from nemo_kto.network.stored import DTYPES, SafetensorsFolder
from nemo_kto.network.tables import OUTPUT
from nemo_kto.network.vision import Vision, VisionSettings, can_see
from nemo_kto.network.weight_rules import (
    ByHead,
    Layout,
    Piece,
    Region,
    Rule,
    all_pieces,
    is_of_language_model,
    match,
    names_in_whole,
    spellings,
)
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.weights.folder import listed
from nemo_kto.weights.quantise import Quantiser

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

_AT_ONCE = 1 << 25
"""Most numbers of a tensor that are read in one go."""
_QUANTISED_AT_ONCE = 1 << 20
"""The same where they are quantised, which takes several times their memory."""

_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers that old folders store, as transformers ignores them: they follow from the configuration."""


@torch.no_grad()
def import_hf(model: KTOGPTModel, folder: str | Path, *, keys: Collection[str] | None = None) -> None:
    """Fill this rank's part of `model` from a Hugging Face folder; values are cast to the parameters' dtype.

    Needs no communication, and holds some rows of one tensor in memory at a time: 64 MB in bfloat16, or whole heads;
    twice as much, in float32, of what is stored in fewer bits.

    Args:
        model: A chunk of the model on any rank, not wrapped.
        folder: The folder.
        keys: Names in the sharded state dict of the tensors to fill; None for all.

    Raises:
        CheckpointError: The folder has no weights, lacks or has surplus tensors, or they have other shapes, or a value
            that this rank reads is not finite.
    """
    rules = model.rules()
    with SafetensorsFolder(Path(folder)) as source:
        _check_tensors(source, model.hf_config, rules)
        if source.quantised:
            _warn_of_bits(source, _kept_as(model))
        if source.left_out:
            _warn_of_activations(source.folder, source.left_out[0], len(source.left_out))
        for leaf in itertools.chain(sharded_leaves(model), model.frozen_leaves()):
            if keys is not None and leaf.key not in keys:
                continue
            rule = match(rules, leaf.key)
            pieces = [piece.found_among(source.names)[0] for piece in rule.pieces]
            read = functools.partial(_read_finite, source)
            if isinstance(leaf.data, QuantisedWeight):
                quantiser = Quantiser(leaf, rule.layout, pieces, read, source.scales_of_scales)
                for region, data in _parts(leaf, rule.layout, _QUANTISED_AT_ONCE):
                    quantiser.fill(data, region)
                continue
            for region, data in _parts(leaf, rule.layout, _AT_ONCE):
                block = rule.layout.read(pieces, region, read)
                data[: len(block)].copy_(block)
                data[len(block) :].zero_()


def _parts(leaf: Leaf, layout: Layout, most: int) -> Iterator[tuple[Region, torch.Tensor]]:
    """Yield (region, view of the parameter) of each part of a leaf that is read in one go: some of its rows.

    A vocabulary is a good share of what a rank keeps. Rows that belong to a head stay together.

    Args:
        leaf: The leaf.
        layout: How pieces make it up.
        most: So many numbers at most.
    """
    rows, *rest = leaf.region
    of_head = sum(layout.rows) if isinstance(layout, ByHead) else 1
    at_once = of_head * max(1, most // max(1, of_head * math.prod(leaf.data.shape[1:])))
    for start in range(0, len(leaf.data), at_once):
        data = leaf.data[start : start + at_once]
        first = rows.start + start
        yield (slice(first, first + len(data)), *rest), data


def _read_finite(source: SafetensorsFolder, piece: Piece, region: Region) -> torch.Tensor:
    """Return what `source.read` does; training from NaN would look like a learning rate that is too high."""
    block = source.read(piece, region)
    if not is_finite(block):
        raise CheckpointError(
            f"{source.folder}: {piece.name} holds values that are not finite (NaN or infinity). The files are "
            "damaged, or the model had diverged: use another copy of it."
        )
    return block


def check_weights(folder: Path, hf_config: Any, *, vision: VisionSettings | None = None) -> None:
    """Raise a CheckpointError unless a folder holds exactly the tensors of a model, in the right shapes.

    Reads the files' headers only.

    Args:
        folder: Folder of a Hugging Face model.
        hf_config: The model's configuration, from `load_hf_config`.
        vision: What of the model sees images; None where it is trained on text.
    """
    rules = family_of(hf_config).rules(hf_config)
    if vision is not None:
        with torch.device("meta"):
            rules += Vision(vision, torch.float32).rules(VISION_PREFIX)
    with SafetensorsFolder(folder) as source:
        _check_tensors(source, hf_config, rules, may_see=can_see(hf_config))


def _check_tensors(source: SafetensorsFolder, hf_config: Any, rules: Sequence[Rule], *, may_see: bool = False) -> None:
    """Raise a CheckpointError unless the folder holds exactly the model's tensors in the right shapes.

    Args:
        source: The folder.
        hf_config: The model's configuration.
        rules: Which tensors are read.
        may_see: Whether those that see images may be read later, if they are not now.
    """
    expected: dict[str, tuple[int, ...]] = {}
    missing: set[str] = set()
    for piece in all_pieces(rules):
        found = piece.found_among(source.names)
        if found:
            expected[found[0].name] = found[0].tensor_shape
        else:
            missing.add(piece.name)
    # a tied matrix may be there a second time: `load_hf_config` has seen that it is the same
    outputs = {*spellings(OUTPUT), *names_in_whole(OUTPUT)}
    copies = outputs if hf_config.tie_word_embeddings else set()
    surplus = sorted(name for name in source.names - expected.keys() - copies if not _IGNORED.search(name))
    surplus = _without_further_layers(source.folder, surplus, hf_config)
    if whole_of(hf_config) is not None:
        of_whole = [name for name in surplus if not is_of_language_model(name)]
        if not any(rule.key.startswith(VISION_PREFIX) for rule in rules):
            if not may_see:
                _warn_passed_on(source.folder, str(whole_of(hf_config)), len(of_whole))
        elif of_whole:
            _warn_once("%s: what sees images has no place for %s: exported as it is.", source.folder, listed(of_whole))
        surplus = [name for name in surplus if name not in of_whole]
    if missing and missing <= outputs:
        raise CheckpointError(_without_output_layer(source, hf_config, surplus))
    if missing:
        raise CheckpointError(
            f"{source.folder} lacks {listed(sorted(missing))}. Its weights are incomplete or belong to another "
            "config.json."
        )
    if surplus:
        raise CheckpointError(f"{source.folder} holds tensors its config.json has no place for: {listed(surplus)}.")
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.folder}: {name} has the shape {list(source.shape(name))}, config.json says {list(shape)}."
            )
        if source.dtype(name) not in DTYPES:
            raise CheckpointError(
                f"{source.folder}: {name} is stored as {source.dtype(name)}; quantised weights cannot be trained. Use "
                "the model's unquantised folder."
            )


def _without_further_layers(folder: Path, names: list[str], hf_config: Any) -> list[str]:
    """Return the names without those of layers that are left out of the model, which is said once."""
    family, of_model = family_of(hf_config), hf_config.num_hidden_layers
    if family.further_tensors is not None:
        further = {name for name in names if name.startswith(family.further_tensors)}
        where = f"whose names begin with {family.further_tensors}"
    elif family.further_layers:
        further = {name for name in names if (found := _LAYER.search(name)) and int(found[1]) >= of_model}
        where = f"of layers from number {of_model} on"
    else:
        return names
    if further:
        _warn_left_out(folder, where, len(further))
    return [name for name in names if name not in further]


def _kept_as(model: KTOGPTModel) -> str | None:
    """Return in which format a model's linear layers are kept: a key of `quantised_weight.FORMATS`, or None."""
    return next((each.kind for each in model.parameters() if isinstance(each, QuantisedWeight)), None)


def _warn_of_bits(source: SafetensorsFolder, kind: str | None) -> None:
    """Say what becomes of what a folder stores in fewer bits."""
    if kind is None:
        what = "they are trained, and exported, as the plain numbers they stand for"
    elif source.has_numbers_of(kind.removesuffix("_double")):
        what = "they are kept so"
    else:
        what = "the plain numbers they stand for are quantised again"
    _warn_once("%s holds matrices in %s: %s.", source.folder, source.bits, what)


@functools.cache
def _warn_once(message: str, *values: object) -> None:
    if is_global_rank_zero():
        logger.warning(message, *values)


@functools.cache
def _warn_of_activations(folder: Path, first: str, tensors: int) -> None:
    if is_global_rank_zero():
        logger.warning(
            "%s: tensors that are for computing, or keeping keys and values, in fewer bits are left out, %d in all, "
            "such as %s: training does not do that.",
            folder,
            tensors,
            first,
        )


@functools.cache
def _warn_passed_on(folder: Path, whole: str, tensors: int) -> None:
    if is_global_rank_zero():
        logger.warning(
            "%s: of this %s its language model is trained, on text; the %d tensors of the rest, which see images, are "
            "not loaded, and exported as they are.",
            folder,
            whole,
            tensors,
        )


@functools.cache
def _warn_left_out(folder: Path, where: str, tensors: int) -> None:
    if is_global_rank_zero():
        logger.warning(
            "%s: the %d tensors %s, which guess several tokens at once, are left out, as in "
            "transformers; what is exported has none, and its config.json counts none.",
            folder,
            tensors,
            where,
        )


def _without_output_layer(source: SafetensorsFolder, hf_config: Any, surplus: list[str]) -> str:
    """Return what to say of a model without an output layer; transformers would fill one with random numbers."""
    saved_as = ", ".join(
        getattr(hf_config, "architectures", None) or ["an architecture that config.json does not name"]
    )
    instead = f", but has {listed(surplus)}" if surplus else ""
    return (
        f"{source.folder} lacks {OUTPUT}, the output layer{instead}: it was saved as {saved_as}. Use the folder of "
        "the whole language model, or, if its output layer is the embedding, set tie_word_embeddings to true in its "
        "config.json."
    )
