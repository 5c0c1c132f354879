"""What a checkpoint consists of, written down last: its files, their sizes and checksums; without torch.

A bit that flips in a file of weights changes no shape and raises no error: training would go on from other numbers, or
a wrong model be exported. `manifest.json` tells. It is written when everything else is on the disk, so a checkpoint
that has one was written to its end; those of versions that wrote none can be read, but not verified.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

MANIFEST_FILE = "manifest.json"

_VERSION = 1
_PIECE = 1 << 22
_MOST_BYTES = 1 << 26
"""Of a manifest that is read; a larger one is not ours."""

Entry = dict[str, Any]
"""`size` in bytes and `xxh3_128`, in hexadecimal."""


def entry_of(file: Path) -> Entry:
    """Return size and checksum of a file as it is read from disk; an OSError if it cannot be read."""
    digest, size = xxhash.xxh3_128(), 0
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            size += len(piece)
    return {"size": size, "xxh3_128": digest.hexdigest()}


def files_of(folder: Path) -> list[str]:
    """Return the names, relative to `folder`, of all of its files but the manifest."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST_FILE)


def write_manifest(folder: Path, known: Mapping[str, Entry]) -> None:
    """Write the manifest of a folder of which everything else is written, and have all of it on the disk.

    Args:
        folder: The checkpoint.
        known: Entries of files whose writers have made them, and have them on the disk; the others' are made here.

    Raises:
        OSError: A file cannot be read or written.
    """
    names = files_of(folder)
    entries = {name: known[name] if name in known else _settled(folder / name) for name in names}
    manifest = folder / MANIFEST_FILE
    partial = manifest.with_name(f"{MANIFEST_FILE}.partial")
    partial.write_text(json.dumps({"version": _VERSION, "files": entries}, indent=1) + "\n", encoding="utf-8")
    synchronize(partial)
    for inner in {(folder / name).parent for name in names} | {folder}:
        synchronize(inner)
    partial.replace(manifest)
    synchronize(folder)


def _settled(file: Path) -> Entry:
    synchronize(file)
    return entry_of(file)


def synchronize(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Entry] | None:
    """Return the entries of a checkpoint's files by name; None if it has no manifest.

    Raises:
        ValueError: The manifest is damaged, or names files outside of the folder.
    """
    file = folder / MANIFEST_FILE
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = {
            str(name): {"size": int(e["size"]), "xxh3_128": str(e["xxh3_128"])} for name, e in content["files"].items()
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST_FILE} is damaged ({error})") from error
    for name in entries:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{MANIFEST_FILE} names {name}, which is outside of the checkpoint")
    return entries


def first_fault(folder: Path, *, names: Iterable[str] | None = None, checksums: bool = True) -> str | None:
    """Return what is wrong with the files of a checkpoint, None if nothing is; of one without a manifest, None.

    Args:
        folder: The checkpoint.
        names: The files to look at, of those in the manifest; None for all.
        checksums: Whether files are read; otherwise only their sizes are compared.
    """
    try:
        entries = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name in () if entries is None else (entries if names is None else names):
        assert entries is not None
        if name not in entries:
            return f"{name} is none of its files"
        fault = _fault_of(folder / name, entries[name], checksums=checksums)
        if fault is not None:
            return f"{name} {fault}"
    return None


def _fault_of(file: Path, entry: Entry, *, checksums: bool) -> str | None:
    try:
        if not file.is_file():
            return "is missing"
        size = file.stat().st_size
        if size != entry["size"]:
            return f"has {size:,} bytes, not the {entry['size']:,} it was written with"
        if checksums and entry_of(file) != entry:
            return "is not what was written: its checksum is another"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None
