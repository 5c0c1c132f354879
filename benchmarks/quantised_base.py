"""What a base in fewer bits costs in quality: the quickstart's feedback, adapters beside each kind of base.

python benchmarks/quantised_base.py [--steps N]

The quickstart's model answers politely or curtly, half of each; its feedback likes polite answers. Adapters of rank 16
beside all linear layers are trained on it with the same seed, order of data and settings: beside the model in
bfloat16, in four bits, in four bits whose scales have eight, and in eight bits. Shown are the last validation's margin
between the rewards of good and bad answers, the share of answers on the right side of zero, and the loss. The
reference is each base itself, without adapters: the margin says how well that could be improved on, not how good it
was.

The model's feed-forward parts are widened by channels of zeros from 352 to 384, which changes nothing it computes, as
blocks of four bits have 64 channels.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import in_new_process, publish
from kl_fraction import QUICKSTART

KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "nf4": {"quantize_base": "nf4"},
    "nf4, double quantization": {"quantize_base": "nf4", "double_quantization": True},
    "int8": {"quantize_base": "int8"},
}
WIDTH = 384


def main() -> None:
    """Train beside each kind of base, and show what became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of each run")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        in_new_process(widen, Path(name) / "hf")
        for kind, keys in KINDS.items():
            found = in_new_process(trained, Path(name), keys, options.steps)
            rows.append({"base": kind, **{column: f"{value:.4f}" for column, value in found.items()}})
            print(rows[-1], flush=True)
    publish("quantised_base", rows, steps=options.steps)


def widen(folder: Path) -> None:
    """Save the quickstart's model with channels of zeros besides."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "model", dtype=torch.float32)
    for layer in model.model.layers:
        feed_forward = layer.mlp
        more = WIDTH - feed_forward.down_proj.in_features
        for projection in (feed_forward.gate_proj, feed_forward.up_proj):
            projection.weight = torch.nn.Parameter(torch.nn.functional.pad(projection.weight, (0, 0, 0, more)))
        down = feed_forward.down_proj
        down.weight = torch.nn.Parameter(torch.nn.functional.pad(down.weight, (0, more)))
    model.config.intermediate_size = WIDTH
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(QUICKSTART / "model").save_pretrained(folder)


def trained(folder: Path, keys: dict[str, Any], steps: int) -> dict[str, float]:
    """Return what the last validation found."""
    from nemo_kto.quiet import silence_loaded_packages, silence_startup_noise

    silence_startup_noise()
    from lightning.pytorch import Callback

    from nemo_kto.commands.train import train
    from nemo_kto.config.compose import load_config

    silence_loaded_packages()

    class Last(Callback):
        metrics: dict[str, float] = {}

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.metrics = dict(pl_module.last_metrics)

    last = Last()
    with tempfile.TemporaryDirectory() as log:
        values = {
            "pretrained_checkpoint.restore_from_path": str(folder / "hf"),
            "model.data.data_prefix.train": [str(QUICKSTART / "data" / "train.jsonl")],
            "model.data.data_prefix.validation": [str(QUICKSTART / "data" / "validation.jsonl")],
            "exp_manager.explicit_log_dir": log,
            "exp_manager.create_checkpoint_callback": False,
            "export.enabled": False,
            "report.enabled": False,
            "trainer.accelerator": "cpu",
            "trainer.devices": 1,
            "trainer.precision": "bf16-mixed",
            "trainer.kto.max_steps": steps,
            "trainer.kto.max_epochs": 2,
            "trainer.kto.val_check_interval": steps,
            "model.global_batch_size": 32,
            "model.micro_batch_size": 32,
            "model.kto.ref_policy_kl_penalty": 0.5,
            "model.optim.lr": 2e-3,
            "model.peft.peft_scheme": "lora",
            "model.peft.lora_tuning.target_modules": ["all"],
            "model.peft.lora_tuning.adapter_dim": 16,
            **{f"model.peft.{key}": value for key, value in keys.items()},
        }
        train(load_config(values), callbacks=[last])
    return {name: last.metrics[f"val/{name}"] for name in ("rewards/margins", "rewards/accuracies", "loss")}


if __name__ == "__main__":
    main()
