"""What a KTO step costs beside our own fine-tuning step, and how much of the machine the training pass uses.

python benchmarks/step_time.py [--shape NAME] [--rounds N] [--lora] [--transformers]

Our trainer runs KTO, once with a live reference and once with cached log-probs. After every KTO step a callback takes
a supervised fine-tuning (SFT) step by the same code: the same packed rows of the same samples, the same model as
Megatron wraps it, `RowScorer.train`, the same optimizer; only the loss is the negative log-likelihood of the response
tokens. Both build rows and clear gradients within the time taken; a KTO step has Lightning's loop and the metrics
besides. In units of one forward pass over the samples, SFT is worth 3 and KTO 6 (KL set 1, reference 2, training 3),
or 4 with cached log-probs: hence the limits, 2 and 1.33. With `--lora` the backward pass is worth 1 instead of 2, as
frozen weights have no gradient. A ratio below them is possible where the optimizer, which
both pay once, weighs much. Ratios are formed round by round, so that what else the machine does meets both sides.
Gradients are not clipped: the two losses have norms of different size, and only one side might pay for it.

The second table sets the rate of the training pass beside that of large matrix products, in turns, on the last batch,
and on a GPU whose data sheet is known beside the peak in that (model FLOPs utilisation). `nemo_kto/network/flops.py`
says which operations are counted.

The third table says where the time of a KTO step with a live reference goes, and that of the training pass alone, by
torch.profiler: each operator's own time, on a GPU that of its kernels. Profiling costs time too, mostly Python's.

Not shown: several processes, long documents, reading of data. `--transformers` adds a padded step of transformers on
the same samples, which computes the logits of every position: what another program takes, not a measure of ours. On a
GPU training is in bfloat16, and so are the large products.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    GPU_SHAPES,
    OPTIMIZER,
    SHAPES,
    interleaved,
    make_config,
    make_model,
    median_and_range,
    new_profiler,
    print_table,
    publish,
    seconds_of,
    shares,
    synchronize,
    write_feedback,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import profile, record_function
from transformers import AutoModelForCausalLM

from nemo_kto.commands.train import train
from nemo_kto.data.batches.packed_rows import Document, KTOBatch, PackedRow
from nemo_kto.kto.scoring import RowScorer, RowScores
from nemo_kto.network.flops import ModelFlops
from nemo_kto.quiet import silence_loaded_packages
from nemo_kto.runtime import parallel
from nemo_kto.runtime.devices import peak_flops

WARMUP_STEPS = 2
FORWARD_ONLY_UNITS = {"live": 3, "cached": 1}
"""Forward passes over the samples that a KTO step takes besides its training pass."""


def main() -> None:
    """Run the benchmark, print its tables and write them as JSON."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    silence_loaded_packages()
    logging.getLogger("nemo_kto").setLevel(logging.WARNING)
    sizes = {**SHAPES, **GPU_SHAPES}[options.shape]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_parameters = make_model(folder / "hf", **sizes)
        num_samples = (WARMUP_STEPS + options.rounds + 1) * options.batch_size
        write_feedback(folder / "train.jsonl", num_samples, vocab_size=sizes["vocab_size"])
        runs = {reference: run(folder, reference, options) for reference in FORWARD_ONLY_UNITS}
    facts = runs["live"].inspected
    publish(
        f"step_time-{options.shape.split(',')[0].replace(' ', '_')}{'-lora' if options.lora else ''}",
        [table_row(reference, beside.seconds, lora=options.lora) for reference, beside in runs.items()],
        settings={**vars(options), "parameters": num_parameters},
        seconds={reference: beside.seconds for reference, beside in runs.items()},
        **facts,
    )
    for title, rows in facts.items():
        print_table(title.replace("_", " "), rows)


def parse_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=next(iter(SHAPES)), choices=[*SHAPES, *GPU_SHAPES])
    parser.add_argument("--rounds", type=int, default=6, help="timed rounds of each run")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lora", action="store_true", help="train adapters of all projections, rank 16")
    parser.add_argument("--transformers", action="store_true", help="also time a padded step of transformers")
    return parser.parse_args()


