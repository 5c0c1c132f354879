"""What docs/configuration.md says of each key: the one place where keys are explained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nemo_kto.config.reader import describe, leaf_types, unknown_key_message
from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError

_ROW = re.compile(r"^\| `(?P<key>[\w.]+)` \| `(?P<default>[^`]*)` \| (?P<meaning>.*) \|$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


@dataclass(frozen=True)
class Description:
    """A key.

    Attributes:
        key: Its name, with dots.
        default: As the YAML has it.
        takes: What values may be, in words.
        meaning: A few sentences.
    """

    key: str
    default: str
    takes: str
    meaning: str


def page() -> Path:
    """Return the file of docs/configuration.md: of the clone, or of the installed package."""
    package = Path(__file__).resolve().parents[1]
    folder = package / "docs"
    return (folder if folder.is_dir() else package.parent / "docs") / "configuration.md"


def descriptions() -> dict[str, Description]:
    """Return every key -> what it is, in the order of the page."""
    types = leaf_types(KTOConfig)
    rows = _ROW.finditer(page().read_text(encoding="utf-8"))
    return {
        row["key"]: Description(
            key=row["key"],
            default=row["default"],
            takes=describe(types[row["key"]]),
            meaning=_LINK.sub(r"\1", row["meaning"]),
        )
        for row in rows
        if row["key"] in types
    }


def below(prefix: str) -> list[Description]:
    """Return the key, or those of the section, that is called `prefix`.

    Raises:
        ConfigError: There is neither.
    """
    known = descriptions()
    found = [each for key, each in known.items() if key == prefix or key.startswith(f"{prefix}.")]
    if not found:
        raise ConfigError(unknown_key_message(prefix, [*known, *_sections(known)]))
    return found


def _sections(keys: dict[str, Description]) -> list[str]:
    """Return the sections that keys are in, as `model.kto`."""
    parts = (key.split(".")[:-1] for key in keys)
    return list(dict.fromkeys(".".join(names[:depth]) for names in parts for depth in range(1, len(names) + 1)))
