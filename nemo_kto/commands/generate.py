"""Answers of a checkpoint to prompts: the command `nemo-kto generate`, under any parallel layout."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from nemo_kto.data.reading.records import Messages
from nemo_kto.data.tokens.rendering import CHAT, TokenizationSettings
from nemo_kto.data.tokens.tokenizer import load_tokenizer
from nemo_kto.errors import ConfigError
from nemo_kto.generation.decoding import Sampling, generate
from nemo_kto.generation.prompts import prompt_tokens, read_prompts, stop_token_ids
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runs.model import dtype_of_run
from nemo_kto.runs.records import image_tokens
from nemo_kto.runtime import parallel
from nemo_kto.runtime.layout import Layout, check_layout
from nemo_kto.weights.checkpoint_model import load_model, source_of
from nemo_kto.weights.model_card import read_facts


def run(options: argparse.Namespace) -> None:
    """Run `nemo-kto generate`."""
    prompts = [*options.prompts, *(read_prompts(options.file) if options.file else ())]
    if not prompts:
        raise ConfigError("There is no prompt. Write one behind the checkpoint, or name a file with --file.")
    answers = answer_prompts(
        options.checkpoint,
        prompts,
        Sampling(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        ),
        tensor=options.tensor_parallel,
        pipeline=options.pipeline_parallel,
        template=not options.raw,
    )
    for prompt, answer in answers:
        if not is_global_rank_zero():
            continue
        if options.json:
            print(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False), flush=True)
        else:
            print(f"--- prompt\n{prompt}\n--- answer\n{answer}\n", flush=True)


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
        prompts: Texts or conversations that end before the assistant's answer; at least one. Images are parts of the
            messages, as in feedback; names of files are relative to the working directory.
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
        system=data.get("system", "keep"),
    )
    given = prompt_tokens(prompts, tokenizer, settings, image_tokens(source))
    shows_images = any(prompt.pictures for prompt in given)
    with parallel.default_group():
        layout = _layout(source, tensor=tensor, pipeline=pipeline)
        parallel.initialize(layout, seed=0)
        answers = generate(
            [load_model(checkpoint, layout, params_dtype=dtype_of_run(source), images=shows_images)],
            given,
            sampling,
            stop_token_ids=stop_token_ids(tokenizer, source),
            layout=layout,
            place=parallel.position(),
        )
    return [
        (tokenizer.decode(prompt.in_brief), tokenizer.decode(answer, skip_special_tokens=True))
        for prompt, answer in zip(given, answers, strict=True)
    ]


def _layout(source: Path, *, tensor: int, pipeline: int) -> Layout:
    """Return the checked layout of the processes there are."""
    processes = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if processes % (tensor * pipeline):
        raise ConfigError(
            f"--tensor-parallel {tensor} and --pipeline-parallel {pipeline} need {tensor * pipeline} processes, or a "
            f"multiple, and there are {processes}. Start the command with torchrun --nproc-per-node "
            f"{tensor * pipeline} --no-python nemo-kto generate ..."
        )
    sizes = dimensions_of(load_hf_config(source)).divided
    # experts are only shared with sequence parallelism
    layout = Layout(
        world_size=processes, tensor=tensor, pipeline=pipeline, sequence=tensor > 1 and sizes.num_experts > 0
    )
    check_layout(layout, sizes)
    return layout
