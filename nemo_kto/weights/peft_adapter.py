"""Adapter folders of PEFT: read to go on from, written to be loaded by `peft` or `transformers`.

A folder is `adapter_config.json` and `adapter_model.safetensors`, whose tensors are this package's, under other names;
the B of a fused projection is those of its parts, one below the other. Reading involves no communication; writing
gathers the adapters on rank 0.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from nemo_kto.algorithms.finite import is_finite
from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.network.families import dimensions_of, family_of
from nemo_kto.network.gpt import KTOGPTModel
from nemo_kto.network.projections import LINEAR_OF, LoRASettings, adapted_modules
from nemo_kto.network.sharded import sharded_leaves
from nemo_kto.runtime import parallel
from nemo_kto.weights.adapter_config import CONFIG_FILE, read_adapter_settings
from nemo_kto.weights.adapter_tensors import (
    WEIGHTS_FILE,
    expected_shapes,
    joined,
    linear_sizes,
    piece_of,
    place_of,
    prefix_of,
    stored_shapes,
    whole_module_of,
    whole_tensors,
)
from nemo_kto.weights.export_hf import gathered_tensors
from nemo_kto.weights.folder import NewFolder, copy_companions, listed
from nemo_kto.weights.shard_writer import cast

logger = logging.getLogger(__name__)

_SHAPE = (
    "target_modules",
    "adapter_dim",
    "rank_pattern",
    "alpha",
    "alpha_pattern",
    "rslora",
    "dora",
    "modules_to_save",
    "layer_selection",
)
"""Keys of `model.peft.lora_tuning` that an adapter folder fixes."""

_MEANINGS: dict[tuple[str, ...], Callable[[LoRASettings, str], float]] = {
    ("adapter_dim", "rank_pattern"): LoRASettings.rank_of,
    ("alpha", "alpha_pattern"): LoRASettings.alpha_of,
}
"""Keys of those that together say what each module has -> what that is."""


def check_projections(settings: LoRASettings, hf_config: PretrainedConfig) -> None:
    """Raise a ConfigError when chosen projections cannot have adapters in a model of this family."""
    in_mlp = [name for name in settings.projections if LINEAR_OF[name].startswith("mlp.")]
    if in_mlp and not family_of(hf_config).feed_forward_adapters:
        raise ConfigError(
            f"model.peft.lora_tuning.target_modules: {listed(in_mlp)} cannot have adapters in a model of the "
            f"architecture {hf_config.model_type!r}. Experts can have none, and PEFT takes these names for theirs, in "
            "whichever layer. Use attention."
        )


def check_adapter(folder: Path, settings: LoRASettings, hf_config: PretrainedConfig) -> None:
    """Raise unless `folder` holds the adapters that `settings` describe, for a model of `hf_config`.

    Raises:
        ConfigError: It holds others; the message says which keys would fit.
        CheckpointError: It cannot be used at all, or lacks tensors, or they have other shapes.
    """
    found = read_adapter_settings(folder)
    if max(found.layers) >= hf_config.num_hidden_layers:
        raise CheckpointError(
            f"The adapter in {folder} has tensors of layer {max(found.layers) + 1}, and the model only has "
            f"{hf_config.num_hidden_layers} layers. It is of another model."
        )
    theirs, ours = (_as_keys(kind, hf_config.num_hidden_layers) for kind in (found, settings))
    for keys, meaning in _MEANINGS.items():
        # patterns that are written in another way may well mean the same
        if all(
            meaning(found, name) == meaning(settings, name) for name in adapted_modules(settings, hf_config).values()
        ):
            theirs |= {key: ours[key] for key in keys}
    different = [f"model.peft.lora_tuning.{key}={theirs[key]}" for key in _SHAPE if theirs[key] != ours[key]]
    if different:
        raise ConfigError(f"The adapter in {folder} is of another kind. Set {' '.join(different)}.")
    expected, shapes = expected_shapes(settings, hf_config), stored_shapes(folder)
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise CheckpointError(_incomplete(folder, missing, shapes.keys()))
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: {name} has the shape {list(shapes[name])}, the model needs {list(shape)}. "
                "Is it of another model?"
            )


def _incomplete(folder: Path, missing: Sequence[str], found: Collection[str]) -> str:
    """Return what to say of an adapter that lacks tensors of layers and projections of which it has some."""
    there = {place_of(name) for name in found}
    for name in missing:
        if whole_module_of(name) is not None:
            return f"{folder / WEIGHTS_FILE}: {name} is missing, as modules_to_save says it is there. Save it again."
        if place_of(name) in there:
            return (
                f"{folder / WEIGHTS_FILE}: {name} is missing, though others of its module are there. Save the adapter "
                "again."
            )
    places = dict.fromkeys(place for place in map(place_of, missing) if place is not None)
    lacking = listed([f"{projection} of layer {layer + 1}" for layer, projection in places], "projections")
    return (
        f"The adapter in {folder} has nothing for {lacking}. Here all layers with adapters have them for the same "
        "projections. Merge it into its model with PEFT and start from that, or train one whose target_modules are "
        "the same in all layers_to_transform."
    )


@torch.no_grad()
def import_adapter(model: KTOGPTModel, folder: Path) -> None:
    """Fill this rank's part of the adapters; `check_adapter` has been passed. Values are cast to their dtype.

    Raises:
        CheckpointError: A value that this rank reads is not finite.
    """
    sizes, prefix = linear_sizes(model.hf_config), prefix_of(model.hf_config)
    whole, vocabulary = whole_tensors(model.hf_config), dimensions_of(model.hf_config).vocabulary
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as source:
        for leaf in sharded_leaves(model, adapters=True):
            if leaf.key in whole:
                name, (rows, *rest) = whole[leaf.key], leaf.region
                region = (slice(min(rows.start, vocabulary), min(rows.stop, vocabulary)), *rest)
                leaf.data.zero_()  # the padding
            else:
                rank = leaf.global_shape[0 if leaf.key.endswith("lora_a") else -1]
                piece = piece_of(leaf.key, sizes, rank=rank, prefix=prefix)
                name, region = piece.name, piece.within(leaf.region)
            block = source.get_slice(name)[region]
            if not is_finite(block):
                raise CheckpointError(
                    f"{folder / WEIGHTS_FILE}: {name} holds values that are not finite (NaN or infinity). The "
                    "file is damaged, or the adapter had diverged: use another copy of it."
                )
            leaf.data[: len(block)].copy_(block)


@torch.no_grad()
def export_adapter(
    chunks: Sequence[KTOGPTModel],
    source_folder: Path,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Write the adapters of a model as a folder for PEFT; collective over all ranks, rank 0 writes.

    Args:
        chunks: This rank's chunks of the model, not wrapped.
        source_folder: Folder with the adapters' `adapter_config.json`, tokenizer and chat template, which are copied.
        folder: Folder to create; it may exist only if it is empty. It appears under its name when it is complete.
        dtype: Dtype of the written adapters, but see `shard_writer.cast`; None for that they were trained in.
        card: Text of its README.md, on rank 0; None for none.

    Raises:
        CheckpointError: `folder` exists and is not empty, or cannot be written; raised on all ranks.
    """
    tensors = {key: full.cpu() for key, full in gathered_tensors(chunks, adapters=True) if full is not None}
    write = partial(write_adapter, tensors, chunks[0].hf_config, source_folder, folder, dtype=dtype, card=card)
    parallel.run_on_rank_zero(write, f"The adapter cannot be written to {folder}")


