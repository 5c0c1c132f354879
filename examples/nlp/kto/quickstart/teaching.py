"""What the makers of the small models share: a tokenizer trained on their texts, and steps of supervised training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY_SIZE = 2048
"""More than the texts have use for, so that every word in them becomes one token."""
IGNORED = -100
HALVED = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
"""What tensor parallel 2 and pipeline parallel 2 can halve."""


def make_tokenizer(texts: list[str], special: tuple[str, ...] = ROLES) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer trained on `texts`; any other text can be written in it too, byte by byte.

    Args:
        texts: All that the model is to read and to say.
        special: Tokens besides `PAD` and `END` that are never split.
    """
    backend = Tokenizer(models.BPE())
    # A word with the space before it, or punctuation: merges never cross a word's end.
    words = pre_tokenizers.Split(Regex(r" ?\w+|[^\w]"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, END, *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=list(special),
        clean_up_tokenization_spaces=False,
    )


def make_llama_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int, intermediate_size: int) -> LlamaConfig:
    """Returns a small Llama; half of the feed-forward size has to be whole, for TP=2."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        **HALVED,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Returns what has answers sampled from the model's own distribution."""
    return GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )


def fix_arithmetic(seed: int) -> None:
    """Makes torch give the same numbers each time: another number of threads adds up in another order."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)


def supervised_steps(model: torch.nn.Module, num_steps: int, peak_learning_rate: float) -> Callable[[Tensor], float]:
    """Returns what takes one of `num_steps` steps on a loss, and returns that loss as a number."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak_learning_rate, total_steps=num_steps, pct_start=0.1, cycle_momentum=False
    )

    def step(loss: Tensor) -> float:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.item()

    return step


def save(folder: Path, *parts: PreTrainedModel | PreTrainedTokenizerFast | ProcessorMixin) -> None:
    """Writes a model, and what makes its inputs, into a folder, and says how large that is."""
    for part in parts:
        part.save_pretrained(folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes")
