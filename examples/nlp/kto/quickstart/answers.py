"""Asks a chat model questions: python examples/nlp/kto/quickstart/answers.py <folder> "What colour is a lemon?"."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

MAX_ANSWER_TOKENS = 40


@torch.inference_mode()
def sample_answers(folder: str | Path, questions: list[str], *, seed: int) -> list[str]:
    """Returns one answer to each question, drawn from the model's own distribution (temperature 1, nothing cut off).

    Args:
        folder: Hugging Face folder of a chat model, tokenizer and chat template included.
        questions: What the user says; they are answered together, as one left-padded batch.
        seed: Seed of the sampling.
    """
    logging.disable_progress_bar()  # it would say that a small model is being loaded
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    torch.manual_seed(seed)
    tokens = model.generate(
        **prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_ANSWER_TOKENS
    )
    answers: list[str] = tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: answers.py <Hugging Face folder> <question> [<question> ...]")
    for question, answer in zip(sys.argv[2:], sample_answers(sys.argv[1], sys.argv[2:], seed=1), strict=True):
        print(f"{question}\n    {answer}")
