"""Time of a KTO step as a ratio to a plain fine-tuning step of transformers on the same samples, interleaved.

python benchmarks/step_time.py [--steps N] [--micro-batch-size N]

Both train a Llama of 21 M parameters (vocabulary 16,000) in float32 in one process. In units of one forward pass over
the samples, the fine-tuning step costs 3 and the KTO step 6 (KL set 1, reference 2, training 3): at equal efficiency
the ratio is 2. The fine-tuning step pads its batch and computes the logits of every position, as transformers does.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_kto.config import KTOConfig
from nemo_kto.data.batching import KTOBatch
from nemo_kto.quiet import silence_loaded_packages
from nemo_kto.train import train

VOCAB_SIZE = 16_000
GLOBAL_BATCH_SIZE = 8
WARMUP_STEPS = 2


def main() -> None:
    """Run the benchmark and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--micro-batch-size", type=int, default=GLOBAL_BATCH_SIZE, choices=(1, 2, 4, 8))
    options = parser.parse_args()
    silence_loaded_packages()
    logging.getLogger("nemo_kto").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "hf")
        num_steps = WARMUP_STEPS + options.steps
        write_feedback(folder / "train.jsonl", num_steps * GLOBAL_BATCH_SIZE)
        stopwatch = Stopwatch(folder / "hf")
        train(make_config(folder, options.micro_batch_size), callbacks=[stopwatch])
    kto, sft = (statistics.median(times[WARMUP_STEPS:]) for times in (stopwatch.kto_seconds, stopwatch.sft_seconds))
    print(f"\nKTO step {kto:.2f} s, fine-tuning step {sft:.2f} s, ratio {kto / sft:.2f}")


class Stopwatch(Callback):
    """Times each KTO step, and after it a fine-tuning step on the same samples."""

    def __init__(self, model_folder: Path) -> None:
        self.kto_seconds: list[float] = []
        self.sft_seconds: list[float] = []
        self._model = AutoModelForCausalLM.from_pretrained(model_folder)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6)
        self._started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the KTO step's time."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: KTOBatch, batch_idx: int) -> None:
        """Note the KTO step's time; take and time the fine-tuning step."""
        self.kto_seconds.append(time.perf_counter() - self._started)
        tokens, mask, labels = pad(batch)
        started = time.perf_counter()
        self._optimizer.zero_grad()
        self._model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        self._optimizer.step()
        self.sft_seconds.append(time.perf_counter() - started)


def pad(batch: KTOBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, attention mask and labels `[b, s]`, right-padded; prompts and padding have no label."""
    longest = max(prompt.numel() + response.numel() for prompt, response in batch.samples)
    tokens = torch.zeros(len(batch.samples), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for row, (prompt, response) in enumerate(batch.samples):
        end = prompt.numel() + response.numel()
        tokens[row, :end], mask[row, :end] = torch.cat([prompt, response]), 1
        labels[row, prompt.numel() : end] = response
    return tokens, mask, labels


def make_model(folder: Path) -> None:
    """Save a Llama with random weights and a tokenizer of one token a word."""
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def words() -> list[str]:
    """Return the words of the vocabulary."""
    return [f"w{index}" for index in range(VOCAB_SIZE - 2)]


def write_feedback(file: Path, number: int) -> None:
    """Write records of about 130 prompt tokens and 100 response tokens, of widely different lengths."""
    generator, vocabulary = random.Random(0), words()
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(number):
            prompt = generator.choices(vocabulary, k=generator.randint(20, 240))
            response = generator.choices(vocabulary, k=generator.randint(10, 190))
            record = {
                "prompt": " ".join(prompt),
                "completion": " " + " ".join(response),
                "label": bool(len(prompt) % 2),
            }
            stream.write(json.dumps(record) + "\n")


def make_config(folder: Path, micro_batch_size: int) -> KTOConfig:
    """Return the configuration of one epoch over the data in `folder`, without checkpoints or export."""
    config = KTOConfig()
    config.pretrained_checkpoint.restore_from_path = str(folder / "hf")
    config.exp_manager.explicit_log_dir = str(folder / "log")
    config.exp_manager.create_checkpoint_callback = False
    config.export.enabled = False
    config.trainer.accelerator = "cpu"
    config.model.global_batch_size = GLOBAL_BATCH_SIZE
    config.model.micro_batch_size = micro_batch_size
    config.model.data.data_prefix.train = [str(folder / "train.jsonl")]
    return config


if __name__ == "__main__":
    main()
