"""What the optimizer's state takes in each of its forms, and how far they lead from float32, on the quickstart.

python benchmarks/optimizer_memory.py [--steps N]

Every row is a run of KTO in one process on the quickstart's model and feedback, in bfloat16 with float32 copies of the
parameters. Counted are the tensors of the optimizer's state: the copies and the two moments; "GPU" is what would be on
one, "host" what its host would have, besides 64 MB at most that gradients and parameters pass through.

Distances are from the run of the first row: the greatest difference of a step's loss, and that of all weights at the
end as a share of how far they have moved. To compare with, a run whose micro-batches are of another size, which is the
same but for the order of sums.

The last two rows are not offered: moments in eight bits, in blocks of 256 as torchao's and bitsandbytes' optimizers
have them (torchao's `OptimState8bit`), rounded after each step. The second of them has its blocks begin 100 numbers
later, as another layout would: the distance between the two is what a layout would change.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import in_new_process, publish

QUICKSTART = Path(__file__).resolve().parent.parent / "examples" / "nlp" / "kto" / "quickstart"
BLOCK = 256

RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, other micro-batches": {"micro_batch_size": 4},
    "states=bfloat16": {"states": "bfloat16"},
    "offload_fraction=0.5": {"offload_fraction": 0.5},
    "offload_fraction=1": {"offload_fraction": 1.0},
    "both": {"states": "bfloat16", "offload_fraction": 1.0},
    "int8 (not offered)": {"int8_from": 0},
    "int8, other blocks": {"int8_from": 100},
}


@dataclass
class Found:
    """What a run has shown.

    Attributes:
        device: Bytes of a trained parameter on the GPU.
        host: And in the host's memory.
        losses: Of each step.
        weights: At the end, all in one.
        moved: Their distance from where they began.
    """

    device: float
    host: float
    losses: torch.Tensor
    weights: torch.Tensor
    moved: float


def main() -> None:
    """Train in each form and show what it takes and where it leads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps of each run")
    options = parser.parse_args()
    found = {name: in_new_process(run, options.steps, changes) for name, changes in RUNS.items()}
    first = found["float32"]
    rows = [{"optimizer": name, **row_of(each, first)} for name, each in found.items()]
    publish("optimizer_memory", rows, steps=options.steps)
    apart = distance(*(found[name] for name in RUNS if name.startswith("int8")))
    print(f"\nThe two of int8 are apart by {apart[1]:.1%} of the way, and {apart[0]:.4f} in a step's loss.")


def row_of(found: Found, first: Found) -> dict[str, str]:
    """Return a run's row."""
    loss, weights = distance(found, first)
    return {
        "bytes a parameter, GPU": f"{found.device:.2f}",
        "/ float32": f"{found.device / first.device:.2f}",
        "host": f"{found.host:.2f}",
        "loss, at most": f"{loss:.1e}" if loss else "0",
        "weights / moved": f"{weights:.1e}" if weights else "0",
        "last loss": f"{found.losses[-1]:.4f}",
    }


def distance(one: Found, other: Found) -> tuple[float, float]:
    """Return the greatest difference of a step's loss, and that of the weights as a share of the other's way."""
    apart = (one.weights - other.weights).norm().item()
    return (one.losses - other.losses).abs().max().item(), apart / other.moved


