"""Prompts as the model sees them, and the tokens that end an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from nemo_kto.data.reading.containers import read_rows
from nemo_kto.data.reading.json_strings import MESSAGES, messages_in, settled_reading
from nemo_kto.data.reading.records import BadRecord, Messages, RecordError
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.tokenization import Encoder
from nemo_kto.errors import DataError


def read_prompts(file: Path) -> list[str | Messages]:
    """Return the field `prompt` of each row of a file, a text or a list of messages.

    Raises:
        DataError: The file cannot be read, a row has none, or some of them spell messages as JSON and others do not.
    """
    prompts: list[str | Messages] = []
    for row in read_rows(file):
        if isinstance(row, BadRecord):
            raise DataError(str(row))
        prompt = row.values.get("prompt")
        if not isinstance(prompt, str | list):
            raise DataError(f"{row.source}:{row.line}: field 'prompt' must be a text or a list of messages.")
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{file}: the file holds no prompt.")
    return _opened(prompts, file)


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


def prompt_tokens(
    prompts: Sequence[str | Messages], tokenizer: PreTrainedTokenizerBase, settings: TokenizationSettings
) -> list[torch.Tensor]:
    """Return the tokens `[p]` int64 of each prompt, as training would make them of a record with that prompt.

    Raises:
        DataError: A prompt cannot be used.
    """
    encoder = Encoder(tokenizer, settings)
    found = []
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, list) and not all(isinstance(message.get("role"), str) for message in prompt):
            raise DataError(f"Prompt {number} cannot be used: a message has no role.")
        try:
            found.append(torch.tensor(encoder.encode_prompt(prompt)))
        except RecordError as error:
            raise DataError(f"Prompt {number} cannot be used: {error}") from error
    return found


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
