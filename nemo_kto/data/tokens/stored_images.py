"""The images of a token store: not their pixels, but where they are, how large, and how many tokens stand for them.

What a data file holds itself is kept in the store, each image once; of images in files of their own the names are
kept, relative to the data where they are below it, so that a copy of the data finds its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from nemo_kto.data.reading.records import Image
from nemo_kto.data.tokens.image_files import ImageError, bytes_of_file, image_key, state_of
from nemo_kto.data.tokens.pictures import SeenImage
from nemo_kto.errors import DataError

IMAGES = np.dtype(
    [
        ("key", "<i8"),  # see `image_key`
        ("tokens", "<i4"),  # that stand for it
        ("rows", "<i4"),  # of those tokens; 0 where nobody counts them
        ("columns", "<i4"),
        ("width", "<i4"),  # pixels, upright
        ("height", "<i4"),
        ("inline", "?"),  # whether its content is the file itself; else the file's name
        ("start", "<i8"),  # where its content begins
        ("size", "<i8"),  # bytes of its content
        ("state", "<i8", (2,)),  # of a file of its own, see `state_of`; else zeros
    ]
)
"""One image of one sample."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredImage:
    """An image of a sample.

    Attributes:
        key: See `image_key`.
        num_tokens: How many tokens of the prompt stand for it.
        grid: Rows and columns of those; None where the model does not count them.
        width: Its pixels, upright.
        height: Its pixels, upright.
        place: Its file, or the store that holds it, for messages.
        content: [bytes] uint8, the file itself; None for one that has to be read from `place`.
        store: The folder of the store.
    """

    key: int
    num_tokens: int
    grid: tuple[int, int] | None
    width: int
    height: int
    place: str
    content: np.ndarray | None
    store: Path

    def is_there(self, state: list[int]) -> bool:
        """Whether it is what it was; `state` is that of its file then, which is read only if it has another one."""
        if self.content is not None or state_of(self.place) == state:
            return True
        try:
            return image_key(bytes_of_file(self.place)) == self.key
        except ImageError:
            return False

    def read(self) -> bytes:
        """Returns the bytes of its file.

        Raises:
            DataError: The file is gone, or another one than when it was tokenised.
        """
        try:
            data = bytes_of_file(self.place) if self.content is None else self.content.tobytes()
        except ImageError as error:
            raise DataError(f"The image {self.place} {error} Put it back, or remove {self.store}.") from error
        if image_key(data) != self.key:
            raise DataError(
                f"The image {self.place} is not what it was when its tokens were made. Remove {self.store}, so that "
                "they are made anew."
            )
        return data


def image_rows(seen: Sequence[SeenImage], contents: list[Image]) -> np.ndarray:
    """Returns images as entries of an index, whose `start` is the number of their content in a list.

    Args:
        seen: The images.
        contents: Where images are; those that are not there yet are added.
    """
    places = {content: number for number, content in enumerate(contents)}
    rows = []
    for one in seen:
        number = places.setdefault(one.image, len(places))
        if number == len(contents):
            contents.append(one.image)
        stand = one.stand
        inline = one.image.data is not None
        state = tuple(one.state or (0, 0))
        sizes = stand.num_tokens, stand.rows, stand.columns, one.width, one.height
        rows.append((one.key, *sizes, inline, number, 0, state))
    return np.array(rows, dtype=IMAGES)


class ContentWriter:
    """Writes what the images of a store are read from, equal images once.

    Attributes:
        size: Bytes so far.
    """

    def __init__(self, file: IO[bytes], base: Path) -> None:
        """Keeps the file; names of files below `base` are written relative to it."""
        self._file = file
        self._base = str(base)
        self._known: dict[int | str, tuple[int, int]] = {}
        self.size = 0

    def add(self, rows: np.ndarray, contents: Sequence[Image]) -> np.ndarray:
        """Returns entries as they are stored; see `image_rows`."""
        rows = rows.copy()
        for row in rows:
            image = contents[row["start"]]
            name = self._relative(image.file) if image.file is not None else int(row["key"])
            if name not in self._known:
                data = image.data if image.data is not None else str(name).encode("utf-8", "surrogateescape")
                self._file.write(data)
                self._known[name] = self.size, len(data)
                self.size += len(data)
            row["start"], row["size"] = self._known[name]
        return rows

    def _relative(self, file: str) -> str:
        # what is behind a link is not above it: a name with `..` stays as it is
        path, base = os.path.join(os.getcwd(), file), self._base.rstrip(os.sep) + os.sep
        return path.removeprefix(base)


def stored_image(row: np.void, contents: np.ndarray, *, base: Path, store: Path) -> StoredImage:
    """Returns the image of an entry.

    Args:
        row: The entry.
        contents: [bytes] uint8, what the store's images are read from.
        base: What names of files are relative to.
        store: The folder of the store.
    """
    content = contents[int(row["start"]) : int(row["start"]) + int(row["size"])]
    rows = int(row["rows"])
    inline = bool(row["inline"])
    name = str(store) if inline else str(base / content.tobytes().decode("utf-8", "surrogateescape"))
    return StoredImage(
        key=int(row["key"]),
        num_tokens=int(row["tokens"]),
        grid=(rows, int(row["columns"])) if rows else None,
        width=int(row["width"]),
        height=int(row["height"]),
        place=name,
        content=content if inline else None,
        store=store,
    )
