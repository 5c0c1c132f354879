"""Adapter folders of PEFT: read to go on from, written to be loaded by `peft` or `transformers`.

A folder is `adapter_config.json` and `adapter_model.safetensors`, whose tensors are this package's, under other names;
the B of a fused projection is those of its parts, one below the other. Reading involves no communication; writing
gathers the adapters on rank 0.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from nemo_kto.algorithms.finite import is_finite
from nemo_kto.config.adapter_checks import fault_of_patterns
from nemo_kto.errors import CheckpointError, ConfigError, git_lfs_hint
from nemo_kto.network.families import dimensions_of, family_of
from nemo_kto.network.family import whole_of
from nemo_kto.network.gpt import KTOGPTModel
from nemo_kto.network.projections import LINEAR_OF, LoRASettings, adapted_modules, ordered
from nemo_kto.network.sharded import sharded_leaves
from nemo_kto.network.stored import ADAPTER_FILE, check_one_kind
from nemo_kto.runtime import parallel
from nemo_kto.weights.adapter_tensors import (
    MAGNITUDES,
    WEIGHTS_FILE,
    expected_shapes,
    joined,
    linear_sizes,
    piece_of,
    place_of,
    prefix_of,
    stored_shapes,
)
from nemo_kto.weights.export_hf import gathered_tensors
from nemo_kto.weights.folder import NewFolder, copy_companions, listed
from nemo_kto.weights.shard_writer import cast

logger = logging.getLogger(__name__)

CONFIG_FILE = ADAPTER_FILE

_FEATURES = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Fields of PEFT's configuration that change what an adapter computes, in ways that are not implemented here."""

