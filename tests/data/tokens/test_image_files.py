"""Files that are no images, too large ones, and those that Pillow would start a program for."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as pillow
from transformers.image_utils import load_image

from nemo_kto.data.reading.records import Image, RecordError
from nemo_kto.data.tokens.image_files import MAX_PIXELS, ImageError, bytes_of, decoded, image_key
from nemo_kto.data.tokens.pictures import ImageReader
from nemo_kto.data.tokens.tokenizer import load_tokenizer
from nemo_kto.runs.records import image_tokens
from tests.data.tiny_processors import drawn, encoded, png, write_folder


def png_of(width, height, rows=b""):
    """A PNG file that says how large it is, whatever follows."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_kinds_that_are_read(kind):
    data = encoded(drawn(9, 7), kind)
    found = decoded(data)
    with pillow.open(io.BytesIO(data)) as opened:
        assert np.array_equal(np.asarray(found.pixels), np.asarray(opened.convert("RGB")))
    assert found.pixels.size == (9, 7) and found.pixels.mode == "RGB" and found.frames == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_colours_are_those_of_transformers(mode):
    image = drawn(9, 7).convert("L").convert("I").convert("I;16") if mode == "I;16" else drawn(9, 7).convert(mode)
    data = encoded(image, "TIFF")
    with pillow.open(io.BytesIO(data)) as opened:
        assert np.array_equal(np.asarray(decoded(data).pixels), np.asarray(load_image(opened)))


def test_images_are_upright():
    image = drawn(9, 7)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    found = decoded(encoded(image, "PNG", exif=exif))
    assert np.array_equal(np.asarray(found.pixels), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty."),
        (b"hello", "is no image of a kind that is read (PNG, JPEG, WEBP, GIF, BMP, TIFF)."),
        (png(9, 7)[:-30], "cannot be decoded (image file is truncated"),
        (encoded(drawn(90, 70), "JPEG")[:-300], "cannot be decoded (image file is truncated"),
        (png(9, 7)[:45] + b"\0\0\0" + png(9, 7)[48:], "cannot be decoded ("),
        (png_of(10_000, 9_000), f"has 10000 x 9000 pixels; no more than {MAX_PIXELS} are read. Make it smaller."),
        (png(2000, 1), "has 2000 x 1 pixels; a side may be 200 times as long as the other."),
        (png(2, 401), "has 2 x 401 pixels; a side may be 200 times as long as the other."),
        (png_of(100_000, 100_000), f"has more than {MAX_PIXELS} pixels. Make it smaller."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n", "is no image of a kind that is read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no image of a kind that is read"),
    ],
    ids=["empty", "text", "cut", "cut jpeg", "damaged", "large", "wide", "high", "bomb", "eps", "svg"],
)
def test_what_is_no_image(data, reason):
    with pytest.raises(ImageError) as error:
        decoded(data)
    assert str(error.value).startswith(reason)


def test_pillow_knows_what_is_refused_here():
    """Of the kinds of files that are refused, Pillow opens some, and would start a program to decode them."""
    with pillow.open(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n")) as opened:
        assert opened.format == "EPS"


def test_nothing_large_is_decoded(monkeypatch):
    loaded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: loaded.append(self.size))
    with pytest.raises(ImageError, match="pixels"):
        decoded(png_of(10_000, 9_000))
    assert loaded == []


def test_files_that_cannot_be_read(tmp_path):
    def reason(file):
        with pytest.raises(ImageError) as error:
            bytes_of(Image(file=str(file)))
        return str(error.value)

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert reason(tmp_path / "gone.png") == "cannot be read (No such file or directory)."
    assert reason(tmp_path) == "cannot be read (Is a directory)." and reason(pipe) == "is no file."
    assert reason("a\0b.png").startswith("cannot be read (embedded null")
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate((1 << 30) + 1)
    assert reason(large) == "is a file of 1073741825 bytes; no more than 1073741824 are read."


def test_keys_are_those_of_the_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(png(9, 7))
    assert image_key(bytes_of(Image(file=str(tmp_path / "a.png")))) == image_key(png(9, 7)) != image_key(png(9, 8))
    assert all(0 <= image_key(bytes([number])) < 2**63 for number in range(200))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_a_bad_image_is_named(name, tmp_path, monkeypatch):
    write_folder(name, tmp_path)
    reader = ImageReader(image_tokens(tmp_path), load_tokenizer(tmp_path))
    (tmp_path / "bad.png").write_bytes(b"hello")
    good = Image(data=png(9, 7))
    for bad, where in ((Image(file=str(tmp_path / "bad.png")), f" ({tmp_path / 'bad.png'})"), (Image(data=b"x"), "")):
        with pytest.raises(RecordError) as error:
            reader.look_at([good, bad])
        assert str(error.value).startswith(f"image 2{where} is no image of a kind that is read")
    if name == "qwen2_5_vl":
        monkeypatch.setattr("nemo_kto.data.tokens.image_files.MAX_RATIO", 2000)
        with pytest.raises(RecordError, match=r"image 1 of 2000 x 2 pixels is refused by the image processor"):
            reader.look_at([Image(data=png(2000, 2))])
