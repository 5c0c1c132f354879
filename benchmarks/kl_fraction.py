"""How much noisier a part of the KL set makes the baseline z, on the quickstart's model and feedback.

python benchmarks/kl_fraction.py [--steps N]

One run of KTO with the whole KL set; of every step the log-ratios of its pairs are kept. From them z is formed again
of random parts of the set, `DRAWS` times a step. Two standard deviations are shown: of z around that of the whole set,
and, to compare with, of the whole set's z from step to step (which contains how z moves in training). Values are in
units of the reward, beta * log-ratio. The first steps, in which policy and reference are nearly equal, are left out.

By theory the first is sqrt((1 - f) / (f * G)) times the standard deviation of a batch's rewards of pairs, with f the
fraction and G the batch size. z is then cut off at 0, which makes that less, and the mean of z greater the noisier it
is where the whole set's mean is near 0 or below. How often that happens depends on data and model: this is one
example, not a law.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import publish

from nemo_kto.commands.train import train
from nemo_kto.config.schema import KTOConfig
from nemo_kto.kto import megatron_gpt_kto_model
from nemo_kto.quiet import silence_loaded_packages

QUICKSTART = Path(__file__).resolve().parent.parent / "examples" / "nlp" / "kto" / "quickstart"
BETA, BATCH_SIZE, DRAWS, SKIPPED_STEPS = 0.5, 32, 500, 5
FRACTIONS = (1.0, 0.5, 0.25, 0.125)


def main() -> None:
    """Train, form z of parts of the KL sets, and print how much it varies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of the run")
    options = parser.parse_args()
    silence_loaded_packages()
    rewards = rewards_of_pairs(options.steps)[SKIPPED_STEPS:]
    whole = [mean.item() for mean in rewards.mean(1).clamp(min=0)]
    rows = []
    for fraction in FRACTIONS:
        number = round(fraction * BATCH_SIZE)
        parts = torch.stack([z_of_parts(pairs, number) for pairs in rewards])
        deviations = (parts - rewards.mean(1).clamp(min=0)[:, None]).square().mean(1).sqrt()
        by_theory = (((1 - fraction) / number) ** 0.5 * rewards.std(1)).mean()
        rows.append(
            {
                "kl_fraction": fraction,
                "pairs": number,
                "deviation of z in a step": f"{deviations.mean():.3f}",
                "by theory, without the cut": f"{by_theory:.3f}",
                "mean z": f"{parts.mean():.3f}",
                "deviation of z between steps": f"{statistics.stdev(whole):.3f}",
                "forward units a step, live / cached": f"{4 + 2 * fraction:.3g} / {3 + fraction:.3g}",
            }
        )
    publish("kl_fraction", rows, beta=BETA, batch_size=BATCH_SIZE, steps=options.steps)


def rewards_of_pairs(num_steps: int) -> torch.Tensor:
    """Return the rewards `[steps, batch]` of the KL set of each step of a run."""
    found: list[torch.Tensor] = []
    original = megatron_gpt_kto_model.form_baseline

    def observed(*args: Any, kl_log_ratios: torch.Tensor, **kwargs: Any) -> Any:
        found.append(BETA * kl_log_ratios.clone())
        return original(*args, kl_log_ratios=kl_log_ratios, **kwargs)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(megatron_gpt_kto_model, "form_baseline", observed):
        train(make_quickstart_config(Path(folder), num_steps))
    return torch.stack(found)


def z_of_parts(pairs: torch.Tensor, number: int) -> torch.Tensor:
    """Return z `[DRAWS]`, cut off at 0, of random parts of so many of the pairs."""
    parts = torch.stack([pairs[torch.randperm(len(pairs))[:number]] for _ in range(DRAWS)])
    return parts.mean(1).clamp(min=0)


def make_quickstart_config(log_dir: Path, num_steps: int) -> KTOConfig:
    """Return the quickstart's configuration, for one process and without what is written at the end."""
    config = KTOConfig()
    config.pretrained_checkpoint.restore_from_path = str(QUICKSTART / "model")
    config.exp_manager.explicit_log_dir = str(log_dir)
    config.exp_manager.create_checkpoint_callback = False
    config.export.enabled = False
    config.report.enabled = False
    config.trainer.accelerator = "cpu"
    config.trainer.kto.max_steps = num_steps
    config.model.global_batch_size = config.model.micro_batch_size = BATCH_SIZE
    config.model.kto.ref_policy_kl_penalty = BETA
    config.model.optim.lr = 2e-4
    config.model.data.data_prefix.train = [str(QUICKSTART / "data" / "train.jsonl")]
    return config


if __name__ == "__main__":
    main()
