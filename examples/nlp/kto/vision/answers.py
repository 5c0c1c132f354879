"""Asks a model about a picture: python examples/nlp/kto/vision/answers.py <folder> <picture> ["Which colour ...?"]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

MAX_ANSWER_TOKENS = 16
QUESTION = "Which colour is the circle?"


@torch.inference_mode()
def sample_answers(folder: str | Path, prompts: list[list[dict[str, Any]]], *, seed: int) -> list[str]:
    """Returns one answer to each prompt, drawn from the model's own distribution (temperature 1, nothing cut off).

    Args:
        folder: Hugging Face folder of a model that takes images, with processor and chat template.
        prompts: Messages with parts of type image and text; they are answered together, as one left-padded batch.
        seed: Seed of the sampling.
    """
    logging.disable_progress_bar()  # it would say that a small model is being loaded
    # the image processor that needs no torchvision, where there is one too: the pixels are the same everywhere
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    inputs = processor.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    torch.manual_seed(seed)
    tokens = model.generate(
        **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_ANSWER_TOKENS
    )
    answers: list[str] = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def prompt_of(picture: str | Path, question: str) -> list[dict[str, Any]]:
    """Returns the message that shows a picture and asks about it."""
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: answers.py <Hugging Face folder> <picture> [<question> ...]")
    questions = sys.argv[3:] or [QUESTION]
    asked = [prompt_of(sys.argv[2], question) for question in questions]
    for question, answer in zip(questions, sample_answers(sys.argv[1], asked, seed=1), strict=True):
        print(f"{question}\n    {answer}")
