"""What it saves to run the vision tower once a step, rather than in each pass over the same images.

python benchmarks/images.py [--steps N] [--rounds N]

The model and the feedback of examples/nlp/kto/vision, on one process, the tower frozen. A prompt's image is seen in
four passes of a step: of policy and reference, over the samples and over the KL set. In one kind of run what the tower
makes of it is kept within the step, as usual; in the other it is forgotten before each row. The two take turns. That
the losses are the same is part of the table: the greatest difference of a step's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from common import median_and_range, publish
from kl_fraction import BATCH_SIZE, make_quickstart_config
from lightning.pytorch import Callback

from nemo_kto.commands.train import train
from nemo_kto.config.schema import KTOConfig
from nemo_kto.network.vision import Vision
from nemo_kto.quiet import silence_loaded_packages

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "nlp" / "kto" / "vision"
MICRO_BATCH_SIZE = 8


class Steps(Callback):
    """Keeps the seconds and the loss of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Keep them."""
        self.seconds.append(pl_module.last_metrics["train/step_time"])
        self.losses.append(pl_module.last_metrics["train/loss"])


def main() -> None:
    """Train both ways in turns, and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps of each run; the first two do not count")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    options = parser.parse_args()
    silence_loaded_packages()
    sys.path[:0] = [str(EXAMPLE), str(EXAMPLE.parent / "quickstart")]
    from make_data import write_data

    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder) / "data")
        found: dict[bool, list[tuple[Steps, int]]] = {True: [], False: []}
        for number in range(options.rounds):
            for keeps in found:
                log_dir = Path(folder) / f"{number}-{keeps}"
                found[keeps].append(run(Path(folder) / "data", log_dir, options.steps, keeps=keeps))
    kept, anew = found[True], found[False]
    losses = [zip(a.losses, b.losses, strict=True) for (a, _), (b, _) in zip(kept, anew, strict=True)]
    differs = max(abs(one - other) for pairs in losses for one, other in pairs)
    ratios = [
        statistics.median(a.seconds[2:]) / statistics.median(b.seconds[2:])
        for (a, _), (b, _) in zip(kept, anew, strict=True)
    ]
    publish(
        "images",
        [
            {
                "what the tower makes is": "kept within a step" if keeps else "made anew for each row",
                "images seen a step": f"{runs[0][1] / options.steps:.1f}",
                "seconds a step": median_and_range([value for steps, _ in runs for value in steps.seconds[2:]], 3),
                "beside the other": median_and_range(ratios if keeps else [1 / ratio for ratio in ratios]),
                "greatest difference of a loss": f"{differs:.1e}",
            }
            for keeps, runs in found.items()
        ],
        batch_size=BATCH_SIZE,
        micro_batch_size=MICRO_BATCH_SIZE,
        steps=options.steps,
        rounds=options.rounds,
    )


def run(data: Path, log_dir: Path, num_steps: int, *, keeps: bool) -> tuple[Steps, int]:
    """Train, and return what its steps were like and how often the tower was run for an image."""
    seen, features, steps, runs = Vision._seen, Vision.features, Steps(), []

    def counted(self: Vision, *arguments: Any) -> Any:
        runs.append(1)
        return seen(self, *arguments)

    def forgetful(self: Vision, *arguments: Any) -> Any:
        if not keeps:
            self.forget()
        return features(self, *arguments)

    with mock.patch.object(Vision, "_seen", counted), mock.patch.object(Vision, "features", forgetful):
        train(make_config(data, log_dir, num_steps), callbacks=[steps])
    return steps, len(runs)


def make_config(data: Path, log_dir: Path, num_steps: int) -> KTOConfig:
    """Return the quickstart's configuration with this example's model and data, in several micro-batches."""
    config = make_quickstart_config(log_dir, num_steps)
    config.pretrained_checkpoint.restore_from_path = str(EXAMPLE / "model")
    config.model.micro_batch_size = MICRO_BATCH_SIZE
    config.model.data.data_prefix.train = [str(data / "train.jsonl")]
    return config


if __name__ == "__main__":
    main()