_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base model as it is; others (PiSSA, OLoRA, LoftQ ...) change its weights."""

_SHAPE = (
    "target_modules",
    "adapter_dim",
    "rank_pattern",
    "alpha",
    "alpha_pattern",
    "rslora",
    "dora",
    "layer_selection",
)
"""Keys of `model.peft.lora_tuning` that an adapter folder fixes."""

_MEANINGS: dict[tuple[str, ...], Callable[[LoRASettings, str], float]] = {
    ("adapter_dim", "rank_pattern"): LoRASettings.rank_of,
    ("alpha", "alpha_pattern"): LoRASettings.alpha_of,
}
"""Keys of those that together say what each module has -> what that is."""


def is_adapter(folder: Path) -> bool:
    """Return whether `folder` holds a PEFT adapter rather than a model; a CheckpointError if it holds both."""
    check_one_kind(folder)
    return (folder / CONFIG_FILE).is_file()


def check_projections(settings: LoRASettings, hf_config: PretrainedConfig) -> None:
    """Raise a ConfigError when chosen projections cannot have adapters in a model of this family."""
    in_mlp = [name for name in settings.projections if LINEAR_OF[name].startswith("mlp.")]
    if in_mlp and not family_of(hf_config).feed_forward_adapters:
        raise ConfigError(
            f"model.peft.lora_tuning.target_modules: {listed(in_mlp)} cannot have adapters in a model of the "
            f"architecture {hf_config.model_type!r}. Experts can have none, and PEFT takes these names for theirs, in "
            "whichever layer. Use attention."
        )


def read_adapter_settings(folder: Path) -> LoRASettings:
    """Return what kind of adapters `folder` holds.

    Raises:
        CheckpointError: It is no adapter folder of PEFT, or of a kind that is not possible here.
    """
    config = _read_config(folder)
    used = [name for name in _FEATURES if config.get(name)]
    used += ["bias"] if config.get("bias", "none") != "none" else []
    used += ["init_lora_weights"] if config.get("init_lora_weights", True) not in _PLAIN_STARTS else []
    if config.get("peft_type") != "LORA" or used:
        what = f"uses {listed(used)}" if used else f"is {config.get('peft_type')}, not LORA"
        raise CheckpointError(f"The adapter in {folder} {what}, which is not possible here. Merge it into its model.")
    found = {name: place_of(name) for name in stored_shapes(folder)}
    if not found:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} holds no tensors. Save the adapter again.")
    strange = sorted(name for name, place in found.items() if place is None)
    if strange:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} has tensors of no projection known here: {listed(strange)}.")
    if not config.get("use_dora") and (odd := sorted(name for name in found if name.endswith(MAGNITUDES))):
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} has magnitudes ({listed(odd)}), and {CONFIG_FILE} beside it no use_dora. Save "
            "the adapter again."
        )
    places = [place for place in found.values() if place is not None]
    return _settings(config, (projection for _, projection in places), {layer for layer, _ in places})


def read_adapter_config(folder: Path, *, num_layers: int) -> LoRASettings:
    """Return what kind of adapters an `adapter_config.json` of this package describes.

    Raises:
        CheckpointError: It cannot be read.
    """
    config = _read_config(folder)
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    if isinstance(targets, str) and (found := _IN_WHOLE.fullmatch(targets)):
        targets, layers = found["projections"].split("|"), map(int, found["layers"].split("|"))
    return _settings(config, targets, range(num_layers) if layers is None else layers)


def base_folder(folder: Path) -> Path:
    """Return the folder of the model that the adapters of `folder` belong to.

    Raises:
        CheckpointError: It is not there any more.
    """
    base = Path(str(_read_config(folder).get("base_model_name_or_path")))
    if not base.is_dir():
        raise CheckpointError(f"The base model of these adapters, {base}, is not there. Put it back to merge them.")
    return base


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no adapter of PEFT: {CONFIG_FILE} is not there.")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON that can be read ({error}).{git_lfs_hint(file)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is no JSON object, and so no configuration of an adapter of PEFT.")
    for name, least in (("r", 1), ("lora_alpha", 0)):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise CheckpointError(f"{file}: {name}={value!r} is not possible. It is a number of an adapter of PEFT.")
    for name in ("rank_pattern", "alpha_pattern"):
        fault = fault_of_patterns(config.get(name) or {}, ranks=name == "rank_pattern")
        if fault is not None:
            raise CheckpointError(
                f"{file}: {name} {fault}. Merge the adapter into its model with PEFT if that loads it."
            )
    return config


def _settings(config: dict[str, Any], projections: Iterable[str], layers: Iterable[int]) -> LoRASettings:
    return LoRASettings(
        projections=ordered(projections),
        layers=tuple(sorted(layers)),
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora")),
        dropout=float(config.get("lora_dropout") or 0.0),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        dora=bool(config.get("use_dora")),
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
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as source:
        for leaf in sharded_leaves(model, adapters=True):
            rank = leaf.global_shape[0 if leaf.key.endswith("lora_a") else -1]
            piece = piece_of(leaf.key, sizes, rank=rank, prefix=prefix)
            block = source.get_slice(piece.name)[piece.within(leaf.region)]
            if not is_finite(block):
                raise CheckpointError(
                    f"{folder / WEIGHTS_FILE}: {piece.name} holds values that are not finite (NaN or infinity). The "
                    "file is damaged, or the adapter had diverged: use another copy of it."
                )
            leaf.data.copy_(block)


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
    written = joined(tensors, prefix_of(hf_config))
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


_IN_WHOLE = re.compile(
    r".*\\\.language_model\\\.layers\\\.\((?P<layers>[\d|]+)\)\\\.\(self_attn\|mlp(?:\|mlp\\\.\w+)?\)"
    r"\\\.\((?P<projections>\w[\w|]*)\)"
)
"""The `target_modules` of `adapter_config` in a model that sees images."""


def adapter_config(settings: LoRASettings, *, base_folder: str | Path, hf_config: PretrainedConfig) -> dict[str, Any]:
    """Return PEFT's `adapter_config.json`."""
    every_layer = settings.layers == tuple(range(hf_config.num_hidden_layers))
    targets: list[str] | str = list(settings.projections)
    layers = None if every_layer else list(settings.layers)
    if whole_of(hf_config) is not None:
        # a pattern, for which PEFT looks at no numbers of layers: layers that see images have these names too
        mixture = dimensions_of(hf_config).mixture
        shared = None if mixture is None else mixture.shared
        places = "|".join(["self_attn", "mlp", *([rf"mlp\.{shared.name}"] if shared is not None else [])])
        numbers = "|".join(map(str, settings.layers))
        targets = rf".*\.language_model\.layers\.({numbers})\.({places})\.({'|'.join(targets)})"
        layers = None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_folder),
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": targets,
        "layers_to_transform": layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


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
        "layer_selection": "null" if whole else [layer + 1 for layer in settings.layers],
    }


_OF_HYDRA = re.compile(r"[\\()\[\]{}:=, ]")
"""What means something in a value on the command line."""


def _as_mapping(patterns: Mapping[str, float]) -> str:
    """Return patterns as the value of a key, which takes no quotes inside."""
    escaped = {_OF_HYDRA.sub(r"\\\g<0>", pattern): value for pattern, value in patterns.items()}
    pairs = [f"{pattern}: {value}" for pattern, value in escaped.items()]
    return f"{{{', '.join(pairs)}}}" if pairs else "null"