def run(steps: int, changes: dict[str, Any]) -> Found:
    """Return what a run shows, in a process of its own."""
    from lightning.pytorch import Callback

    from nemo_kto.commands.train import train
    from nemo_kto.quiet import silence_loaded_packages
    from nemo_kto.runtime.optimizer import frugal_adams

    silence_loaded_packages()
    losses: list[float] = []
    found: dict[str, Any] = {}

    class Watch(Callback):
        """Looks at model and optimizer."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            found["began"] = weights_of(module)
            original = module._log
            module._log = lambda stage, metrics: (losses.append(metrics["loss"]), original(stage, metrics))

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            for inner in inner_optimizers(trainer):
                if "int8_from" in changes:
                    for state in inner.state.values():
                        in_eight_bits(state, changes["int8_from"])

        def on_train_end(self, trainer: Any, module: Any) -> None:
            found["weights"] = weights_of(module)
            numbers = sum(each.numel() for each in module.parameters() if each.requires_grad)
            frugal = frugal_adams(trainer.strategy.optimizers[0])
            on_host = {shard for adam in frugal for shard in adam._on_host}
            bytes_of = partial(state_bytes, inner_optimizers(trainer))
            # what is rounded here to eight bits, and kept in float32, would take a byte, and a scale for each block
            rounded = 2 * (1 + 4 / BLOCK - 4) if "int8_from" in changes else 0
            found["device"] = bytes_of(lambda shard: shard not in on_host) / numbers + rounded
            found["host"] = bytes_of(lambda shard: shard in on_host) / numbers

    with tempfile.TemporaryDirectory() as folder:
        train(make_config(Path(folder), steps, changes), callbacks=[Watch()])
    moved = (found["weights"] - found.pop("began")).norm().item()
    return Found(**found, losses=torch.tensor(losses), moved=moved)


def inner_optimizers(trainer: Any) -> list[Any]:
    """Return torch's optimizers within Megatron's."""
    optimizer = trainer.strategy.optimizers[0]
    return [each.optimizer for each in getattr(optimizer, "chained_optimizers", [optimizer])]


def state_bytes(optimizers: list[Any], chosen: Callable[[torch.Tensor], bool]) -> int:
    """Return the bytes of the state of some shards: moments, and a float32 copy where Megatron or Adam has one."""
    total = 0
    for inner in optimizers:
        for group in inner.param_groups:
            for shard in filter(chosen, group["params"]):
                state = inner.state[shard]
                # Megatron's plain Adam has the copies in the place of parameters
                total += state["master_param"].nbytes if "master_param" in state else shard.nbytes
                total += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    return total


def in_eight_bits(state: dict[str, torch.Tensor], start: int) -> None:
    """Round moments to torchao's eight bits, in blocks from a number on; what is before it is a block of its own."""
    from torchao.optim.subclass_8bit import OptimState8bit

    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        whole = state[name]
        for part in (whole[:start], whole[start:]):
            padded = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK))
            if padded.numel():
                rounded = OptimState8bit.zeros(padded.shape, signed, BLOCK).copy_(padded).dequantize()
                part.copy_(rounded[: part.numel()])


def weights_of(module: Any) -> torch.Tensor:
    """Return all weights in one."""
    return torch.cat([each.detach().float().flatten() for each in module.parameters()])


def make_config(folder: Path, steps: int, changes: dict[str, Any]) -> Any:
    """Return the configuration of a run on the quickstart's model and feedback."""
    from nemo_kto.config.schema import KTOConfig

    config = KTOConfig()
    config.pretrained_checkpoint.restore_from_path = str(QUICKSTART / "model")
    config.exp_manager.explicit_log_dir = str(folder)
    config.exp_manager.create_checkpoint_callback = False
    config.export.enabled = False
    config.report.enabled = False
    config.trainer.accelerator = "cpu"
    config.trainer.precision = "bf16-mixed"
    config.trainer.kto.max_steps = steps
    config.model.global_batch_size = 32
    config.model.micro_batch_size = changes.get("micro_batch_size", 8)
    config.model.data.data_prefix.train = [str(QUICKSTART / "data" / "train.jsonl")]
    config.model.data.seq_length = 128
    config.model.kto.ref_policy_kl_penalty = 0.5
    config.model.optim.lr = 2e-4
    config.model.optim.sched.warmup_steps = 5
    config.model.optim.states = changes.get("states", "float32")
    config.model.optim.offload_fraction = changes.get("offload_fraction", 0.0)
    return config


if __name__ == "__main__":
    main()
