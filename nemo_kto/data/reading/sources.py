"""What a user names as data: files, a saved data set, one of the hub, or what a function of other people reads."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_kto.data.reading.labels import parse_words
from nemo_kto.data.reading.records import FeedbackRecord, json_type
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.errors import ConfigError

RecordsFunction = Callable[[str], Iterable[Mapping[str, Any] | FeedbackRecord]]


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of a list of data.

    Attributes:
        path: A file, a folder with such files, a pattern (`*`, `?`, `[`; `**` for any folders), a folder that
            `datasets` saved, or the name of a data set on the hub.
        weight: How often each record occurs in an epoch: 2 deals all of them twice, 0.5 a half of them.
        max_records: Most records taken; None for all.
        split: Which split of a data set; None for "train", or for the only one.
        name: Which configuration of a data set on the hub.
        reader: How its rows are read.
        function: What yields its rows from `path`, whatever that names: a function of other people, which takes the
            path and returns records as mappings or as `FeedbackRecord`; None for the files, or the data set, of that
            name.
    """

    path: str
    weight: float = 1.0
    max_records: int | None = None
    split: str | None = None
    name: str | None = None
    reader: RowReader = field(default_factory=RowReader)
    function: RecordsFunction | None = None


_MOST_WEIGHT = 1_000_000
_READER_KEYS = ("format", "fields", "desirable_if", "labels", "json_strings")
_KINDS: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "weight": (int, float),
    "max_records": (int,),
    "split": (str,),
    "name": (str,),
    "format": (str,),
    "fields": (dict,),
    "desirable_if": (str, type(None)),
    "labels": (dict, type(None)),
    "json_strings": (str,),
}
"""Key of an entry -> types of its value."""


def parse_source(
    entry: str | Path | Mapping[str, Any], reader: RowReader, function: RecordsFunction | None = None
) -> Source:
    """Returns the source that an entry means: a path, or a mapping with `path` and other attributes of `Source`.

    Args:
        entry: The entry; `format`, `fields` and the like in it count before those of `reader`.
        reader: How rows are read unless the entry says so.
        function: See `Source`.

    Raises:
        ConfigError: A key or a value is impossible.
    """
    reader.check()
    if not isinstance(entry, Mapping):
        return Source(str(entry), reader=reader, function=function)
    where = f"model.data.data_prefix: in {dict(entry)}"
    for key, value in entry.items():
        if key not in _KINDS:
            raise ConfigError(f"{where}, {key!r} is unknown; use {', '.join(_KINDS)}, reader.")
        if isinstance(value, bool) or not isinstance(value, _KINDS[key]):
            kinds = [json_type(kind()) for kind in _KINDS[key]]
            wanted = "whole number" if _KINDS[key] == (int,) else " or ".join(dict.fromkeys(kinds))
            raise ConfigError(f"{where}, {key}={value!r} must be a {wanted}.")
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise ConfigError(f"{where}, {key}={value} must be above 0.")
        if key == "weight" and isinstance(value, int | float) and value > _MOST_WEIGHT:
            raise ConfigError(f"{where}, weight={value} must be at most {_MOST_WEIGHT:,}: so often a record is seen.")
    if not entry.get("path"):
        raise ConfigError(f"{where}, 'path' is missing.")
    own = {key: entry[key] for key in _READER_KEYS if key in entry}
    chosen = replace(reader, **_changes(own))
    chosen.check()
    others = {key: value for key, value in entry.items() if key not in own}
    return Source(**others, reader=chosen, function=function)


def _changes(own: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry's own keys change of the reader for all."""
    changes = dict(own)
    if "labels" in own:
        changes = {"desirable_if": None, **own, "labels": parse_words(own["labels"])}
    elif "desirable_if" in own:  # of two ways to say what labels mean, the entry's own
        changes["labels"] = {}
    return changes