def run(folder: Path, reference: str, options: argparse.Namespace) -> Beside:
    """Train with a `live` or `cached` reference and return what was measured beside it."""
    inspects = reference == "live"
    config = make_config(folder, global_batch_size=options.batch_size, micro_batch_size=options.micro_batch_size)
    config.exp_manager.explicit_log_dir = str(folder / reference)
    config.trainer.precision = "bf16-mixed" if torch.cuda.is_available() else 32
    config.trainer.kto.gradient_clip_val = 0.0
    config.trainer.kto.max_steps = WARMUP_STEPS + options.rounds + inspects
    # so low that the steps beside it leave the weights as they are
    config.model.optim.lr = 1e-12
    config.model.optim.sched.min_lr = 0.0
    config.model.optim.sched.warmup_steps = 0
    if options.lora:
        config.model.peft.peft_scheme = "lora"
        config.model.peft.lora_tuning.target_modules = ["all"]
        config.model.peft.lora_tuning.adapter_dim = 16
    if reference == "cached":
        config.model.kto.reference.mode = "cached"
    beside = Beside(options, folder / "hf", inspects=inspects)
    train(config, callbacks=[beside])
    if len(beside.seconds["KTO"]) < options.rounds:
        sys.exit("The run was stopped before its last step: nothing is published.")  # SIGTERM lets `train` return
    return beside


def table_row(reference: str, seconds: dict[str, list[float]], *, lora: bool) -> dict[str, str]:
    """Return a row of the first table."""
    kto, cells = seconds["KTO"], {"reference": reference, "KTO step, s": median_and_range(seconds["KTO"])}
    for name in list(seconds)[1:]:
        cells[f"{name} step, s"] = median_and_range(seconds[name])
        cells[f"KTO / {name}"] = median_and_range([a / b for a, b in zip(kto, seconds[name], strict=True)])
    training = 2 if lora else 3
    return {**cells, "limit of KTO / SFT": f"{1 + FORWARD_ONLY_UNITS[reference] / training:.2f}"}


class Beside(Callback):
    """Times each KTO step, and after it the fine-tuning steps on the same samples.

    Args:
        options: The command line's.
        model_folder: What transformers reads.
        inspects: Whether the last step, which is not timed, is for the second and third table.

    Attributes:
        seconds: Step -> seconds of it in each round.
        inspected: Name of a table -> its rows.
    """

    def __init__(self, options: argparse.Namespace, model_folder: Path, *, inspects: bool) -> None:
        self.seconds: dict[str, list[float]] = {"KTO": [], "SFT": []}
        self.inspected: dict[str, list[dict[str, str]]] = {}
        self._options, self._model_folder, self._inspects = options, model_folder, inspects
        self._padded: PaddedStep | None = None
        self._profiler: profile | None = None
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the optimizer's step for the profile, and have transformers read the model."""
        optimizer = trainer.optimizers[0]
        optimizer.step = record_function(OPTIMIZER)(optimizer.step)
        if self._options.transformers:
            self.seconds["transformers SFT"] = []
            self._padded = PaddedStep(self._model_folder, self._options.micro_batch_size, pl_module.params_dtype)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the KTO step's time."""
        if self._inspects and trainer.global_step == trainer.max_steps - 1:
            self._profiler = new_profiler()
            self._profiler.start()
        synchronize()
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: KTOBatch, batch_idx: int
    ) -> None:
        """Note the KTO step's time; take and time the others."""
        synchronize()
        times = {"KTO": time.perf_counter() - self._started}
        if self._profiler is not None:
            self._profiler.stop()
            self._inspect(
                pl_module, batch, shares(self._profiler, times["KTO"], vocab_size=pl_module.hf_config.vocab_size)
            )
            return
        times["SFT"] = seconds_of(partial(sft_step, pl_module, batch))
        if self._padded is not None:
            times["transformers SFT"] = seconds_of(partial(self._padded.take, batch))
        if trainer.global_step > WARMUP_STEPS:
            for name, seconds in times.items():
                self.seconds[name].append(seconds)

    def _inspect(self, module: LightningModule, batch: KTOBatch, kto_shares: Counter[str]) -> None:
        rows = batch.sample_rows()
        training_pass = partial(train_rows, module, rows)
        with new_profiler() as profiler:
            seconds = seconds_of(training_pass)
        pass_shares = shares(profiler, seconds, vocab_size=module.hf_config.vocab_size)
        self.inspected = {
            "rate_of_the_training_pass": [rate(module, rows, training_pass, self._options.rounds)],
            "where_the_time_goes": [
                {"part": part, "KTO step": f"{share:.1%}", "its training pass": f"{pass_shares[part]:.1%}"}
                for part, share in kto_shares.most_common()
            ],
        }


