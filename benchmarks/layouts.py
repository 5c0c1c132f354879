"""Every layout of this machine's devices against one of them: the same series, in which time and memory.

python benchmarks/layouts.py [--devices N] [--steps N] [--shape NAME] [--precision 32 bf16-mixed]

The training command's inside takes KTO steps on the same records under each layout, on all devices (GPUs with NCCL, or
processes on a CPU with gloo), and once on one. Dense models and, for expert parallelism, a mixture of the same kind.

The first loss has to be 0.5: policy and reference are the same weights then, and scored by the same code. How far the
others are from one device is the greatest relative distance over all steps: rounding in float32 (1e-5 and less), a
percent or so in bfloat16, where it is the distance of two roundings. A layout that is wrong shows in the gradient norm
first. Layouts do not run at the same time, so seconds can differ by what else the machine does; they are medians
without the first steps. Memory is the greatest that the device's allocator has given out, of the fullest rank; on a
CPU the resident set. Beside it stands what a dry run of the step expects of the allocator (`nemo_kto.runs.memory`),
which takes no mixtures: nobody knows where a router sends tokens. "Layers" says whose they are: Transformer Engine's
(TE), or this project's own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, make_config, make_model, peak_bytes, publish, reset_peak, synchronize, write_feedback
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_kto.commands.train import train
from nemo_kto.config.schema import KTOConfig
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.planning import search as planning
from nemo_kto.quiet import silence_loaded_packages
from nemo_kto.runs.layout import requested_layout
from nemo_kto.runs.memory import step_memory

WARMUP_STEPS = 2
FAILED = "failed"
MEASURED = (
    "layers",
    "first loss",
    "loss, farthest",
    "gradient norm, farthest",
    "step, s",
    "memory, GiB",
    "dry run, GiB",
)
"""Columns of the tables."""
GLOBAL_BATCH_SIZE = 8
PROMPT, RESPONSE = 256, 256
"""Tokens of every document, of which the last is the end."""

EXPERTS: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
"""What makes a mixture of a shape."""

SHORT = {**planning.SHORT, "sp": "sequence_parallel"}
"""Short names -> keys of `model`."""

DENSE: tuple[dict[str, Any], ...] = (
    {},
    {"tp": 2},
    {"tp": 2, "sp": True},
    {"pp": 2},
    {"pp": 2, "vpp": 2},
    {"cp": 2},
    {"tp": 2, "sp": True, "pp": 2},
    {"tp": 2, "sp": True, "cp": 2},
    {"tp": 4, "sp": True},
    {"pp": 4},
    {"tp": 2, "sp": True, "pp": 2, "cp": 2},
    {"tp": 8, "sp": True},
)
"""Layouts; what devices are left over is data parallel."""

MIXTURES: tuple[dict[str, Any], ...] = (
    {},
    {"ep": 2},
    {"tp": 2, "sp": True, "ep": 2, "etp": 1},
    {"pp": 2, "ep": 2},
    {"ep": 8},
)


def main() -> None:
    """Run the benchmark, print its tables and write them as JSON."""
    options = parse_arguments()
    if options.run:
        return run_layout(json.loads(options.run))
    if options.expect:
        print(json.dumps(expected_memory(json.loads(options.expect))))
        return None
    with tempfile.TemporaryDirectory() as name:
        failed = 0
        for kind, layouts, more in (("dense", DENSE, {}), ("experts", MIXTURES, EXPERTS)):
            folder = Path(name, kind)
            sizes = SHAPES[options.shape] | more
            make_model(folder / "hf", **sizes)
            number = options.steps * GLOBAL_BATCH_SIZE
            lengths = {"prompt": (PROMPT, PROMPT), "response": (RESPONSE - 1, RESPONSE - 1)}
            write_feedback(folder / "train.jsonl", number, vocab_size=sizes["vocab_size"], **lengths)
            rows = [row for precision in options.precision for row in table(folder, layouts, precision, options)]
            publish(f"layouts-{kind}", rows, settings=vars(options))
            failed += sum(row[MEASURED[1]] == FAILED for row in rows)
    if failed:
        sys.exit(f"{failed} layouts failed; they have said why.")


def parse_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument("--devices", type=int, default=gpus or 2, help="a power of two; by default all GPUs")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--shape", default="body-heavy, 155 M", choices=SHAPES)
    parser.add_argument("--precision", nargs="+", default=["32", "bf16-mixed"] if gpus else ["32"])
    for name in ("--run", "--expect"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def table(
    folder: Path, layouts: tuple[dict[str, Any], ...], precision: str, options: argparse.Namespace
) -> list[dict[str, str]]:
    """Return a row for one device and each layout that `options.devices` have room for."""
    alone = measure(folder, {}, 1, precision, options.steps)
    rows = [table_row("one device", precision, alone, alone)]
    for layout in layouts:
        used = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)
        # experts are divided among ranks that hold other data
        if used * layout.get("ep", 1) <= options.devices:
            found = measure(folder, layout, options.devices, precision, options.steps)
            rows.append(table_row(name_of(layout, options.devices // used), precision, found, alone))
    return rows


def name_of(layout: dict[str, Any], data_parallel: int) -> str:
    """Return a layout as people write it."""
    parts = [name.upper() if value is True else f"{name.upper()}{value}" for name, value in layout.items()]
    return " ".join([*parts, *([f"DP{data_parallel}"] if data_parallel > 1 else [])])


def measure(folder: Path, layout: dict[str, Any], devices: int, precision: str, steps: int) -> list[dict[str, Any]]:
    """Return what each rank of a run has found; nothing if it has failed, which it has said why."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        asked = {"folder": str(folder), "out": out, "layout": layout, "devices": devices, "steps": steps}
        text = json.dumps({**asked, "precision": precision})
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if subprocess.run([sys.executable, __file__, "--run", text], env=environment).returncode:
            return []
        blind = environment | {"CUDA_VISIBLE_DEVICES": ""}  # a dry run wants no device
        said = subprocess.run(
            [sys.executable, __file__, "--expect", text], env=blind, stdout=subprocess.PIPE, check=True
        )
        expected = {"expected": json.loads(said.stdout.splitlines()[-1])}
        return [
            expected | json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(out).glob("rank*.json"))
        ]


