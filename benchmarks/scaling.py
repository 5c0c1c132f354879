"""Two processes against one: time of a KTO step, the pipeline's bubble, communication, and tokens per rank.

python benchmarks/scaling.py [--rounds N] [--only steps|tokens]

A Llama of 16 M parameters takes KTO steps on global batches of 8 records of 230 tokens, one record per micro-batch,
with one thread per process: alone, and divided over two processes by data, tensors or pipeline stages. All these runs
are alive at the same time and take one step in turn, A B C D A B C D, so that a machine that slows down slows all of
them. Every layout takes the same steps on the same records; with one core per process the ideal ratio is 2. Then:

* "waiting" is the share of a pass or step in which a process is inside of calls of torch's process groups: moving
  data, and waiting for the other process. For pipeline stages it stands beside the bubble that the schedule cannot
  avoid, (p-1)/(m+p-1) for p stages and m micro-batches; the rest is the exchange itself and stages of unequal work
  (the last has the output layer).
* tokens per rank: batches of 64 records of widely different (log-normal) lengths for 8 data-parallel ranks with
  micro-batches of 2; most tokens of a rank over the mean, as the product deals them, and if the same records were
  dealt in their order. It is counted, not timed.

It does not show networks, GPUs' overlap of communication and computing (there, calls return before data have moved,
and waiting is what the host sees), or more than two processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import (
    in_new_process,
    make_config,
    make_model,
    median_and_range,
    print_table,
    publish,
    synchronize,
    words,
    write_feedback,
)
from lightning.pytorch import Callback

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
GLOBAL_BATCH_SIZE = 8
PROMPT, RESPONSE = 130, 100
WARM_UP_STEPS = 2
LAYOUTS: dict[str, dict[str, int]] = {
    "one process": {},
    "DP2": {"devices": 2},
    "TP2": {"devices": 2, "tensor_model_parallel_size": 2},
    "PP2": {"devices": 2, "pipeline_model_parallel_size": 2},
}
EXCHANGES = (
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    "_allgather_base",
    "allgather_into_tensor_coalesced",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "alltoall",
    "alltoall_base",
    "broadcast",
    "barrier",
    "send",
    "recv",
)
"""The methods of torch's process groups through which all communication goes."""
TOKENS_BATCH, TOKENS_RANKS, TOKENS_MICRO_BATCH, TOKENS_BATCHES = 64, 8, 2, 20
MOST_TOKENS = 450


@dataclass
class Times:
    """Seconds of one step on one rank.

    Attributes:
        step: The whole step.
        train: The training pass in it.
        waiting: Inside of process groups' calls, in the step.
        train_waiting: The same in the training pass.
    """

    step: float = 0.0
    train: float = 0.0
    waiting: float = 0.0
    train_waiting: float = 0.0


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each layout")
    parser.add_argument("--only", choices=("steps", "tokens"), help="one half of the benchmark")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes that start from here
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "hf", **SIZES)
        if options.only != "steps":
            publish("token_balance", in_new_process(token_balance, folder), batches=TOKENS_BATCHES)
        if options.only != "tokens":
            write_feedback(
                folder / "train.jsonl",
                (WARM_UP_STEPS + options.rounds) * GLOBAL_BATCH_SIZE,
                vocab_size=SIZES["vocab_size"],
                prompt=(PROMPT, PROMPT),
                response=(RESPONSE, RESPONSE),
            )
            report(steps_in_turn(folder, options.rounds), options.rounds)


def report(times: dict[str, list[list[Times]]], rounds: int) -> None:
    """Show layout -> round -> rank -> times."""
    bubble = 1 / (GLOBAL_BATCH_SIZE + 1)  # two stages
    shares, speeds = [], []
    one = times["one process"]
    for name, found in times.items():
        step, train = ([max(getattr(rank, part) for rank in ranks) for ranks in found] for part in ("step", "train"))
        speeds.append(
            {
                "layout": name,
                "step [s]": median_and_range(step),
                "one process / this": median_and_range([a[0].step / b for a, b in zip(one, step, strict=True)]),
                "training pass [s]": median_and_range(train),
                "one process / this, pass": median_and_range(
                    [a[0].train / b for a, b in zip(one, train, strict=True)]
                ),
            }
        )
        for rank in range(len(found[0]) if name != "one process" else 0):
            of_rank = [ranks[rank] for ranks in found]
            shares.append(
                {
                    "layout": name,
                    "rank": rank,
                    "waiting, pass": share(of_rank, "train_waiting", "train"),
                    "bubble, formula": f"{bubble:.1%}" if name.startswith("PP") else "",
                    "waiting, step": share(of_rank, "waiting", "step"),
                }
            )
    print_table("shares of the time of each process", shares)
    raw = {name: [[vars(rank) for rank in ranks] for ranks in found] for name, found in times.items()}
    publish("scaling", speeds, shares=shares, rounds=rounds, threads_per_process=1, seconds=raw)


