"""Memory and time of each way to hold the reference, in full fine-tuning and with LoRA; prints a Markdown table.

python benchmarks/reference_modes.py [--steps N]

A Llama of 52 M parameters (vocabulary 16,000) in float32 on short documents, so that a copy of the weights is large
beside the activations. Each mode runs in a process of its own; those with `cached` find log-probs that an earlier
process has computed, the same for full fine-tuning and LoRA.

In units of one forward pass over the samples, a step of full fine-tuning costs 6 (KL set 1, reference 2, training 3)
and one with LoRA 5, as frozen weights have no gradient: at equal efficiency the reference is 33 % and 40 % of the
step. It is less here, as with few tokens the optimizer counts.

The peak is that of the resident set during the steps: reading the model takes more than its weights for a moment, the
same in all modes, so the high-water mark is reset (Linux only) when training starts. The allocator makes it uncertain
by some 40 MB; in the environment MALLOC_MMAP_THRESHOLD_=131072 makes it exact to a few MB, and steps slower. On a CPU
`cpu_swap` and `resident` keep the reference in the same memory; on a GPU only `resident` would take the device's.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback
from step_time import GLOBAL_BATCH_SIZE, VOCAB_SIZE, WARMUP_STEPS, make_config, make_model, words
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_kto.config import KTOConfig
from nemo_kto.models import megatron_gpt_kto_model
from nemo_kto.quiet import silence_loaded_packages
from nemo_kto.train import cache_reference, train

MODES = {"none": ("cpu_swap", "resident", "cached"), "lora": ("adapter_off", "resident", "cached")}
"""PEFT scheme -> ways to hold the reference."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of the steps of a run: peak resident memory in bytes, median seconds, median share of the reference in them."""

    peak: int
    step: float
    share: float


def main() -> None:
    """Run each mode and print what it needed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each mode")
    options = parser.parse_args()
    num_steps = WARMUP_STEPS + options.steps
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_parameters = make_larger_model(folder / "hf")
        write_short_feedback(folder / "train.jsonl", num_steps * GLOBAL_BATCH_SIZE)
        caching = in_new_process(seconds_of_caching, folder) / num_steps
        for scheme, modes in MODES.items():
            results = {mode: in_new_process(measure, folder, scheme, mode) for mode in modes}
            for mode, result in results.items():
                cells = (
                    "LoRA" if scheme == "lora" else "full",
                    f"`{mode}`",
                    f"{result.peak / 1e6:.0f} MB",
                    f"{(result.peak - results['cached'].peak) / 1e6:+.0f} MB",
                    f"{result.step:.2f} s",
                    f"{result.share:.1%}",
                    f"{caching / result.step:.2f} steps" if mode == "cached" else "",
                )
                rows.append(f"| {' | '.join(cells)} |")
    print(f"\n{num_parameters / 1e6:.1f} M parameters; one copy of the weights: {num_parameters * 4 / 1e6:.0f} MB\n")
    print("| training | reference | peak memory | beside `cached` | step | reference's share | caching a batch |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function` returns in a process that ends with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(folder: Path, scheme: str, mode: str) -> Measured:
    """Train with the reference held in one way."""
    gauge = Gauge()
    train(make_mode_config(folder, scheme, mode), callbacks=[gauge])
    pairs = list(zip(gauge.reference_seconds, gauge.step_seconds, strict=True))[WARMUP_STEPS:]
    return Measured(
        peak=gauge.peak,
        step=statistics.median(step for _, step in pairs),
        share=statistics.median(reference / step for reference, step in pairs),
    )


def seconds_of_caching(folder: Path) -> float:
    """Cache the reference's log-probs and return how long scoring and writing took, without reading model and data."""
    seconds: list[float] = []
    fill = partial(timed, megatron_gpt_kto_model.fill, seconds)
    with mock.patch.object(megatron_gpt_kto_model, "fill", fill):
        cache_reference(make_mode_config(folder, "none", "cached"))
    return sum(seconds)


class Gauge(Callback):
    """Times steps and the reference's part of them, and measures the peak of resident memory from the first on."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.reference_seconds: list[float] = []
        self.peak = 0
        self._started = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Time the reference from here on; forget the memory that reading the model took."""
        pl_module.reference.log_probs = partial(timed, pl_module.reference.log_probs, self.reference_seconds)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the step's time."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the step's time."""
        self.step_seconds.append(time.perf_counter() - self._started)

    def on_train_end(self, *_: Any) -> None:
        """Note the peak."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.peak = int(status["VmHWM"].removesuffix("kB")) * 1024


def timed(function: Callable[..., Any], seconds: list[float], *args: Any, **kwargs: Any) -> Any:
    """Call `function` and append the time it took to `seconds`."""
    started = time.perf_counter()
    result = function(*args, **kwargs)
    seconds.append(time.perf_counter() - started)
    return result


def make_larger_model(folder: Path) -> int:
    """Save step_time.py's tokenizer with a larger Llama of random weights; returns the number of parameters."""
    make_model(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.num_parameters()


def write_short_feedback(file: Path, number: int) -> None:
    """Write records of about 25 prompt tokens and 20 response tokens."""
    generator, vocabulary = random.Random(0), words()
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(number):
            prompt = generator.choices(vocabulary, k=generator.randint(10, 40))
            response = generator.choices(vocabulary, k=generator.randint(10, 30))
            record = {"prompt": " ".join(prompt), "completion": " " + " ".join(response), "label": len(prompt) % 2 > 0}
            stream.write(json.dumps(record) + "\n")


def make_mode_config(folder: Path, scheme: str, mode: str) -> KTOConfig:
    """Return the configuration of one epoch over the data in `folder` with the reference held in one way."""
    silence_loaded_packages()
    logging.getLogger("nemo_kto").setLevel(logging.WARNING)
    config = make_config(folder, micro_batch_size=GLOBAL_BATCH_SIZE)
    config.model.optim.sched.warmup_steps = 0  # the run is shorter than the default
    config.exp_manager.explicit_log_dir = str(folder / f"{scheme}-{mode}")
    config.model.peft.peft_scheme = scheme  # type: ignore[assignment]
    config.model.peft.lora_tuning.target_modules = ["all"]
    config.model.peft.lora_tuning.adapter_dim = 16
    config.model.kto.reference.mode = mode  # type: ignore[assignment]
    config.model.kto.reference.cache_dir = str(folder / "cache")
    return config


if __name__ == "__main__":
    main()
