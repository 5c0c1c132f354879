"""Tokens on disk, memory-mapped: reading a store costs the same for ten records and for ten million.

A store is a folder with the tokens of all samples end to end, an index with one entry for each, the records that could
not be used, where the images are that prompts show, and counts. It is written under another name and renamed when it
is complete, so a store that is there is whole, whenever a writer was killed.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from nemo_kto.data.reading.records import BadRecord, Image
from nemo_kto.data.tokens.image_files import state_of
from nemo_kto.data.tokens.pictures import SeenImage
from nemo_kto.data.tokens.stored_images import IMAGES, ContentWriter, StoredImage, image_rows, stored_image
from nemo_kto.data.tokens.tokenization import EncodedRecord, prompt_key, token_key

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
        ("first_image", "<i8"),  # where its images begin among those of the store
        ("images", "<i4"),  # how many its prompt shows
        ("image_start", "<i4"),  # see EncodedRecord
    ]
)
"""One sample. Keys are equal for equal tokens and images, see `prompt_key` and `token_key`."""

_TOKENS, _SAMPLES, _BAD, _COUNTS = "tokens.bin", "samples.bin", "bad_records.jsonl", "counts.json"
_LOOKED_AT = 10_000
"""Images that are looked at when a store is opened, about; some hundred milliseconds' worth."""

_IMAGES, _CONTENTS = "images.bin", "image_contents.bin"
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
    """Some samples in the form they are stored in.

    Attributes:
        tokens: Of all samples, end to end.
        samples: [n] `INDEX`; `start` and `first_image` count from the chunk's first ones.
        bad: The records that could not be used.
        notes: What a person should know about those that could.
        images: `IMAGES` of all samples, end to end; see `image_rows`.
        contents: Where those are.
    """

    tokens: np.ndarray
    samples: np.ndarray
    bad: list[BadRecord]
    notes: Notes
    images: np.ndarray = field(default_factory=lambda: np.empty(0, IMAGES))
    contents: list[Image] = field(default_factory=list)


def make_chunk(results: Iterable[EncodedRecord | BadRecord], *, file: int = 0) -> TokenChunk:
    """Returns what an `Encoder` made of some records of a source's `file`-th file, in the form it is stored in."""
    rows, bad, parts = [], [], []
    notes: Notes = {}
    images: list[SeenImage] = []
    start = 0
    for result in results:
        if isinstance(result, BadRecord):
            bad.append(result)
            continue
        prompt, response = np.array(result.prompt, dtype=_TOKEN), np.array(result.response, dtype=_TOKEN)
        keys = prompt_key(prompt, [image.key for image in result.images]), token_key(response)
        flags = result.desirable, result.merged, result.verbatim, result.spelled
        shown = len(images), len(result.images), result.image_start
        rows.append((start, len(prompt), len(response), *keys, *flags, result.weight, file, *shown))
        images += result.images
        parts += [prompt, response]
        start += len(prompt) + len(response)
        add_notes(notes, {note.kind: (1, note.example) for note in result.notes})
    tokens = np.concatenate(parts) if parts else np.empty(0, _TOKEN)
    contents: list[Image] = []
    index = image_rows(images, contents)
    return TokenChunk(tokens, np.array(rows, dtype=INDEX), bad, notes, index, contents)


class StoreWriter:
    """Writes a store to a new folder; use it in a `with` statement, at whose end the store is complete on disk."""

    def __init__(self, folder: Path, base: Path | None = None) -> None:
        """Makes the folder; an OSError if that is impossible. `base` is that of `TokenStore`."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._base = folder if base is None else base
        self._files: dict[str, IO[bytes]] = {}
        self._num_tokens = 0
        self._num_samples = 0
        self._num_bad = 0
        self._unusable: dict[str, list[int] | None] = {}
        self._num_images = 0
        self._notes: Notes = {}

    def __enter__(self) -> "StoreWriter":
        """Opens the files."""
        names = (_TOKENS, _SAMPLES, _BAD, _IMAGES, _CONTENTS)
        self._files = {name: (self._folder / name).open("wb") for name in names}
        self._contents = ContentWriter(self._files[_CONTENTS], self._base)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        """Closes the files; without an error, writes the counts."""
        if kind is None:
            counts: dict[str, Any] = {"tokens": self._num_tokens, "samples": self._num_samples, "bad": self._num_bad}
            counts |= {"images": self._num_images, "contents": self._contents.size, "notes": self._notes}
            counts["unusable"] = self._unusable
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
        samples["first_image"] += self._num_images
        self._files[_TOKENS].write(chunk.tokens.tobytes())
        self._files[_SAMPLES].write(samples.tobytes())
        for record in chunk.bad:
            self._files[_BAD].write(json.dumps(record.row()).encode() + b"\n")
            if record.file is not None:
                self._unusable[record.file] = state_of(record.file)
        self._files[_IMAGES].write(self._contents.add(chunk.images, chunk.contents).tobytes())
        self._num_images += len(chunk.images)
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
        images: [all images] `IMAGES`, memory-mapped.
        num_bad: Records that could not be used.
        notes: What a person should know about those that could.
    """

    def __init__(self, folder: Path, base: Path | None = None) -> None:
        """Opens it.

        Args:
            folder: The folder.
            base: The folder of the data that it was made of, which files of images may be named relative to; None for
                the store's own.

        Raises:
            OSError: There is none.
            ValueError: It is damaged.
        """
        counts = json.loads((folder / _COUNTS).read_text(encoding="utf-8"))
        self.folder = folder
        self._base = folder if base is None else base
        self.samples = _mapped(folder / _SAMPLES, INDEX, counts["samples"])
        self.tokens = _mapped(folder / _TOKENS, _TOKEN, counts["tokens"])
        self.images = _mapped(folder / _IMAGES, IMAGES, counts["images"])
        self._contents = _mapped(folder / _CONTENTS, np.dtype("u1"), counts["contents"])
        self.num_bad: int = counts["bad"]
        self._unusable: dict[str, list[int] | None] = counts["unusable"]
        self.notes: Notes = {kind: (int(count), str(example)) for kind, (count, example) in counts["notes"].items()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels between processes as the name of its folder."""
        return TokenStore, (self.folder, self._base)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def is_outdated(self) -> bool:
        """Whether an image that could not be used is another file now, or one of those that could.

        Of very many images some are looked at, evenly; of another one that has changed whoever reads it says so.
        """
        if any(state_of(file) != state for file, state in self._unusable.items()):
            return True
        rows = self.images[:: max(1, len(self.images) // _LOOKED_AT)]
        return not all(self._image(row).is_there(row["state"].tolist()) for row in rows)

    def images_of(self, sample: int) -> tuple[StoredImage, ...]:
        """Returns what the prompt of a sample shows, in order."""
        row = self.samples[sample]
        first = int(row["first_image"])
        return tuple(self._image(image) for image in self.images[first : first + int(row["images"])])

    def _image(self, row: np.void) -> StoredImage:
        return stored_image(row, self._contents, base=self._base, store=self.folder)

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
