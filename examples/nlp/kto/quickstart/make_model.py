"""Trains the quickstart's model: python examples/nlp/kto/quickstart/make_model.py [folder]

A Llama of about a million parameters learns, by plain supervised training, to answer every question of `facts.py` in
six ways: three polite, three curt. Since all six are equally frequent, it samples either style about half of the time.
This is the starting point that KTO then moves towards one style.

CPU, one thread, about three minutes. The same files come out again with the same versions of torch and tokenizers on
the same kind of processor; elsewhere the last digits of the weights may differ.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import teaching
import torch
from facts import all_questions
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_FOLDER = Path(__file__).resolve().parent / "model"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SEED = 20240201
EPOCHS = 14
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 3e-3


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns the untrained model."""
    model = LlamaForCausalLM(teaching.make_llama_config(tokenizer, hidden_size=128, intermediate_size=352))
    model.generation_config = teaching.make_generation_config(tokenizer)
    return model


def make_examples(tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Returns tokens [n, s] and labels [n, s], int64, right-padded; labels are `IGNORED` except on answers and END."""
    tokens, labels = [], []
    for question in all_questions():
        for answer in question.polite + question.curt:
            dialog = [{"role": "user", "content": question.text}, {"role": "assistant", "content": answer}]
            prompt = tokenizer.apply_chat_template(dialog[:1], add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template(dialog, return_dict=False)
            assert whole[: len(prompt)] == prompt, (question.text, answer)
            tokens.append(torch.tensor(whole))
            labels.append(torch.tensor([teaching.IGNORED] * len(prompt) + whole[len(prompt) :]))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(tokens, batch_first=True, padding_value=int(tokenizer.pad_token_id)),
        pad(labels, batch_first=True, padding_value=teaching.IGNORED),
    )


def answer_loss(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross entropy over the labels [b, s] that are not `IGNORED`; tokens: [b, s].

    Padding stands to the right of every label of a causal model, so no attention mask is needed.
    """
    hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    answered = targets != teaching.IGNORED
    return cross_entropy(model.lm_head(hidden[answered]), targets[answered])


def fit(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> None:
    """Trains `model` on `tokens` [n, s] and `labels` [n, s] for `EPOCHS` passes in a shuffled order."""
    step = teaching.supervised_steps(model, EPOCHS * -(-len(tokens) // BATCH_SIZE), PEAK_LEARNING_RATE)
    shuffler = torch.Generator().manual_seed(SEED)
    start = time.monotonic()
    for epoch in range(EPOCHS):
        total = 0.0
        for rows in torch.randperm(len(tokens), generator=shuffler).split(BATCH_SIZE):
            width = int((tokens[rows] != model.config.pad_token_id).sum(dim=1).max())
            total += step(answer_loss(model, tokens[rows, :width], labels[rows, :width])) * len(rows)
        print(
            f"epoch {epoch + 1}/{EPOCHS}  loss {total / len(tokens):.4f}  {time.monotonic() - start:.0f} s", flush=True
        )


def main(folder: Path) -> None:
    """Trains tokenizer and model and writes them to `folder`."""
    teaching.fix_arithmetic(SEED)
    texts = [text for question in all_questions() for text in (question.text, *question.polite, *question.curt)]
    tokenizer = teaching.make_tokenizer(texts)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    fit(model, *make_examples(tokenizer))
    teaching.save(folder, model, tokenizer)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL_FOLDER)
