"""What the keys of `model.data` mean for reading and tokenising; without torch, so that a look at data is quick."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_kto.config.plugins import load_function
from nemo_kto.config.schema import DataConfig, KTOConfig
from nemo_kto.data.reading.labels import parse_words
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import Source, parse_source
from nemo_kto.data.tokens.pictures import ImageTokens
from nemo_kto.data.tokens.rendering import CHAT, TokenizationSettings
from nemo_kto.errors import ConfigError, git_lfs_hint

_PROCESSORS = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "llava": "LlavaProcessor", "gemma3": "Gemma3Processor"}
"""Architecture of a model that is trained on images -> its processor in transformers."""

_COUNTS_GRID = ("qwen2_5_vl",)
"""Those that count positions in the rows and columns of an image."""


def sources(
    data: DataConfig, entries: Sequence[str | Mapping[str, Any]], *, reader_key: str = "model.data.reader"
) -> list[Source]:
    """Return what some entries of `data_prefix` mean; a ConfigError if that is nothing.

    Args:
        data: `model.data`.
        entries: The entries; one that is a mapping may have a `reader` of its own.
        reader_key: What `data.reader` is called where the user wrote it.
    """
    reader = RowReader(
        data.format,
        data.fields or {},
        data.desirable_if,
        parse_words(data.labels),
        data.json_strings,
        chat=data.prompt_template == CHAT,
    )
    found = []
    for entry in entries:
        path, key = data.reader, reader_key
        if isinstance(entry, Mapping) and "reader" in entry:
            path, key = entry["reader"], f"model.data.data_prefix: in {dict(entry)}, reader"
            entry = {name: value for name, value in entry.items() if name != "reader"}
        found.append(parse_source(entry, reader, None if path is None else load_function(path, key=key)))
    return found


def tokenization_settings(data: DataConfig) -> TokenizationSettings:
    """Return how records become tokens."""
    return TokenizationSettings(
        append_eod=data.append_eod,
        prompt_template=data.prompt_template,
        special_tokens=data.special_tokens,
        system=data.system,
        template_losses=data.template_losses,
    )


def image_tokens(folder: Path) -> ImageTokens | None:
    """Return what the data needs to know of the model in a folder, if that is one that is trained on images.

    Raises:
        ConfigError: Its config.json cannot be read.
    """
    file = folder / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} is not a JSON object: {error}.{git_lfs_hint(file)}") from error
    if kind not in _PROCESSORS:
        return None
    from transformers import AutoConfig  # only now: it takes longer than small data does

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its checks of single fields raise classes with no common base
        text = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"{file} cannot be read by transformers ({type(error).__name__}: {text}).") from error
    token = getattr(config, "image_token_id", None)
    if not isinstance(token, int):
        raise ConfigError(f"{file} names no token of images; image_token_id has to be its number.")
    return ImageTokens(str(folder.absolute()), _PROCESSORS[kind], token, counts_grid=kind in _COUNTS_GRID)


def check_named(data: DataConfig, *, trains: bool) -> None:
    """Raise a ConfigError unless the configuration names the data that a command needs.

    Args:
        data: `model.data`.
        trains: Whether there has to be data to train on; otherwise, to validate on.
    """
    if not trains and not data.data_prefix.validation and not data.validation_fraction:
        raise ConfigError(
            "There is no held-out data. Set model.data.data_prefix.validation to a file with feedback, or several."
        )
    if not data.data_prefix.train and (trains or data.validation_fraction):
        raise ConfigError(
            "There is no training data. Set model.data.data_prefix.train to a file with feedback, or several."
        )


def without_training(config: KTOConfig) -> KTOConfig:
    """Return the configuration without what only training needs: its data, if nothing depends on it, and a cache."""
    kto, data = config.model.kto, config.model.data
    if kto.reference.mode == "cached":  # its log-probs are kept for a whole run, training data included
        kto = replace(kto, reference=replace(kto.reference, mode="auto", cache_dir=None))
    if data.data_prefix.validation and "auto" not in (kto.desirable_loss_weight, kto.undesirable_loss_weight):
        data = replace(data, data_prefix=replace(data.data_prefix, train=None))
    return replace(config, model=replace(config.model, kto=kto, data=data))