def write_adapter(
    tensors: Mapping[str, torch.Tensor],
    hf_config: PretrainedConfig,
    source_folder: Path,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Write an adapter folder from full tensors by their names in the sharded state dict, on this process.

    `hf_config` is the configuration of the model they belong to. The other arguments are those of `export_adapter`.

    Raises:
        OSError: See `export_adapter`.
    """
    new = NewFolder(folder)
    new.start()
    copy_companions(source_folder, new.partial)
    shutil.copyfile(source_folder / CONFIG_FILE, new.partial / CONFIG_FILE)
    written = joined(tensors, hf_config)
    if dtype is not None:
        written = {name: cast(tensor, dtype) for name, tensor in written.items()}
        if any(tensor.dtype != dtype for tensor in written.values()):
            logger.warning("%s: float16 cannot hold all numbers; some tensors are written in bfloat16.", folder)
    try:
        save_file(written, new.partial / WEIGHTS_FILE, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    if card is not None:
        (new.partial / "README.md").write_text(card, encoding="utf-8")
    new.finish()


def _as_keys(settings: LoRASettings, num_layers: int) -> dict[str, Any]:
    """Return the values of `_SHAPE` that mean `settings`."""
    whole = settings.layers == tuple(range(num_layers))
    return {
        "target_modules": f"[{', '.join(settings.projections)}]",
        "adapter_dim": settings.rank,
        "rank_pattern": _as_mapping(settings.rank_pattern),
        "alpha": settings.alpha,
        "alpha_pattern": _as_mapping(settings.alpha_pattern),
        "rslora": str(settings.rslora).lower(),
        "dora": str(settings.dora).lower(),
        "modules_to_save": f"[{', '.join(settings.whole)}]" if settings.whole else "null",
        "layer_selection": "null" if whole else [layer + 1 for layer in settings.layers],
    }


_OF_HYDRA = re.compile(r"[\\()\[\]{}:=, ]")
"""What means something in a value on the command line."""


def _as_mapping(patterns: Mapping[str, float]) -> str:
    """Return patterns as the value of a key, which takes no quotes inside."""
    escaped = {_OF_HYDRA.sub(r"\\\g<0>", pattern): value for pattern, value in patterns.items()}
    pairs = [f"{pattern}: {value}" for pattern, value in escaped.items()]
    return f"{{{', '.join(pairs)}}}" if pairs else "null"
