"""What the keys of `model.data` mean for reading and tokenising; without Megatron, so that a look at data is quick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_kto.config.schema import DataConfig
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import Source, parse_source
from nemo_kto.data.tokens.rendering import TokenizationSettings


def sources(data: DataConfig, entries: Sequence[str | Mapping[str, Any]]) -> list[Source]:
    """Return what some entries of `data_prefix` mean; a ConfigError if that is nothing."""
    reader = RowReader(data.format, data.fields or {}, data.desirable_if)
    return [parse_source(entry, reader) for entry in entries]


def tokenization_settings(data: DataConfig) -> TokenizationSettings:
    """Return how records become tokens."""
    return TokenizationSettings(data.append_eod, data.prompt_template, data.special_tokens)
