"""Answers of a checkpoint to prompts: the command `nemo-kto generate`, under any parallel layout."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from nemo_kto.data.containers import read_rows
from nemo_kto.data.records import BadRecord, FeedbackRecord, Messages
from nemo_kto.data.rendering import CHAT, TokenizationSettings
from nemo_kto.data.tokenization import Encoder
from nemo_kto.data.tokenizer import load_tokenizer
from nemo_kto.errors import ConfigError, DataError
from nemo_kto.models.checkpoint_model import load_model, source_of
from nemo_kto.models.generation import Sampling, generate
from nemo_kto.models.gpt import load_hf_config
from nemo_kto.models.hf_config import model_sizes
from nemo_kto.models.model_card import read_facts
from nemo_kto.resolve import PARAMS_DTYPES
from nemo_kto.runtime import parallel
from nemo_kto.runtime.layout import Layout, check_layout


def answer_prompts(
    checkpoint: Path,
    prompts: Sequence[str | Messages],
    sampling: Sampling,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    template: bool = True,
) -> list[tuple[str, str]]:
    """Return (prompt as the model sees it, answer) of each prompt; collective over the processes torchrun started.

    Args:
        checkpoint: A checkpoint folder of a run, saved under any layout.
        prompts: Texts or conversations that end before the assistant's answer; at least one.
        sampling: How answers are made.
        tensor: Processes that share every layer.
        pipeline: Stages the layers are divided into.
        template: Put a text into the run's `model.data.prompt_template`, or without one make a user's message of it,
            if the tokenizer has a chat template; otherwise it is taken as it is.

    Raises:
        CheckpointError: See `load_model`.
        ConfigError: The layout fits neither the processes nor the model.
        DataError: A prompt cannot be used.
    """
    source = source_of(checkpoint)
    tokenizer, data = load_tokenizer(source), read_facts(source).get("config", {}).get("model", {}).get("data", {})
    settings = TokenizationSettings(
        append_eod=False,
        prompt_template=(data.get("prompt_template") or (CHAT if tokenizer.chat_template else None))
        if template
        else None,
        special_tokens=data.get("special_tokens", "auto"),
    )
    tokens = prompt_tokens(prompts, tokenizer, settings)
    with parallel.default_group():
        layout = _layout(source, tensor=tensor, pipeline=pipeline)
        parallel.initialize(layout, seed=0)
        answers = generate(
            [load_model(checkpoint, layout, params_dtype=_dtype(source))],
            tokens,
            sampling,
            stop_token_ids=stop_token_ids(tokenizer, source),
            layout=layout,
            place=parallel.position(),
        )
    return [
        (tokenizer.decode(prompt), tokenizer.decode(answer, skip_special_tokens=True))
        for prompt, answer in zip(tokens, answers, strict=True)
    ]


def read_prompts(file: Path) -> list[str | Messages]:
    """Return the field `prompt` of each row of a file, a text or a list of messages.

    Raises:
        DataError: The file cannot be read, or a row has none.
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
    return prompts


def prompt_tokens(
    prompts: Sequence[str | Messages], tokenizer: PreTrainedTokenizerBase, settings: TokenizationSettings
) -> list[torch.Tensor]:
    """Return the tokens `[p]` int64 of each prompt, as training would make them of a record with that prompt.

    Raises:
        DataError: A prompt cannot be used.
    """
    encoder = Encoder(tokenizer, settings)
    records = []
    for number, prompt in enumerate(prompts, 1):
        # any answer: only the prompts' tokens are wanted
        answer: str | Messages = "a" if isinstance(prompt, str) else [{"role": "assistant", "content": "a"}]
        records.append(FeedbackRecord(prompt, answer, True, "prompts", number))
    found = []
    for encoded in encoder.encode(records):
        if isinstance(encoded, BadRecord):
            raise DataError(f"Prompt {encoded.line} cannot be used: {encoded.reason}")
        found.append(torch.tensor(encoded.prompt))
    return found


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, *folders: Path | None) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's EOS token, and those of `generation_config.json`.

    That is taken from the first of `folders` that has one.
    """
    found = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    files = [folder / "generation_config.json" for folder in folders if folder is not None]
    file = next((file for file in files if file.is_file()), None)
    if file is not None:
        more = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(more) if isinstance(more, list) else {more} - {None}
    return frozenset(found)


def _dtype(source: Path) -> torch.dtype:
    """Return the dtype that the run of a checkpoint computed in."""
    precision = read_facts(source).get("config", {}).get("trainer", {}).get("precision", 32)
    return PARAMS_DTYPES[precision]


def _layout(source: Path, *, tensor: int, pipeline: int) -> Layout:
    """Return the checked layout of the processes there are."""
    processes = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if processes % (tensor * pipeline):
        raise ConfigError(
            f"--tensor-parallel {tensor} and --pipeline-parallel {pipeline} need {tensor * pipeline} processes, or a "
            f"multiple, and there are {processes}. Start the command with torchrun --nproc-per-node "
            f"{tensor * pipeline} --no-python nemo-kto generate ..."
        )
    sizes = model_sizes(load_hf_config(source))
    # experts are only shared with sequence parallelism
    layout = Layout(
        world_size=processes, tensor=tensor, pipeline=pipeline, sequence=tensor > 1 and sizes.num_experts > 0
    )
    check_layout(layout, sizes)
    return layout