def table_row(name: str, precision: str, found: list[dict[str, Any]], alone: list[dict[str, Any]]) -> dict[str, str]:
    """Return a layout's row."""
    row = dict.fromkeys(("layout", "precision", *MEASURED), FAILED) | {"layout": name, "precision": precision}
    if not found or not alone:
        return row
    return row | {
        MEASURED[0]: found[0]["layers"],
        MEASURED[1]: f"{found[0]['loss'][0]:.9g}",
        MEASURED[2]: f"{farthest(found[0]['loss'], alone[0]['loss']):.1e}",
        MEASURED[3]: f"{farthest(found[0]['grad_norm'], alone[0]['grad_norm']):.1e}",
        MEASURED[4]: f"{statistics.median(found[0]['seconds'][WARMUP_STEPS:]):.3f}",
        MEASURED[5]: f"{max(rank['memory'] for rank in found) / 2**30:.2f}",
        MEASURED[6]: "" if found[0]["expected"] is None else f"{found[0]['expected'] / 2**30:.2f}",
    }


def farthest(values: list[float], expected: list[float]) -> float:
    """Return the greatest relative distance."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))


def run_layout(asked: dict[str, Any]) -> None:
    """Train, as one rank of a run; the launcher starts the others with the same command line."""
    silence_loaded_packages()
    logging.getLogger("nemo_kto").setLevel(logging.WARNING)
    train(configured(asked), callbacks=[Noting(Path(asked["out"]))])


def expected_memory(asked: dict[str, Any]) -> int | None:
    """Return the bytes that the fullest rank should take; None of a mixture."""
    silence_loaded_packages()
    config = configured(asked)
    hf_config = load_hf_config(Path(asked["folder"], "hf"))
    layout = requested_layout(config, asked["devices"])
    if dimensions_of(hf_config).mixture is not None:
        return None
    rows = [[(PROMPT, RESPONSE)]] * (GLOBAL_BATCH_SIZE // layout.data)
    first_ranks = range(0, layout.world_size, layout.world_size // layout.pipeline)
    return max(step_memory(config, hf_config, layout, rank, rows=rows, every_layer=True).peak for rank in first_ranks)


def configured(asked: dict[str, Any]) -> KTOConfig:
    """Return the configuration of a run."""
    config: KTOConfig = make_config(Path(asked["folder"]), global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=1)
    config.exp_manager.explicit_log_dir = str(Path(asked["out"], "log"))
    config.trainer.devices = asked["devices"]
    config.trainer.precision = asked["precision"] if "-" in asked["precision"] else int(asked["precision"])
    config.trainer.kto.max_steps = asked["steps"]
    config.model.optim.lr = config.model.optim.sched.min_lr = 1e-4
    config.model.optim.sched.warmup_steps = 0
    for name, value in asked["layout"].items():
        setattr(config.model, SHORT[name], value)
    return config


class Noting(Callback):
    """Writes a file for each rank, with its series, seconds and memory.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, Any] = {"loss": [], "grad_norm": [], "seconds": []}
        self._started = 0.0

    def on_train_start(self, *_: Any) -> None:
        """Forget what reading the model took."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak()

    def on_train_batch_start(self, *_: Any) -> None:
        """Start a step's time."""
        synchronize()
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Note a step."""
        synchronize()
        self._found["seconds"].append(time.perf_counter() - self._started)
        for name in ("loss", "grad_norm"):
            self._found[name].append(float(trainer.callback_metrics[f"train/{name}"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it all."""
        modules = [type(module).__module__ for chunk in pl_module.chunks for module in chunk.modules()]
        self._found["layers"] = "TE" if any(name.startswith("transformer_engine") for name in modules) else "own"
        self._found["memory"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()
        file = self._folder / f"rank{trainer.global_rank:03}.json"
        file.write_text(json.dumps(self._found), encoding="utf-8")


if __name__ == "__main__":
    main()
