"""Small images, drawn here without a library, and every way to write one into a row of feedback."""

import base64
import struct
import zlib
from pathlib import Path
from typing import Any


def png(number: int) -> bytes:
    """A PNG file of two by two pixels, of another colour for each number."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = b"".join(b"\0" + bytes([20 * number, 255 - 20 * number, 7]) * 2 for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def base64_of(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def data_uri(file: Path) -> str:
    return f"data:image/png;base64,{base64_of(file)}"


def wrapped(file: Path) -> str:
    """base64 in lines, as mail and openssl write it."""
    return base64.encodebytes(file.read_bytes()).decode()


FILES: dict[str, Any] = {
    "name": lambda file: f"pictures/{file.name}",
    "name with a dot": lambda file: f"./pictures/{file.name}",
    "name from the root": str,
    "file://": lambda file: f"file://{file}",
    "file://localhost": lambda file: f"file://localhost{file}",
    "struct of a path": lambda file: {"bytes": None, "path": f"pictures/{file.name}"},
}
"""Ways to name a file beside the folder that holds the data; as values of a column and as `image` of a part."""

BYTES: dict[str, Any] = {
    "data URI": data_uri,
    "data URI with settings": lambda file: f"data:image/png;name=a.png;base64,{base64_of(file)}",
    "base64": base64_of,
    "base64 in lines": wrapped,
    "struct of base64": lambda file: {"bytes": base64_of(file), "path": "a.png"},
}
"""Ways to write its bytes; the same."""

FILE_PARTS: dict[str, Any] = {
    "transformers, path": lambda file: {"type": "image", "path": str(file)},
    "transformers, url of a file": lambda file: {"type": "image", "url": f"file://{file}"},
    "early Qwen": lambda file: {"image": f"pictures/{file.name}"},
    "OpenAI, a file": lambda file: {"type": "image_url", "image_url": {"url": f"file://{file}"}},
    "`datasets`, a path": lambda file: {"type": "image", "bytes": None, "path": f"pictures/{file.name}", "text": None},
}
"""Parts of messages that name a file, besides `{"type": "image", "image": ...}` with what is in `FILES`."""

BYTES_PARTS: dict[str, Any] = {
    "transformers, base64": lambda file: {"type": "image", "base64": base64_of(file)},
    "transformers, url": lambda file: {"type": "image", "url": data_uri(file)},
    "data": lambda file: {"type": "image", "data": base64_of(file)},
    "bytes": lambda file: {"type": "image", "bytes": base64_of(file), "path": "elsewhere.png"},
    "OpenAI": lambda file: {"type": "image_url", "image_url": {"url": data_uri(file), "detail": "low"}},
    "OpenAI, a string": lambda file: {"type": "image_url", "image_url": data_uri(file)},
    "OpenAI, responses": lambda file: {
        "type": "input_image",
        "image_url": data_uri(file),
        "file_id": None,
        "detail": "auto",
    },
    "Anthropic": lambda file: {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": base64_of(file)},
    },
    "LangChain": lambda file: {
        "type": "image",
        "source_type": "base64",
        "mime_type": "image/png",
        "data": base64_of(file),
    },
}
"""The same with its bytes."""
