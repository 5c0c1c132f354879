"""Tokens on disk, memory-mapped: reading a store costs the same for ten records and for ten million.

A store is a folder with the tokens of all samples end to end, an index with one entry for each, the records that could
not be used, and counts. It is written under another name and renamed when it is complete, so a store that is there is
whole, whenever a writer was killed.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from nemo_kto.data.reading.records import BadRecord
from nemo_kto.data.tokens.tokenization import EncodedRecord, token_key

INDEX = np.dtype(
    [
        ("start", "<i8"),  # where its prompt begins in the tokens; its response follows
        ("prompt", "<i4"),  # tokens of the prompt
        ("response", "<i4"),
        ("prompt_key", "<i8"),
        ("response_key", "<i8"),
        ("desirable", "?"),
        ("merged", "?"),  # see EncodedRecord
        ("verbatim", "?"),
        ("spelled", "?"),
        ("weight", "<f4"),
        ("file", "<i4"),  # which of the source's files it was in, counted from 0
    ]
)
"""One sample. Keys are equal for equal tokens, see `token_key`."""

_TOKENS, _SAMPLES, _BAD, _COUNTS = "tokens.bin", "samples.bin", "bad_records.jsonl", "counts.json"
_TOKEN = np.dtype("<i4")


Notes = dict[str, tuple[int, str]]
"""What a person should know about some records: kind -> how many there are, and one of them (see `Note`)."""


def add_notes(notes: Notes, more: Notes) -> None:
    """Adds more records of the same and of other kinds."""
    for kind, (count, example) in more.items():
        before, first = notes.get(kind, (0, example))
        notes[kind] = before + count, first


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Some samples in the form they are stored in; `samples["start"]` counts from the chunk's first token."""

    tokens: np.ndarray
    samples: np.ndarray
    bad: list[BadRecord]
    notes: Notes


def make_chunk(results: Iterable[EncodedRecord | BadRecord], *, file: int = 0) -> TokenChunk:
    """Returns what an `Encoder` made of some records of a source's `file`-th file, in the form it is stored in."""
    rows, bad, parts = [], [], []
    notes: Notes = {}
    start = 0
    for result in results:
        if isinstance(result, BadRecord):
            bad.append(result)
            continue
        prompt, response = np.array(result.prompt, dtype=_TOKEN), np.array(result.response, dtype=_TOKEN)
        keys = token_key(prompt), token_key(response)
        flags = result.desirable, result.merged, result.verbatim, result.spelled
        rows.append((start, len(prompt), len(response), *keys, *flags, result.weight, file))
        parts += [prompt, response]
        start += len(prompt) + len(response)
        add_notes(notes, {note.kind: (1, note.example) for note in result.notes})
    tokens = np.concatenate(parts) if parts else np.empty(0, _TOKEN)
    return TokenChunk(tokens, np.array(rows, dtype=INDEX), bad, notes)


class StoreWriter:
    """Writes a store to a new folder; use it in a `with` statement, at whose end the store is complete on disk."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder; an OSError if that is impossible."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._num_tokens = 0
        self._num_samples = 0
        self._num_bad = 0
        self._notes: Notes = {}

    def __enter__(self) -> "StoreWriter":
        """Opens the files."""
        self._files = {name: (self._folder / name).open("wb") for name in (_TOKENS, _SAMPLES, _BAD)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        """Closes the files; without an error, writes the counts."""
        if kind is None:
            counts: dict[str, Any] = {"tokens": self._num_tokens, "samples": self._num_samples, "bad": self._num_bad}
            counts["notes"] = self._notes
            self._files[_COUNTS] = (self._folder / _COUNTS).open("wb")
            self._files[_COUNTS].write(json.dumps(counts).encode())
        for file in self._files.values():
            if kind is None:
                file.flush()
                os.fsync(file.fileno())  # before the folder gets its name, whatever the file system makes of it
            file.close()

    def add(self, chunk: TokenChunk) -> None:
        """Appends some samples."""
        samples = chunk.samples.copy()
        samples["start"] += self._num_tokens
        self._files[_TOKENS].write(chunk.tokens.tobytes())
        self._files[_SAMPLES].write(samples.tobytes())
        for record in chunk.bad:
            self._files[_BAD].write(json.dumps(asdict(record)).encode() + b"\n")
        self._num_tokens += len(chunk.tokens)
        self._num_samples += len(samples)
        self._num_bad += len(chunk.bad)
        add_notes(self._notes, chunk.notes)


class TokenStore:
    """A store that is complete.

    Attributes:
        folder: The folder.
        samples: [n] `INDEX`, memory-mapped.
        tokens: [all tokens] int32, memory-mapped.
        num_bad: Records that could not be used.
        notes: What a person should know about those that could.
    """

    def __init__(self, folder: Path) -> None:
        """Opens it.

        Raises:
            OSError: There is none.
            ValueError: It is damaged.
        """
        counts = json.loads((folder / _COUNTS).read_text(encoding="utf-8"))
        self.folder = folder
        self.samples = _mapped(folder / _SAMPLES, INDEX, counts["samples"])
        self.tokens = _mapped(folder / _TOKENS, _TOKEN, counts["tokens"])
        self.num_bad: int = counts["bad"]
        self.notes: Notes = {kind: (int(count), str(example)) for kind, (count, example) in counts["notes"].items()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels between processes as the name of its folder."""
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def bad_records(self, limit: int | None = None) -> list[BadRecord]:
        """Returns the records that could not be used, at most `limit`."""
        bad: list[BadRecord] = []
        with (self.folder / _BAD).open("rb") as lines:
            for line in lines:
                if limit is not None and len(bad) == limit:
                    break
                bad.append(BadRecord(**json.loads(line)))
        return bad


def _mapped(file: Path, dtype: np.dtype[Any], count: int) -> np.ndarray:
    if file.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{file} has another size than it was written with")
    return np.memmap(file, dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)


def copy_bad_records(stores: Sequence[TokenStore], file: Path) -> int:
    """Writes the bad records of some stores to one JSON Lines file, replacing it; returns their number."""
    partial = file.with_name(f"{file.name}.partial")
    count = 0
    with partial.open("wb") as out:
        for store in stores:
            if store.num_bad:
                out.write((store.folder / _BAD).read_bytes())
                count += store.num_bad
    partial.replace(file)
    return count
