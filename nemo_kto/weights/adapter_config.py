"""What PEFT's `adapter_config.json` says, and ours."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from nemo_kto.config.adapter_checks import fault_of_patterns
from nemo_kto.errors import CheckpointError, git_lfs_hint
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.family import whole_of
from nemo_kto.network.projections import WHOLE, LoRASettings, ordered
from nemo_kto.network.stored import ADAPTER_FILE, check_one_kind
from nemo_kto.weights.adapter_tensors import MAGNITUDES, WEIGHTS_FILE, place_of, stored_shapes, whole_module_of
from nemo_kto.weights.folder import listed

CONFIG_FILE = ADAPTER_FILE

_FEATURES = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Fields of PEFT's configuration that change what an adapter computes, in ways that are not implemented here."""

_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base model as it is; others (PiSSA, OLoRA, LoftQ ...) change its weights."""


def is_adapter(folder: Path) -> bool:
    """Return whether `folder` holds a PEFT adapter rather than a model; a CheckpointError if it holds both."""
    check_one_kind(folder)
    return (folder / CONFIG_FILE).is_file()


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
    whole = _whole(config)
    strange = [name for name in config.get("modules_to_save") or () if _whole_name(name) is None]
    if strange:
        raise CheckpointError(
            f"The adapter in {folder} has {listed(strange)} in modules_to_save. Trained whole here can be "
            f"{' and '.join(WHOLE)}. Merge it into its model."
        )
    tensors = [name for name in stored_shapes(folder) if whole_module_of(name) not in whole]
    found = {name: place_of(name) for name in tensors}
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
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{file}: modules_to_save={names!r} is not possible. It is a list of names of modules.")
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
        whole=_whole(config),
    )


def _whole(config: dict[str, Any]) -> tuple[str, ...]:
    """Return which modules an adapter has whole, of those that are possible."""
    named = {_whole_name(name) for name in config.get("modules_to_save") or ()}
    return tuple(name for name in WHOLE if name in named)


def _whole_name(name: str) -> str | None:
    """Return which of `WHOLE` a name in `modules_to_save` means, of which the last part tells; None for none."""
    last = name.rpartition(".")[2]
    return last if last in WHOLE else None


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
        "modules_to_save": list(settings.whole) or None,
    }