def share(times: Sequence[Times], part: str, whole: str) -> str:
    """Return the median share of one time in another."""
    return f"{statistics.median(getattr(one, part) / getattr(one, whole) for one in times):.1%}"


# steps: the parent gives the turns


def steps_in_turn(folder: Path, rounds: int) -> dict[str, list[list[Times]]]:
    """Return layout -> round -> rank -> times of a step, one layout after the other in each round."""
    usable = {name: layout for name, layout in LAYOUTS.items() if layout.get("devices", 1) <= devices()}
    if len(usable) < len(LAYOUTS):
        print(f"Left out, as this machine has {devices()} GPU: {', '.join(LAYOUTS.keys() - usable.keys())}.")
    found: dict[str, list[list[Times]]] = {name: [] for name in usable}
    with contextlib.ExitStack() as stack:
        ranks = {name: stack.enter_context(started(folder, name)) for name in usable}
        for number in range(WARM_UP_STEPS + rounds):
            for name, pipes in ranks.items():
                for pipe in pipes:
                    pipe.send("go")
                times = [pipe.recv() for pipe in pipes]
                if number >= WARM_UP_STEPS:
                    found[name].append(times)
    return found


def devices() -> float:
    """Return how many processes find a device here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else math.inf


@contextlib.contextmanager
def started(folder: Path, name: str) -> Iterator[list[Connection]]:
    """Start the ranks of a layout, which end with the block; yields a pipe to each once it is about to train."""
    context = get_context("spawn")
    world_size, port, pipes, processes = LAYOUTS[name].get("devices", 1), free_port(), [], []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=train_in_turn, args=(theirs, folder, name, rank, world_size, port))
            process.start()
            theirs.close()  # so that a rank that dies is an EOFError here
            pipes.append(ours)
            processes.append(process)
        for pipe in pipes:
            assert pipe.recv() == "ready"
        yield pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# steps: what a rank does


def train_in_turn(pipe: Connection, folder: Path, name: str, rank: int, world_size: int, port: int) -> None:
    """Train as one rank of a layout, a step for each word from the pipe."""
    from nemo_kto.quiet import silence_loaded_packages, silence_startup_noise

    silence_startup_noise()
    torch.set_num_threads(1)

    from nemo_kto.commands.train import train
    from nemo_kto.kto.scoring import RowScorer

    silence_loaded_packages()
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    config = make_config(folder, global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=1)
    config.exp_manager.explicit_log_dir = str(folder / name)
    config.exp_manager.create_tensorboard_logger = False
    config.model.optim.sched.warmup_steps = 0  # the run is shorter than the default
    for key, value in LAYOUTS[name].items():
        setattr(config.trainer if key == "devices" else config.model, key, value)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder / name}.store", rank=rank, world_size=world_size)
    clock = Clock()
    time_exchanges(clock)
    RowScorer.train = clock.timed_pass(RowScorer.train)  # type: ignore[method-assign]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        train(config, callbacks=[Turns(pipe, clock)])


@dataclass
class Clock:
    """Adds up the seconds in wrapped functions.

    Attributes:
        seconds: Kind -> seconds since it was emptied.
        times: Those of the step that runs.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    times: Times = field(default_factory=Times)

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time counted."""

        def counting(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - started

        return counting

    def timed_pass(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the training pass with its time, and what it waited, noted."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            before = dict(self.seconds)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            self.times.train = time.perf_counter() - started
            self.times.train_waiting = self.seconds.get("waiting", 0.0) - before.get("waiting", 0.0)
            return result

        return noting


def time_exchanges(clock: Clock) -> None:
    """Count the time in all calls of process groups, and in waiting for those that go on in the background.

    At this level, as Megatron calls torch's functions by many names and joins some of them.
    """
    from torch._C._distributed_c10d import Work

    for name in EXCHANGES:
        setattr(dist.ProcessGroup, name, clock.timed("waiting", getattr(dist.ProcessGroup, name)))
    Work.wait = clock.timed("waiting", Work.wait)  # type: ignore[method-assign]


class Turns(Callback):
    """Waits for its turn before each step, and sends the step's times after it."""

    def __init__(self, pipe: Connection, clock: Clock) -> None:
        self._pipe = pipe
        self._clock = clock
        self._started = 0.0

    def on_train_start(self, *_: Any) -> None:
        """Tell that everything is set up."""
        self._pipe.send("ready")

    def on_train_batch_start(self, *_: Any) -> None:
        """Wait for the turn."""
        self._pipe.recv()
        self._clock.seconds, self._clock.times = {}, Times()
        self._started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Send the times."""
        synchronize()
        times, seconds = self._clock.times, self._clock.seconds
        times.step = time.perf_counter() - self._started
        times.waiting = seconds.get("waiting", 0.0)
        self._pipe.send(times)


# tokens per rank


def token_balance(folder: Path) -> list[dict[str, str]]:
    """Return what the product's dealing and dealing in order make of the same batches; in a process of its own."""
    from nemo_kto.quiet import silence_loaded_packages, silence_startup_noise

    silence_startup_noise()
    from nemo_kto.runs.run import prepare

    silence_loaded_packages()
    write_log_normal_feedback(folder / "train.jsonl", TOKENS_BATCHES * TOKENS_BATCH)
    config = make_config(folder, global_batch_size=TOKENS_BATCH, micro_batch_size=TOKENS_MICRO_BATCH)
    data = prepare(config).data
    batches = []  # rank -> step -> batch
    for rank in range(TOKENS_RANKS):
        data.set_position(
            dp_rank=rank,
            dp_size=TOKENS_RANKS,
            num_steps=TOKENS_BATCHES,
            steps_per_epoch=TOKENS_BATCHES,
            start_step=int,
        )
        batches.append(list(data.train_dataloader()))
    by_step = list(zip(*batches, strict=True))
    dealt = [[lengths_of(batch) for batch in ranks] for ranks in by_step]
    in_order = [consecutive(ranks) for ranks in by_step]
    for one, other in zip(dealt, in_order, strict=True):
        assert sorted(sum(sum(one, []), [])) == sorted(sum(sum(other, []), [])), "other records were dealt"
    return [row_of("in order", in_order), row_of("as the product deals", dealt)]


