"""A KTO step of this package beside one of TRL's KTOTrainer: wall time, CPU time, peak memory, as ratios ours / TRL.

python benchmarks/against_trl.py [--shape NAME] [--mode live|cached] [--train all|lora|nf4|int8] [--rounds N]
    [--batch-size N] [--profile]

The first time, TRL's newest version is installed with our version of torch into a virtual environment of its own
(`.venv-trl`; remove the folder to get a newer one).

Why the ratio is fair. For each shape and mode there is one process each, and both have loaded everything before the
first step. They read the same Hugging Face folder and the same records in the same order: every step's number of
tokens is checked. They start from the same point: the first loss is checked to be 0.5, that of a policy which equals
its reference. Both run with the same version of torch, the same number of threads, in float32, with AdamW of the same
settings, clipped gradients, one batch a step without accumulation, no activation checkpointing, no record cut. The
rest is each one's default. They never compute at the same time: they take steps in turn, ours, TRL's, ours, ..., so
that what else the machine does disturbs both alike. A step is a whole turn of the trainer's loop, from fetching a
batch to logging its metrics. `live` scores the reference in every step, `cached` before the first one, unmeasured, on
both sides. The peak is that of the resident set (of the GPU's allocated memory where there is one) in any step; what
only loading needed is given back before. The resident set includes each side's imported libraries.

A ratio in the table is the median over the rounds of the ratio within a round, with its range. Medians of the seconds
themselves stand beside it; the JSON has every step, and the ratio of the medians.

`--train lora` trains adapters of rank 16 beside all linear layers of each layer, `nf4` and `int8` the same beside a
base in four or eight bits: bitsandbytes' in TRL, the same numbers here. The reference is the base then.

What it does not show. The KL set pairs each prompt with the next record's response here and with the one before in
TRL: the same responses, other pairs, and so slightly other lengths. Random weights and words say nothing of quality,
one process says nothing of many. On a CPU the row of a large vocabulary says nothing about a GPU, see `NOTE`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, make_model, median_and_range, print_table, publish, write_feedback
from transformers.utils.logging import disable_progress_bar
from trl_worker import TRAINED, Settings

MODES = ("live", "cached")
WARMUP_STEPS = 2
REPOSITORY = Path(__file__).resolve().parent.parent
NOTE = (
    "On a CPU, without Triton, TRL scores every position over the whole vocabulary, about 70 % of its step in the "
    "head-heavy shape; on a GPU it scores responses only. The head-heavy row says nothing "
    "about a GPU."
)


class BenchmarkError(Exception):
    """What makes the comparison impossible, in a sentence for the person who runs it."""


def main() -> None:
    """Compare in all shapes and modes, or in those asked for, and publish what was found."""
    options = parse_options()
    torch.set_num_threads(options.threads)  # of this process, which only describes the machine with it
    disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # which ends the workers and removes their files
    try:
        pythons = {"ours": Path(sys.executable), "trl": options.trl_python or trl_python(REPOSITORY / ".venv-trl")}
        cases = [
            (shape, mode, trained)
            for shape in options.shape or SHAPES
            for mode in options.mode or MODES
            for trained in options.train or ["all"]
        ]
        compared = [compare(*case, pythons, options) for case in cases]
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    chosen = [
        *(options.shape or []),
        *(options.mode or []),
        *(options.train or []),
        *([] if options.batch_size == 8 else ["batch 4"]),
    ]
    name = re.sub(r"\W+", "-", "-".join(["against_trl", *chosen]))  # a part does not overwrite the whole
    publish(name, [row(result) for result in compared], note=NOTE, runs=compared)
    for side in pythons:
        print(f"{side}: {json.dumps(compared[0]['loaded'][side]['versions'])}")
    print(f"\n{NOTE}")
    for result in compared:
        print_profiles(result)


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="only this one; may be repeated")
    parser.add_argument("--mode", action="append", choices=MODES, help="only this one")
    parser.add_argument("--train", action="append", choices=TRAINED, help="what is trained; may be repeated")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each side, at least 5")
    parser.add_argument("--batch-size", type=int, default=8, choices=(4, 8), help="records of a step")
    parser.add_argument("--threads", type=int, default=2, help="of each side; only one works at a time")
    parser.add_argument("--trl-python", type=Path, help="Python of an environment that has TRL already")
    parser.add_argument("--profile", action="store_true", help="one more step of each side, under torch's profiler")
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5: a median of fewer says little.")
    return options


def trl_python(folder: Path) -> Path:
    """Return the Python of TRL's virtual environment, which is made if it is missing."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    own_torch = torch.__version__.split("+")[0]
    print(f"Installing TRL into {folder} ...", flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, f"torch=={own_torch}"], check=True)
        subprocess.run([*install, f"torch=={own_torch}", "trl", "peft", "bitsandbytes"], check=True)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)  # the next run would take it for whole
        if isinstance(error, subprocess.CalledProcessError):
            raise BenchmarkError(f"TRL could not be installed into {folder}; see pip's message above.") from error
        raise
    return python


