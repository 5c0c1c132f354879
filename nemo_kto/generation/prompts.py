"""Prompts as the model sees them, and the tokens that end an answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nemo_kto.data.batches.dataset import picture_of
from nemo_kto.data.reading.columns import Columns
from nemo_kto.data.reading.containers import Row, read_rows
from nemo_kto.data.reading.conversations import checked_answer
from nemo_kto.data.reading.image_places import NO_IMAGES, Listed
from nemo_kto.data.reading.images import taken_out
from nemo_kto.data.reading.json_strings import MESSAGES, messages_in, settled_reading
from nemo_kto.data.reading.records import BadRecord, Image, Messages, RecordError
from nemo_kto.data.tokens.contents import IMAGE
from nemo_kto.data.tokens.pictures import ImageTokens, SeenImage
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.tokenization import Encoder
from nemo_kto.errors import DataError
from nemo_kto.generation.rows import Prompt


def read_prompts(file: Path) -> list[str | Messages]:
    """Return the field `prompt` of each row of a file, a text or a list of messages, and the images of the row in it.

    Raises:
        DataError: The file cannot be read, a row has none, some of them spell messages as JSON and others do not, or
            an image is not there.
    """
    rows: list[Row] = []
    for row in read_rows(file):
        if isinstance(row, BadRecord):
            raise DataError(str(row))
        if not isinstance(row.values.get("prompt"), str | list):
            raise DataError(f"{row.source}:{row.line}: field 'prompt' must be a text or a list of messages.")
        rows.append(row)
    if not rows:
        raise DataError(f"{file}: the file holds no prompt.")
    found: list[str | Messages] = []
    for row, prompt in zip(rows, _opened([row.values["prompt"] for row in rows], file), strict=True):
        try:
            listed = Columns(row.values, {}).images()
            found.append(_with_images(prompt, listed, row.source) if _shows(prompt, listed) else prompt)
        except RecordError as error:
            raise DataError(f"{row.source}:{row.line}: {error}") from error
    return found


def _opened(prompts: list[str | Messages], file: Path) -> list[str | Messages]:
    """Return prompts with messages for strings that spell them, as training reads a file of its own."""
    reading = settled_reading([prompt for prompt in prompts if isinstance(prompt, str)], MESSAGES)
    if not isinstance(reading, str):
        raise DataError(
            f"{file}: some prompts are messages as JSON and others text; keep the two in files of their own."
        )
    if reading != "json":
        return prompts
    found = [messages_in(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return [[prompt] if isinstance(prompt, dict) else prompt for prompt in found]


def _shows(prompt: str | Messages, listed: Listed = NO_IMAGES) -> bool:
    """Return whether a prompt may have images: in a column, or as parts of messages."""
    in_parts = isinstance(prompt, list) and any(isinstance(message.get("content"), list) for message in prompt)
    return in_parts or bool(listed.values)


def _taken_apart(prompt: str | Messages, listed: Listed, source: str) -> tuple[str | Messages, tuple[Image, ...]]:
    """Return a prompt as a record has it, and its images; see `FeedbackRecord`."""
    answer = [{"role": "assistant", "content": "."}]  # which a record has
    checked, _ = checked_answer(prompt, answer, names=("prompt", "prompt"), images=listed)
    return taken_out(checked, source)


def _with_images(prompt: str | Messages, listed: Listed, source: str) -> str | Messages:
    """Return a prompt all of whose images are parts of its messages, named from the root."""
    prompt, images = _taken_apart(prompt, listed, source)
    shown = iter(images)
    if isinstance(prompt, str):
        return prompt
    return [
        {**message, "content": [_part(part, shown) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def _part(part: dict[str, Any], shown: Iterator[Image]) -> dict[str, Any]:
    if part["type"] != IMAGE:
        return part
    image = next(shown)
    return {"type": IMAGE, **({"path": image.file} if image.data is None else {"bytes": image.data})}


def prompt_tokens(
    prompts: Sequence[str | Messages],
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizationSettings,
    images: ImageTokens | None = None,
) -> list[Prompt]:
    """Return each prompt as training would make it of a record with that prompt.

    Args:
        prompts: Texts or messages; names of images are relative to the working directory.
        tokenizer: The model's tokenizer.
        settings: How they become tokens.
        images: What to know of a model that takes images; None for one that takes none.

    Raises:
        DataError: A prompt cannot be used.
    """
    encoder = Encoder(tokenizer, settings, images)
    found = []
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, list) and not all(isinstance(message.get("role"), str) for message in prompt):
            raise DataError(f"Prompt {number} cannot be used: a message has no role.")
        try:
            text, shown = _taken_apart(prompt, NO_IMAGES, os.getcwd()) if _shows(prompt) else (prompt, ())
            seen = encoder.see(shown)
            tokens = torch.tensor(encoder.encode_prompt(text, seen))
        except RecordError as error:
            raise DataError(f"Prompt {number} cannot be used: {error}") from error
        found.append(_prompt(tokens, seen, encoder))
    return found


def _prompt(tokens: torch.Tensor, seen: Sequence[SeenImage], encoder: Encoder) -> Prompt:
    if not seen:
        return Prompt(tokens)
    reader = encoder.images
    assert reader is not None, "it has seen them"
    pictures = (picture_of(image, reader) for image in seen)
    return Prompt(tokens, tuple(pictures), reader.tokens.image_token_id)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, *folders: Path | None) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's EOS, the chat template's, `generation_config.json`'s.

    That file is taken from the first of `folders` that has one.
    """
    found = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    end = Encoder(tokenizer, TokenizationSettings(append_eod=False)).end_of_answer
    if end is not None:
        found.add(tokenizer.convert_tokens_to_ids(end))
    files = [folder / "generation_config.json" for folder in folders if folder is not None]
    file = next((file for file in files if file.is_file()), None)
    if file is not None:
        more = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(more) if isinstance(more, list) else {more} - {None}
    return frozenset(found)
