"""Memory and time of each way to hold the reference, in full fine-tuning and with LoRA.

python benchmarks/reference_modes.py [--rounds N]

A Llama of 52 M parameters (vocabulary 16,000) in float32 on short documents, so that a copy of the weights is large
beside the activations. Each mode runs in a process of its own; those with `cached` find log-probs that an earlier
process has computed, the same for full fine-tuning and LoRA.

In units of one forward pass over the samples, a step of full fine-tuning costs 6 (KL set 1, reference 2, training 3)
and one with LoRA 5, as frozen weights have no gradient: at equal efficiency the reference is 33 % and 40 % of the
step. It is less here, as with few tokens the optimizer counts.

The peak is that of the resident set during the steps: reading the model takes more than its weights for a moment, the
same in all modes, so the high-water mark is reset (Linux only) when training starts. The allocator makes it uncertain
by some 40 MB; in the environment MALLOC_MMAP_THRESHOLD_=131072 makes it exact to a few MB, and steps slower. On a CPU
`cpu_swap` and `resident` keep the reference in the same memory; on a GPU only `resident` takes the device's, which the
table does not show. The modes run one after another, so seconds of different rows can differ by what else the machine
does; the reference's share is of the same step.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from common import (
    in_new_process,
    make_config,
    make_model,
    median_and_range,
    peak_bytes,
    publish,
    reset_peak,
    synchronize,
    write_feedback,
)
from lightning.pytorch import Callback

from nemo_kto.commands.cache_reference import cache_reference
from nemo_kto.commands.train import train
from nemo_kto.config.schema import KTOConfig
from nemo_kto.kto import megatron_gpt_kto_model
from nemo_kto.quiet import silence_loaded_packages

SIZES = {
    "vocab_size": 16_000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
GLOBAL_BATCH_SIZE = 8
WARMUP_STEPS = 2
MODES = {"none": ("cpu_swap", "resident", "cached"), "lora": ("adapter_off", "resident", "cached")}
"""PEFT scheme -> ways to hold the reference."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of the steps of a run: peak resident memory in bytes, seconds of each, share of the reference in each."""

    peak: int
    steps: list[float]
    shares: list[float]


def main() -> None:
    """Run each mode and publish what it needed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each mode")
    options = parser.parse_args()
    num_steps = WARMUP_STEPS + options.rounds
    rows, measured = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_parameters = make_model(folder / "hf", max_position_embeddings=2048, **SIZES)
        write_feedback(
            folder / "train.jsonl",
            num_steps * GLOBAL_BATCH_SIZE,
            vocab_size=SIZES["vocab_size"],
            prompt=(10, 40),
            response=(10, 30),
        )
        caching = in_new_process(seconds_of_caching, folder) / num_steps
        for scheme, modes in MODES.items():
            results = {mode: in_new_process(measure, folder, scheme, mode) for mode in modes}
            rows += [row(scheme, mode, results, caching) for mode in modes]
            measured[scheme] = {mode: asdict(result) for mode, result in results.items()}
    publish("reference_modes", rows, parameters=num_parameters, seconds_of_caching_a_batch=caching, measured=measured)
    print(f"\n{num_parameters / 1e6:.1f} M parameters; one copy of the weights: {num_parameters * 4 / 1e6:.0f} MB")


def row(scheme: str, mode: str, results: dict[str, Measured], caching: float) -> dict[str, str]:
    """Return a row of the table; `caching` is how many seconds it took to cache the log-probs of a batch."""
    result = results[mode]
    in_steps = f"{caching / statistics.median(result.steps):.2f} steps"
    return {
        "training": "LoRA" if scheme == "lora" else "full",
        "reference": f"`{mode}`",
        "peak memory": f"{result.peak / 1e6:.0f} MB",
        "beside `cached`": f"{(result.peak - results['cached'].peak) / 1e6:+.0f} MB",
        "step, s": median_and_range(result.steps),
        "reference's share, %": median_and_range([100 * share for share in result.shares], 1),
        "caching a batch": in_steps if mode == "cached" else "",
    }


def measure(folder: Path, scheme: str, mode: str) -> Measured:
    """Train with the reference held in one way."""
    gauge = Gauge()
    train(make_mode_config(folder, scheme, mode), callbacks=[gauge])
    pairs = list(zip(gauge.reference_seconds, gauge.step_seconds, strict=True))[WARMUP_STEPS:]
    return Measured(
        peak=gauge.peak,
        steps=[step for _, step in pairs],
        shares=[reference / step for reference, step in pairs],
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
        reset_peak()

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the step's time."""
        synchronize()
        self._started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the step's time."""
        synchronize()
        self.step_seconds.append(time.perf_counter() - self._started)

    def on_train_end(self, *_: Any) -> None:
        """Note the peak."""
        self.peak = peak_bytes()


def timed(function: Callable[..., Any], seconds: list[float], *args: Any, **kwargs: Any) -> Any:
    """Call `function` and append the time it took to `seconds`."""
    synchronize()
    started = time.perf_counter()
    result = function(*args, **kwargs)
    synchronize()
    seconds.append(time.perf_counter() - started)
    return result


def make_mode_config(folder: Path, scheme: str, mode: str) -> KTOConfig:
    """Return the configuration of one epoch over the data in `folder` with the reference held in one way."""
    silence_loaded_packages()
    logging.getLogger("nemo_kto").setLevel(logging.WARNING)
    config = make_config(folder, global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=GLOBAL_BATCH_SIZE)
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