def row_of(name: str, steps: list[list[list[list[int]]]]) -> dict[str, str]:
    """Return one line of the table for step -> rank -> micro-batch -> lengths."""
    ranks = [[sum(map(sum, rank)) for rank in step] for step in steps]
    rows = [[sum(row) for rank in step for row in rank] for step in steps]
    return {
        "records are dealt": name,
        "tokens of a rank, most / mean": median_and_range([max(step) / statistics.mean(step) for step in ranks]),
        "tokens of a micro-batch, most / mean": median_and_range([max(step) / statistics.mean(step) for step in rows]),
    }


def lengths_of(batch: Any) -> list[list[int]]:
    """Return micro-batch -> the lengths of its samples."""
    return [(row.cu_seqlens[1:] - row.cu_seqlens[:-1]).tolist() for row in batch.sample_rows()]


def consecutive(ranks: Sequence[Any]) -> list[list[list[int]]]:
    """Return rank -> micro-batch -> lengths if the samples of all ranks were dealt in their order."""
    lengths = {
        place: prompt.numel() + response.numel()
        for batch in ranks
        for place, (prompt, response) in zip(batch.places.tolist(), batch.samples, strict=True)
    }
    assert sorted(lengths) == list(range(TOKENS_BATCH)), "each place of the global batch belongs to one rank"
    ordered = [lengths[place] for place in range(TOKENS_BATCH)]
    rows = [ordered[start : start + TOKENS_MICRO_BATCH] for start in range(0, TOKENS_BATCH, TOKENS_MICRO_BATCH)]
    per_rank = len(rows) // len(ranks)
    return [rows[start : start + per_rank] for start in range(0, len(rows), per_rank)]


def write_log_normal_feedback(file: Path, number: int) -> None:
    """Write records whose prompts and responses have a median of 100 tokens each; one in fifteen has the most."""
    generator, vocabulary = random.Random(0), words(SIZES["vocab_size"])
    with file.open("w", encoding="utf-8") as stream:
        for index in range(number):
            lengths = [min(MOST_TOKENS, max(1, round(generator.lognormvariate(math.log(100), 1)))) for _ in range(2)]
            prompt, response = (" ".join(generator.choices(vocabulary, k=length)) for length in lengths)
            record = {"prompt": prompt, "completion": f" {response}", "label": index % 2 == 0}
            stream.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
