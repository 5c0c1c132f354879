"""From a Hugging Face folder into a Megatron model, one tensor at a time."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch

from nemo_kto.algorithms.finite import is_finite
from nemo_kto.errors import CheckpointError
from nemo_kto.network.gpt import KTOGPTModel
from nemo_kto.network.sharded import sharded_leaves
from nemo_kto.network.weight_rules import Piece, Region, expected_shapes, match
from nemo_kto.weights.folder import SafetensorsFolder, listed

_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # buffers that old folders store; computed from the configuration


@torch.no_grad()
def import_hf(model: KTOGPTModel, folder: str | Path) -> None:
    """Fill this rank's part of `model` from a Hugging Face folder; values are cast to the parameters' dtype.

    Needs no communication and holds one block of one tensor in memory at a time.

    Raises:
        CheckpointError: The folder has no weights, lacks or has surplus tensors, or they have other shapes, or a value
            that this rank reads is not finite.
    """
    rules = model.rules()
    with SafetensorsFolder(Path(folder)) as source:
        _check_tensors(source, model)
        for leaf in sharded_leaves(model):
            rule = match(rules, leaf.key)
            block = rule.layout.read(rule.pieces, leaf.region, partial(_read_finite, source))
            leaf.data[: len(block)].copy_(block)
            leaf.data[len(block) :].zero_()


def _read_finite(source: SafetensorsFolder, piece: Piece, region: Region) -> torch.Tensor:
    """Return what `source.read` does; training from NaN would look like a learning rate that is too high."""
    block = source.read(piece, region)
    if not is_finite(block):
        raise CheckpointError(
            f"{source.folder}: {piece.name} holds values that are not finite (NaN or infinity). The files are "
            "damaged, or the model had diverged: use another copy of it."
        )
    return block


def _check_tensors(source: SafetensorsFolder, model: KTOGPTModel) -> None:
    """Raise a CheckpointError unless the folder holds exactly the model's tensors in the right shapes."""
    expected = expected_shapes(model.rules())
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
