"""The bytes of an image -> its pixels; whatever they are, none of them is run, and none fills the memory.

Only kinds of files are opened that Pillow decodes by itself: for some others it starts programs. How large an image is
stands at the beginning of its file, and is looked at before anything is decoded. Of a file with several frames the
first one counts, as in transformers; orientation and colours are those of its `load_image`.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from nemo_kto.data.reading.records import Image, printable

if TYPE_CHECKING:
    from PIL.Image import Image as Pixels

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Kinds of files that are read, as Pillow calls them."""

MAX_PIXELS = 89_478_485
"""Of an image: where Pillow begins to speak of a decompression bomb, a quarter of a GiB of colours."""

MAX_RATIO = 200
"""Of the longer side to the shorter, as Qwen's processor has it. CLIP's makes the shorter one as long as a model wants
it: a line of 10,000 pixels, a file of a hundred bytes, would become 12 GB."""

MAX_BYTES = 1 << 30
"""Of a file."""


THUMBNAIL = 128
"""Pixels of the longer side of an image in a page."""


class ImageError(Exception):
    """Raised where an image is of no use; the text is to be read behind its name."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image.

    Attributes:
        pixels: Upright, in red, green and blue.
        frames: How many the file has; `pixels` are the first.
        deep: Whether it has more shades of grey than 256, of which `pixels` have the darkest, and white for others.
    """

    pixels: Pixels
    frames: int
    deep: bool = False


def bytes_of(image: Image) -> bytes:
    """Returns the bytes of an image's file; raises an ImageError if there are none to be had."""
    if image.data is not None:
        return image.data
    assert image.file is not None
    return bytes_of_file(image.file)


def bytes_of_file(file: str) -> bytes:
    """Returns the bytes of a file; raises an ImageError if there are none to be had."""
    try:
        with open(file, "rb", opener=_without_waiting) as handle:
            state = os.fstat(handle.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise ImageError("is no file.")
            if state.st_size > MAX_BYTES:
                raise ImageError(f"is a file of {state.st_size} bytes; no more than {MAX_BYTES} are read.")
            return handle.read()
    except (OSError, ValueError) as error:  # a name can hold what no file's name can
        raise ImageError(f"cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def _without_waiting(file: str, flags: int) -> int:
    """Opens a file; a pipe, which is none, without waiting for someone who writes into it."""
    return os.open(file, flags | os.O_NONBLOCK)


def state_of(file: str) -> list[int] | None:
    """What changes when a file does: its size, and when it was written, in ns; None if there is none."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):  # a name can hold what no file's name can
        return None
    return [found.st_size, found.st_mtime_ns]


def image_key(data: bytes) -> int:
    """A 63-bit number that is the same for equal bytes on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def decoded(data: bytes) -> DecodedImage:
    """Returns the image in a file's bytes; raises an ImageError if there is none."""
    from PIL import Image as pillow  # only where there are images
    from PIL import ImageOps, UnidentifiedImageError

    if not data:
        raise ImageError("is empty.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are judged here, and of what Pillow makes of odd files
            with pillow.open(BytesIO(data), formats=FORMATS) as opened:
                _check_size(*opened.size)
                frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)  # MPO: a photo with previews
                deep = opened.mode.startswith(("I", "F"))  # 16 bits, 32 bits, floating point
                opened.load()
                pixels = ImageOps.exif_transpose(opened).convert("RGB")
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"is no image of a kind that is read ({', '.join(FORMATS)}).") from error
    except pillow.DecompressionBombError as error:
        raise ImageError(f"has more than {MAX_PIXELS} pixels. Make it smaller.") from error
    except Exception as error:  # the readers of the kinds of files raise anything
        raise ImageError(f"cannot be decoded ({printable(' '.join(str(error).split())).rstrip('.')}).") from error
    return DecodedImage(pixels, frames, deep)


def thumbnail(data: bytes) -> str:
    """Returns an image as a page shows it, a data URI of a PNG of at most `THUMBNAIL` pixels a side.

    Args:
        data: The bytes of its file; an ImageError if they are no image.
    """
    pixels = decoded(data).pixels
    pixels.thumbnail((THUMBNAIL, THUMBNAIL))
    file = BytesIO()
    pixels.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"has {width} x {height} pixels; no more than {MAX_PIXELS} are read. Make it smaller.")
    if not width or not height:
        raise ImageError(f"has {width} x {height} pixels.")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(
            f"has {width} x {height} pixels; a side may be {MAX_RATIO} times as long as the other. Cut it, or fill it "
            "up."
        )
