"""One file for each family of models, named as Hugging Face names it (`model_type`); `family.py` says what is in it.

A new file is a new family: nothing else has to name it. Start with `llama.py`, which the others vary.
"""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_kto.errors import ConfigError
from nemo_kto.network.family import Dimensions, Family
from nemo_kto.runtime.layout import ModelSizes

SUPPORTED_MODEL_TYPES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def family_of(hf: Any, source: str | Path = "") -> Family:
    """Return the family of a model's configuration.

    Args:
        hf: The configuration, of which `model_type` is read.
        source: Where it comes from, for the message.

    Raises:
        ConfigError: The family is not supported.
    """
    if hf.model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"{source or 'The model'}: the architecture {hf.model_type!r} is not supported. "
            f"Supported are: {', '.join(model_types())}; of {' and '.join(parts_of_wholes())} the language "
            "model."
        )
    return _family(hf.model_type)


@functools.cache
def model_types() -> tuple[str, ...]:
    """Return the supported architectures of models that are no part of one that sees images."""
    return tuple(name for name in SUPPORTED_MODEL_TYPES if _family(name).alone)


def _family(name: str) -> Family:
    family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family


@functools.cache
def parts_of_wholes() -> dict[str, tuple[str, ...]]:
    """Return the models that see images -> what their language models (`text_config`) may be."""
    found: dict[str, tuple[str, ...]] = {}
    for name in SUPPORTED_MODEL_TYPES:
        for whole in _family(name).part_of:
            found[whole] = (*found.get(whole, ()), name)
    return dict(sorted(found.items()))


def dimensions_of(hf: Any) -> Dimensions:
    """Return the sizes of the model of a configuration."""
    return family_of(hf).dimensions(hf)


def sizes_of_folder(folder: Path) -> ModelSizes | None:
    """Return what a layout has to divide of the model in a folder, without loading torch or transformers.

    None where its config.json does not say enough, or cannot be read: that is for whoever loads it to judge.
    """
    try:
        keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        parts = parts_of_wholes().get(keys.get("model_type"))
        if parts is not None:
            # Qwen2.5-VL is published with the fields of its language model beside all others
            keys = keys["text_config"] if "text_config" in keys else {**keys, "model_type": parts[0]}
        hf = SimpleNamespace(**{"tie_word_embeddings": False, **keys})
        sizes = dimensions_of(hf).divided
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, ConfigError):
        return None
    numbers = (sizes.num_layers, sizes.num_attention_heads, sizes.num_query_groups, sizes.ffn_hidden_size or 1)
    return sizes if all(isinstance(number, int) and number > 0 for number in numbers) else None