def sft_step(module: LightningModule, batch: KTOBatch) -> None:
    """Take a fine-tuning step on the samples with Megatron's optimizer, unknown to Lightning, which counts steps."""
    optimizer = module.trainer.optimizers[0]
    for chunk in module.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    train_rows(module, batch.sample_rows())
    optimizer.step()


def train_rows(module: LightningModule, rows: Sequence[PackedRow]) -> None:
    """Accumulate the gradients of the negative log-likelihood of the response tokens."""
    RowScorer(chunks=module.chunks, place=parallel.position(), layout=module.layout).train(
        rows, negative_log_likelihood
    )


def negative_log_likelihood(scores: RowScores, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a row's share of the loss and its documents' log-probs."""
    return -scores.logps.sum(), scores.logps.detach()


class PaddedStep:
    """Fine-tuning with transformers: right-padded micro-batches, the loss averaged over response tokens.

    Args:
        model_folder: The model.
        micro_batch_size: Samples of a micro-batch.
        dtype: Of parameters and activations.
    """

    def __init__(self, model_folder: Path, micro_batch_size: int, dtype: torch.dtype) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).to(self._device)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-12)
        self._micro_batch_size = micro_batch_size

    def take(self, batch: KTOBatch) -> None:
        """Take a step on the samples."""
        self._optimizer.zero_grad()
        starts = range(0, len(batch.samples), self._micro_batch_size)
        for start in starts:
            tokens, mask, labels = pad(batch.samples[start : start + self._micro_batch_size])
            inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
            loss = self._model(**{name: value.to(self._device) for name, value in inputs.items()}).loss
            (loss / len(starts)).backward()
        self._optimizer.step()


def pad(documents: Sequence[Document]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, attention mask and labels `[b, s]` int64, right-padded; prompts and padding have label -100."""
    longest = max(prompt.numel() + response.numel() for prompt, response in documents)
    tokens = torch.zeros(len(documents), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for row, (prompt, response) in enumerate(documents):
        end = prompt.numel() + response.numel()
        tokens[row, :end], mask[row, :end] = torch.cat([prompt, response]), 1
        labels[row, prompt.numel() : end] = response
    return tokens, mask, labels


def rate(
    module: LightningModule, rows: Sequence[PackedRow], training_pass: Callable[[], None], rounds: int
) -> dict[str, str]:
    """Return the rate of the training pass beside that of large matrix products, taken in turns."""
    flops = ModelFlops(module.hf_config, module.lora)
    lengths = [length for row in rows for length in row.lengths]
    responses = sum(sum(row.response_lengths) for row in rows)
    operations = flops.forward(lengths, responses) + flops.backward(lengths, responses)
    sizes = (4096, 8192, 16_384) if torch.cuda.is_available() else (1024, 2048, 4096)
    factors = {size: torch.randn(size, size, dtype=module.params_dtype, device=module.device) for size in sizes}
    products = {f"{size}": partial(torch.mm, factor, factor) for size, factor in factors.items()}
    seconds = interleaved({"pass": training_pass, **products}, rounds)
    rates = {f"{size}": [2 * size**3 / s for s in seconds[f"{size}"]] for size in sizes}
    best = max(rates, key=lambda size: statistics.median(rates[size]))
    reached = [operations / s for s in seconds["pass"]]
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return {
        "operations": f"{operations / 1e9:.1f} G",
        "training pass, s": median_and_range(seconds["pass"]),
        "its rate, GFLOP/s": median_and_range([value / 1e9 for value in reached], 0),
        f"product of {best} x {best}, GFLOP/s": median_and_range([value / 1e9 for value in rates[best]], 0),
        "fraction": median_and_range([a / b for a, b in zip(reached, rates[best], strict=True)]),
        **({} if peak is None else {"model FLOPs utilisation": median_and_range([value / peak for value in reached])}),
    }


if __name__ == "__main__":
    main()
