"""Images of records, as a model's processor in transformers takes them: by how many tokens, and as which numbers.

What decides is in the model's folder: its image processor, of which the form that works with Pillow is always taken,
so that pixels do not depend on what else is installed, and its processor, which says what stands for an image in a
prompt. The processor's part for videos, which needs torchvision, is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_kto.data.reading.records import Image, RecordError
from nemo_kto.data.tokens.image_files import ImageError, bytes_of, decoded, image_key, state_of
from nemo_kto.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_FILES = ("preprocessor_config.json", "processor_config.json")
"""Where a folder says how images are processed."""

_SIZES = 4096
"""Sizes of images that are remembered with what stands for them."""


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """What the data needs to know of a model that sees images.

    Attributes:
        folder: The folder with its processor.
        processor: The processor's class in transformers.
        image_token_id: The token in whose place the features of an image come.
        counts_grid: Whether the model counts positions in the rows and columns of an image.
    """

    folder: str
    processor: str
    image_token_id: int
    counts_grid: bool = False

    def digest(self) -> str:
        """A digest of all that decides which tokens stand for an image."""
        files = [Path(self.folder) / name for name in _FILES]
        contents = [file.read_bytes().hex() if file.is_file() else "" for file in files]
        return hashlib.blake2b(repr((astuple(self)[1:], contents)).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Stand:
    """What stands for an image of some size in a prompt.

    Attributes:
        text: As text; it takes the place of the token that the chat template writes.
        num_tokens: How many tokens of it the features of the image take the place of.
        rows: Rows of those; 0 where the model does not count them.
        columns: Their columns; likewise.
    """

    text: str
    num_tokens: int
    rows: int = 0
    columns: int = 0


@dataclass(frozen=True, slots=True)
class SeenImage:
    """An image that can be used.

    Attributes:
        image: Where it is.
        key: See `image_key`.
        width: Its pixels, upright.
        height: Its pixels, upright.
        frames: How many its file has; it is the first.
        stand: What stands for it.
        deep: See `DecodedImage`.
        state: See `state_of`; None for one that is in no file of its own.
    """

    image: Image
    key: int
    width: int
    height: int
    frames: int
    stand: Stand
    deep: bool = False
    state: list[int] | None = None


class ImageReader:
    """Reads images for one model and its tokenizer; whatever it needs is loaded with the first image."""

    def __init__(self, tokens: ImageTokens, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keeps both; loads nothing."""
        self.tokens = tokens
        self._tokenizer = tokenizer
        self._stands = lru_cache(_SIZES)(self._stand)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels between processes without what it has loaded."""
        return ImageReader, (self.tokens, self._tokenizer)

    @cached_property
    def processor(self) -> Any:
        """The model's processor; a ConfigError if the folder has none that can be used."""
        return _load_processor(self.tokens, self._tokenizer)

    @property
    def placeholder(self) -> str:
        """What a chat template writes for an image."""
        return str(self.processor.image_token)

    def look_at(self, images: Sequence[Image]) -> tuple[SeenImage, ...]:
        """Decodes images once, to see that it is possible, and how large they are.

        Raises:
            RecordError: One of them is of no use; the reason names it.
            ConfigError: See `processor`.
        """
        return tuple(self._look_at(number, image) for number, image in enumerate(images, 1))

    def _look_at(self, number: int, image: Image) -> SeenImage:
        try:
            state = None if image.file is None else state_of(image.file)  # first, should it be written meanwhile
            data = bytes_of(image)
            found = decoded(data)
            width, height = found.pixels.size
            stand = self._stands(width, height)
            return SeenImage(image, image_key(data), width, height, found.frames, stand, found.deep, state)
        except ImageError as error:
            where = "" if image.file is None else f" ({image.file})"
            raise RecordError(f"image {number}{where} {error}", file=image.file) from error

    def _stand(self, width: int, height: int) -> Stand:
        """What stands for an image of that size: it depends on nothing else."""
        from PIL.Image import new

        processor, tokens = self.processor, self.tokens
        try:
            inputs = processor.image_processor(images=[new("RGB", (width, height))])
        except ValueError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ImageError(f"of {width} x {height} pixels is refused by the image processor ({reason}).") from error
        try:
            text = str(processor.replace_image_token(inputs, image_idx=0))
        except TypeError as error:  # of numbers that are not there
            raise ConfigError(
                f"{tokens.folder}: nothing tells by how many tokens {tokens.processor} shows an image ({error}). Its "
                "processor_config.json has to say so; save the processor anew with transformers."
            ) from error
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        number = ids.count(tokens.image_token_id)
        if not number:
            raise ConfigError(
                f"{tokens.folder}: config.json names token {tokens.image_token_id} as that of images, and the "
                f"tokenizer makes none of what {tokens.processor} writes for one. The two do not belong together."
            )
        if not tokens.counts_grid:
            return Stand(text, number)
        merge = processor.image_processor.merge_size
        rows, columns = (int(side) // merge for side in inputs["image_grid_thw"][0][1:])
        assert rows * columns == number, (rows, columns, number)
        return Stand(text, number, rows, columns)

    def put_into(self, text: str, images: Sequence[SeenImage]) -> str:
        """Returns what a chat template wrote of a prompt, with what is shown of each image in its place.

        Raises:
            RecordError: It has not as many places for images.
        """
        pieces = text.split(self.placeholder)
        if len(pieces) == 1:
            raise RecordError(
                f"the chat template writes nothing for an image, where {self.placeholder} is expected. Use the "
                "template of the model's processor, in chat_template.jinja or chat_template.json."
            )
        if len(pieces) != len(images) + 1:
            raise RecordError(
                f"the chat template writes {self.placeholder} {len(pieces) - 1} times for {len(images)} images."
            )
        shown = [image.stand.text for image in images]
        return "".join(part for pair in zip(pieces, [*shown, ""], strict=True) for part in pair)

    def inputs(self, data: bytes) -> dict[str, Tensor]:
        """Returns what the model's vision tower takes of an image: name -> `[k, ...]`.

        Args:
            data: The bytes of its file.

        Raises:
            ImageError: They are no image.
        """
        found = self.processor(images=[decoded(data).pixels], return_tensors="pt")
        unused = getattr(self.processor, "unused_input_names", ())
        names = [name for name in self.processor.image_processor.model_input_names if name not in unused]
        return {name: found[name] for name in names if name in found}


def _load_processor(tokens: ImageTokens, tokenizer: PreTrainedTokenizerBase) -> Any:
    import transformers
    from transformers import AutoImageProcessor

    folder = Path(tokens.folder)
    kind = getattr(transformers, tokens.processor)
    if not any((folder / name).is_file() for name in _FILES):
        raise ConfigError(
            f"{folder}: the data has images, and the folder has no image processor; expected {' or '.join(_FILES)}."
        )
    try:
        load: Any = AutoImageProcessor.from_pretrained
        images = load(folder, backend="pil", local_files_only=True, trust_remote_code=False)
        parts = {"image_processor": images, "tokenizer": tokenizer}
        processor = _without_videos(kind).from_args_and_dict(
            [parts.get(name) for name in kind.get_attributes()], _settings(folder / _FILES[1])
        )
    except Exception as error:  # the readers behind it raise anything
        text = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"{folder}: its processor of images cannot be loaded ({type(error).__name__}: {text})."
        ) from error
    if not hasattr(kind, "replace_image_token"):
        raise ConfigError(
            f"transformers {version('transformers')} does not tell what stands for an image in a prompt. Install a "
            "newer one to train on images."
        )
    if getattr(images, "do_pan_and_scan", False):
        raise ConfigError(
            f"{folder}: do_pan_and_scan is not supported: an image is shown once, whole. Take it out of {_FILES[0]}."
        )
    return processor


def _without_videos(kind: Any) -> Any:
    """The class of a processor whose part for videos may be None."""

    class WithoutVideos(kind):  # type: ignore[misc]  # its base is chosen by the model
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    return WithoutVideos


def _settings(file: Path) -> dict[str, Any]:
    """What a processor's own file says, without its chat template and its parts."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name: value for name, value in content.items() if name not in ("chat_template", "audio_tokenizer")}
