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

import torch
from facts import all_questions
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_FOLDER = Path(__file__).resolve().parent / "model"
PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY_SIZE = 2048
"""More than the texts have use for, so that every word in them becomes one token."""
IGNORED = -100
SEED = 20240201
EPOCHS = 14
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 3e-3


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer trained on `texts`; any other text can be written in it too, byte by byte."""
    backend = Tokenizer(models.BPE())
    # A word with the space before it, or punctuation: merges never cross a word's end.
    words = pre_tokenizers.Split(Regex(r" ?\w+|[^\w]"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns the untrained model; heads, KV heads, layers and feed-forward size can be halved for TP=2 and PP=2."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
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
            labels.append(torch.tensor([IGNORED] * len(prompt) + whole[len(prompt) :]))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(tokens, batch_first=True, padding_value=int(tokenizer.pad_token_id)),
        pad(labels, batch_first=True, padding_value=IGNORED),
    )


def answer_loss(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross entropy over the labels [b, s] that are not `IGNORED`; tokens: [b, s].

    Padding stands to the right of every label of a causal model, so no attention mask is needed.
    """
    hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    answered = targets != IGNORED
    return cross_entropy(model.lm_head(hidden[answered]), targets[answered])


def fit(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> None:
    """Trains `model` on `tokens` [n, s] and `labels` [n, s] for `EPOCHS` passes in a shuffled order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    num_steps = EPOCHS * -(-len(tokens) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_LEARNING_RATE, total_steps=num_steps, pct_start=0.1, cycle_momentum=False
    )
    shuffler = torch.Generator().manual_seed(SEED)
    start = time.monotonic()
    for epoch in range(EPOCHS):
        total = 0.0
        for rows in torch.randperm(len(tokens), generator=shuffler).split(BATCH_SIZE):
            width = int((tokens[rows] != model.config.pad_token_id).sum(dim=1).max())
            loss = answer_loss(model, tokens[rows, :width], labels[rows, :width])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(
            f"epoch {epoch + 1}/{EPOCHS}  loss {total / len(tokens):.4f}  {time.monotonic() - start:.0f} s", flush=True
        )


def main(folder: Path) -> None:
    """Trains tokenizer and model and writes them to `folder`."""
    torch.set_num_threads(1)  # fixed: another number of threads adds up in another order and gives other last digits
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    texts = [text for question in all_questions() for text in (question.text, *question.polite, *question.curt)]
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    fit(model, *make_examples(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL_FOLDER)