def compare(
    shape: str, mode: str, trained: str, pythons: dict[str, Path], options: argparse.Namespace
) -> dict[str, Any]:
    """Return what both sides report of their steps in one shape and mode, of what is trained."""
    timed = slice(WARMUP_STEPS, WARMUP_STEPS + options.rounds)
    num_steps = timed.stop + options.profile
    print(
        f"{shape}, {mode}, {trained} trained, {WARMUP_STEPS} + {options.rounds} steps of {options.batch_size} records",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_parameters = make_model(folder / "hf", **SHAPES[shape])
        records = folder / "train.jsonl"
        write_feedback(records, num_steps * options.batch_size, vocab_size=SHAPES[shape]["vocab_size"])
        lengths = list(batches(records, options.batch_size))
        settings = Settings(
            folder=name,
            mode=mode,
            trained=trained,
            batch_size=options.batch_size,
            steps=num_steps,
            threads=options.threads,
        )
        with worker("ours", pythons["ours"], settings) as ours, worker("trl", pythons["trl"], settings) as trl:
            workers = {"ours": ours, "trl": trl}
            loaded = {side: process.answer() for side, process in workers.items()}
            check_versions(loaded)
            steps: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
            for number in range(num_steps):
                for side, process in workers.items():
                    steps[side].append(process.step(profiled=number >= timed.stop))
                    check_step(side, steps[side][-1], first=number == 0, tokens=sum(lengths[number]))
                wall = {side: f"{found[-1]['wall']:.2f} s" for side, found in steps.items()}
                print(f"  step {number + 1} of {num_steps}: {wall}", flush=True)
    return {
        "shape": shape,
        "mode": mode,
        "trained": trained,
        "parameters": num_parameters,
        "batch_size": options.batch_size,
        "timed": [timed.start, timed.stop],
        "loaded": loaded,
        "tokens_per_batch": statistics.mean(sum(found) for found in lengths[timed]),
        "padded_tokens_per_batch": statistics.mean(len(found) * max(found) for found in lengths[timed]),
        "ratios": {quantity: ratios(steps, quantity, timed) for quantity in ("wall", "cpu", "peak")},
        "steps": steps,
    }


class Worker:
    """A process that takes a step when it is asked to.

    Args:
        side: Name of the side.
        process: With pipes to its standard input and output.
        log: File that its standard error goes to.
    """

    def __init__(self, side: str, process: subprocess.Popen[str], log: Path) -> None:
        self._side, self._process, self._log = side, process, log

    def step(self, *, profiled: bool) -> dict[str, Any]:
        """Let the process take one step and return what it measured."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `answer` finds out why
            print("profile" if profiled else "step", file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return what the process says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise BenchmarkError(f"The process of {self._side!r} ended before its time; it last wrote:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def worker(side: str, python: Path, settings: Settings) -> Iterator[Worker]:
    """Yield a process of one side, which loads its model at once and ends with the block."""
    folder = Path(settings.folder)
    file, log = folder / f"{side}.json", folder / f"{side}.log"
    file.write_text(json.dumps(asdict(settings)), encoding="utf-8")
    temporary = folder / f"{side}-tmp"
    temporary.mkdir()
    environment = os.environ | {
        "OMP_NUM_THREADS": str(settings.threads),
        "TMPDIR": str(temporary),
        "HF_HOME": str(temporary),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    }
    if side == "ours":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    else:
        environment.pop("PYTHONPATH", None)
    command = [python, Path(__file__).with_name("trl_worker.py"), side, file]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        )
        try:
            yield Worker(side, process, log)
        finally:
            process.kill()  # it has nothing left to do
            process.communicate()


def check_versions(loaded: dict[str, dict[str, Any]]) -> None:
    """Raise an error if the sides run on different versions of torch."""
    versions = {side: answer["versions"]["torch"] for side, answer in loaded.items()}
    if len(set(versions.values())) > 1:
        raise BenchmarkError(
            f"The versions of torch differ: {versions}. Remove .venv-trl, or give --trl-python one that has ours."
        )


def check_step(side: str, step: dict[str, Any], *, first: bool, tokens: int) -> None:
    """Raise an error if a side did not train on the records that were due, or not from the common starting point."""
    if step["tokens"] != tokens:
        raise BenchmarkError(
            f"A step of {side!r} had {step['tokens']} tokens, its records have {tokens}: they were cut or reordered."
        )
    if first:
        print(f"  first loss of {side}: {step['loss']:.4f}", flush=True)
        if not 0.45 <= step["loss"] <= 0.55:
            raise BenchmarkError(f"It must be near 0.5, as the policy still equals the reference: {side!r} is wrong.")


def batches(file: Path, batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of tokens of each batch's records, the token that ends a response included."""
    lengths = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        lengths.append(len(f"{record['prompt']}{record['completion']}".split()) + 1)
    for start in range(0, len(lengths), batch_size):
        yield lengths[start : start + batch_size]


def ratios(steps: dict[str, list[dict[str, Any]]], quantity: str, timed: slice) -> dict[str, Any]:
    """Return ours / TRL of each timed round, and of the two medians."""
    ours, trl = ([step[quantity] for step in steps[side][timed]] for side in ("ours", "trl"))
    return {
        "of_rounds": [one / other for one, other in zip(ours, trl, strict=True)],
        "of_medians": statistics.median(ours) / statistics.median(trl),
    }


def row(result: dict[str, Any]) -> dict[str, str]:
    """Return a row of the table."""
    timed = slice(*result["timed"])

    def both(quantity: str, unit: float, digits: int) -> str:
        found = ([step[quantity] for step in result["steps"][side][timed]] for side in ("ours", "trl"))
        # a peak is the greatest of all steps
        return " / ".join(
            f"{(max if quantity == 'peak' else statistics.median)(values) / unit:.{digits}f}" for values in found
        )

    cells = {name: median_and_range(found["of_rounds"]) for name, found in result["ratios"].items()}
    return {
        "shape": result["shape"],
        "reference": result["mode"],
        "trained": result["trained"],
        "batch": str(result["batch_size"]),
        "tokens, padded": f"{result['tokens_per_batch']:.0f}, {result['padded_tokens_per_batch']:.0f}",
        "wall s, ours / TRL": both("wall", 1, 2),
        "wall ratio": cells["wall"],
        "CPU s, ours / TRL": both("cpu", 1, 2),
        "CPU ratio": cells["cpu"],
        "peak MB, ours / TRL": both("peak", 1e6, 0),
        "peak ratio": cells["peak"],
    }


def print_profiles(result: dict[str, Any]) -> None:
    """Print where the time of the profiled step went, if one was."""
    for side, steps in result["steps"].items():
        operators = steps[-1].get("profile")
        if operators:
            rows = [found | {"share": f"{found['share']:.1%}"} for found in operators]
            print_table(f"{result['shape']}, {result['mode']}: operators of {side}", rows)


if __name__ == "__main__":
    main()
