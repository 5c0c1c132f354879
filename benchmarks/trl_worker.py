"""The two processes of against_trl.py, which take one optimizer step whenever they are told to.

python benchmarks/trl_worker.py ours|trl SETTINGS.json

SETTINGS.json holds the fields of `Settings`. Each process loads its model, says so in a line of JSON, and then waits.
For each line `step` it gets, it goes once around its trainer's loop, and answers with a line of JSON; a line `profile`
asks for the same under torch's profiler. It ends when its input ends. TRL's process has an environment of its own, so
each side imports its trainer where it uses it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from common import make_config, peak_bytes, reset_peak, synchronize

OPTIMIZER = {"lr": 1e-6, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
BETA = 0.1
TRAINED = ("all", "lora", "nf4", "int8")
"""All weights, or adapters beside a base in the run's precision, or in fewer bits."""
RANK, ALPHA = 16, 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both sides are told.

    Attributes:
        folder: The folder where `hf`, the model, and `train.jsonl`, the records, are.
        mode: `live`: the reference is scored in every step; `cached`: before the first one.
        trained: One of `TRAINED`.
        batch_size: Records of a step.
        steps: Steps that there are records for.
        threads: Threads of torch.
    """

    folder: str
    mode: str
    trained: str
    batch_size: int
    steps: int
    threads: int


class Turnstile:
    """Stops a trainer's loop until the parent asks for the next step, and measures what happens in between.

    What is measured is a whole turn of the loop, from one `pass_through` to the next: fetching and collating a batch,
    all passes, the optimizer, and what is logged.
    """

    def __init__(self) -> None:
        # whatever a library prints goes to standard error: the lines to the parent stay whole
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._profiler: torch.profiler.profile | None = None
        self._wall = self._cpu = 0.0

    def open(self) -> None:
        """Report that everything is loaded, with the memory that this takes, and wait for the first step."""
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # memory that only loading needed is given back, on both sides
        _forget_peak()
        self._answer({"resident": _peak(), "versions": _versions()})

    def pass_through(self, *, loss: float, tokens: int) -> None:
        """Report the step that ends here, and wait for the next one.

        Args:
            loss: Of the step.
            tokens: Of the step's documents, without padding and without the KL set.
        """
        synchronize()
        measured: dict[str, Any] = {
            "wall": time.perf_counter() - self._wall,
            "cpu": time.process_time() - self._cpu,
            "peak": _peak(),
            "loss": loss,
            "tokens": tokens,
        }
        if self._profiler is not None:
            self._profiler.stop()
            measured["profile"] = _summary(self._profiler)
            self._profiler = None
        self._answer(measured)

    def _answer(self, content: dict[str, Any]) -> None:
        print(json.dumps(content), file=self._answers, flush=True)
        asked = sys.stdin.readline().strip()
        if not asked:
            raise SystemExit(0)  # the parent has seen enough
        if asked == "profile":
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        _forget_peak()
        synchronize()
        self._wall, self._cpu = time.perf_counter(), time.process_time()


def _forget_peak() -> None:
    reset_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    """Return the greatest use of the GPU's memory, or without one of the process's resident memory, in bytes."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes", "megatron-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _summary(profiler: torch.profiler.profile, rows: int = 15) -> list[dict[str, Any]]:
    """Return the operators that took most time by themselves, with their share of all operators' time."""
    events = profiler.key_averages()
    on_gpu = torch.cuda.is_available()
    times = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event) for event in events]
    total = sum(microseconds for microseconds, _ in times)
    times.sort(key=lambda pair: -pair[0])
    return [
        {
            "operator": event.key,
            "share": round(microseconds / total, 3),
            "seconds": round(microseconds / 1e6, 3),
            "calls": event.count,
        }
        for microseconds, event in times[:rows]
    ]


def train_ours(settings: Settings, turnstile: Turnstile) -> None:
    """Train with nemo_kto."""
    from nemo_kto.quiet import silence_loaded_packages, silence_startup_noise

    silence_startup_noise()
    from lightning.pytorch import Callback

    from nemo_kto.commands.train import train

    silence_loaded_packages()

    class TakeTurns(Callback):
        def on_train_start(self, *_: Any) -> None:
            turnstile.open()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            tokens = sum(prompt.numel() + response.numel() for prompt, response in batch.samples)
            turnstile.pass_through(loss=pl_module.last_metrics["train/loss"], tokens=tokens)

    config = make_config(
        Path(settings.folder), global_batch_size=settings.batch_size, micro_batch_size=settings.batch_size
    )
    config.model.data.shuffle = False
    config.model.kto.ref_policy_kl_penalty = BETA
    config.model.kto.reference.mode = "cached" if settings.mode == "cached" else "auto"
    config.model.kto.reference.cache_dir = str(Path(settings.folder) / "cache")
    if settings.trained != "all":
        config.model.peft.peft_scheme = "lora"
        lora = config.model.peft.lora_tuning
        lora.target_modules, lora.adapter_dim, lora.alpha = ["all"], RANK, ALPHA
        config.model.peft.quantize_base = None if settings.trained == "lora" else settings.trained
    optim = config.model.optim
    optim.lr, optim.betas, optim.eps = OPTIMIZER["lr"], list(OPTIMIZER["betas"]), OPTIMIZER["eps"]
    optim.weight_decay = OPTIMIZER["weight_decay"]
    optim.sched.name, optim.sched.warmup_steps = "Constant", 0
    config.trainer.kto.gradient_clip_val = OPTIMIZER["clip"]
    train(config, callbacks=[TakeTurns()])


def train_trl(settings: Settings, turnstile: Turnstile) -> None:
    """Train with TRL."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import KTOConfig, KTOTrainer

    class TakeTurns(TrainerCallback):
        tokens = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turnstile.open()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            # called at the end of every step; what TRL logs of tokens is their number since the beginning
            if "loss" in logs:
                before, self.tokens = self.tokens, logs["num_tokens"]
                turnstile.pass_through(loss=logs["loss"], tokens=int(self.tokens - before))

    folder, adapters = Path(settings.folder), None
    as_loaded: dict[str, Any] = {"dtype": "float32"}
    if settings.trained != "all":
        adapters = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    if settings.trained == "nf4":
        as_loaded["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"
        )
    if settings.trained == "int8":
        as_loaded["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    arguments = KTOConfig(
        output_dir=str(folder / "trl"),
        beta=BETA,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=1,
        max_steps=settings.steps,
        precompute_ref_log_probs=settings.mode == "cached",
        max_length=1024,  # more than any record has
        learning_rate=OPTIMIZER["lr"],
        lr_scheduler_type="constant",
        adam_beta1=OPTIMIZER["betas"][0],
        adam_beta2=OPTIMIZER["betas"][1],
        adam_epsilon=OPTIMIZER["eps"],
        weight_decay=OPTIMIZER["weight_decay"],
        max_grad_norm=OPTIMIZER["clip"],
        train_sampling_strategy="sequential",
        model_init_kwargs=as_loaded,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    KTOTrainer(
        model=str(folder / "hf"),
        args=arguments,
        train_dataset=Dataset.from_list(records),
        peft_config=adapters,
        callbacks=[TakeTurns()],
    ).train()


SIDES: dict[str, Callable[[Settings, Turnstile], None]] = {"ours": train_ours, "trl": train_trl}


def main() -> None:
    """Train as one of the sides."""
    side, file = sys.argv[1:]
    settings = Settings(**json.loads(Path(file).read_text(encoding="utf-8")))
    torch.set_num_threads(settings.threads)
    SIDES[side](settings, Turnstile())


if __name__ == "__main__":
    main()
