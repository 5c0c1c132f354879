"""A run of many steps, validations, checkpoints and answers, whose memory and open files have to stay as they are.

    PYTHONPATH=. python tests/faults/soak.py 120 --folder /tmp/soak

It trains for so many minutes, in one process, and writes `soak.jsonl` and `soak.png`: after each validation how much
memory the process has, and how many open files, threads and processes of its own. The exit code is 1 if any of them
grows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from tests.faults.random_kills import make_assets
from tests.integration.assets import settings

WARM = 0.2
"""Share of the looks that are left out at the beginning: caches fill, and memory comes in large pieces."""

GROWTH = {"memory": 0.03, "files": 0.0, "threads": 0.0, "processes": 0.0}
"""What is counted -> by which share of itself it may grow from the first half of the rest to the second."""

EVENTS: dict[str, Any] = {
    "trainer__kto__max_steps": -1,
    "trainer__kto__max_epochs": 1_000_000,
    "trainer__kto__val_check_interval": 5,
    "trainer__kto__save_interval": 7,
    "exp_manager__create_checkpoint_callback": True,
    "exp_manager__checkpoint_callback_params__save_top_k": 2,
    "generation__num_prompts": 2,
    "generation__max_new_tokens": 8,
    "model__micro_batch_size": 4,
    "model__optim__sched__name": "Constant",
    "model__optim__lr": 1e-5,
    "model__optim__sched__min_lr": 0.0,
    "model__data__num_workers": 1,
}


def look() -> dict[str, int]:
    """Return what this process has now: bytes of memory, and numbers."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": sum(map(_is_held, os.listdir("/proc/self/fd"))),
        "threads": threading.active_count(),
        "processes": len(children),
    }


def _is_held(descriptor: str) -> bool:
    """Return whether an open file is one that stays: the watchdog's thread reads of /proc for moments."""
    try:
        return not os.readlink(f"/proc/self/fd/{descriptor}").startswith("/proc/")
    except FileNotFoundError:
        return False


def watching(file: Path) -> Any:
    """Return the callback that writes a line to `file` after each validation."""
    import gc

    from lightning.pytorch import Callback

    class Watch(Callback):
        """Looks after each validation, when nothing is under way."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step and trainer.global_step % EVENTS["trainer__kto__val_check_interval"] == 0:
                gc.collect()
                with file.open("a") as stream:
                    stream.write(json.dumps({"step": trainer.global_step, **look()}) + "\n")

    return Watch()


def growth(looks: list[dict[str, int]]) -> dict[str, float]:
    """Return by which share of itself each count grows: medians of two halves, the beginning left out."""
    rest = looks[int(len(looks) * WARM) :]
    first, second = rest[: len(rest) // 2], rest[len(rest) // 2 :]

    def median(part: list[dict[str, int]], name: str) -> float:
        return float(sorted(one[name] for one in part)[len(part) // 2])

    return {name: median(second, name) / max(median(first, name), 1.0) - 1.0 for name in GROWTH}


def grows(looks: list[dict[str, int]]) -> list[str]:
    """Return what grows by more than it may."""
    return [name for name, share in growth(looks).items() if share > GROWTH[name]]


def read(file: Path) -> list[dict[str, int]]:
    """Return what was seen."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(root: Path, log_dir: Path, file: Path, **changes: Any) -> None:
    """Train in this process, and look."""
    from nemo_kto.commands.train import train
    from nemo_kto.config.compose import load_config

    prefix = {"model__data__data_prefix__validation": str(root / "validation.jsonl")}
    values = settings(root, log_dir, **{**EVENTS, **prefix, **changes})
    train(load_config(values), callbacks=[watching(file)])


def plot(looks: list[dict[str, int]], file: Path) -> None:
    """Draw what was seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    memory, counts = figure.subplots(1, 2)
    steps = [one["step"] for one in looks]
    memory.plot(steps, [one["memory"] / 1e6 for one in looks], linewidth=1)
    memory.set(xlabel="step", ylabel="resident memory (MB)", ylim=(0, None))
    for name in ("files", "threads", "processes"):
        counts.plot(steps, [one[name] for one in looks], linewidth=1, label=name)
    counts.set(xlabel="step", ylim=(0, None))
    counts.legend()
    figure.savefig(file, dpi=80)


def main() -> None:
    """Run it for as many minutes as are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("minutes", type=int)
    parser.add_argument("--folder", type=Path, required=True, help="for the model, the log folder and the results")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "soak.jsonl"
    hours, minutes = divmod(options.minutes, 60)
    limit = f"00:{hours:02}:{minutes:02}:00"
    run(make_assets(options.folder), options.folder / "log", file, exp_manager__max_time_per_run=limit)
    looks = read(file)
    plot(looks, options.folder / "soak.png")
    print(f"{len(looks)} looks, {looks[-1]['step']} steps; growth: {growth(looks)}")
    sys.exit(1 if grows(looks) else 0)


if __name__ == "__main__":
    main()
