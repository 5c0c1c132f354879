"""Whether the checkpoints and the export of a run fit on its disks, told when training begins."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from nemo_kto.runtime.checkpoint import sharded_trained, sharding_metadata
from nemo_kto.runtime.checkpoint_folders import checkpoints_in
from nemo_kto.runtime.disk import as_size, existing, free_bytes

logger = logging.getLogger(__name__)

_OPTIMIZER_BYTES = 12
"""Of each trained parameter: its float32 value and Adam's two moments."""


def checkpoint_bytes(trained: int, params_dtype: torch.dtype) -> int:
    """Return what a checkpoint takes, which holds what is trained and its optimizer's state."""
    return trained * (params_dtype.itemsize + _OPTIMIZER_BYTES)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is going to write.

    Attributes:
        checkpoints: Folder of the checkpoints; None for none.
        at_once: Checkpoints that are there at the same time, the one being written included.
        params_dtype: Dtype of the model's parameters.
        export: Folder of the exported model; None for none.
        export_dtype: Its dtype.
        whole_model: Whether the export holds the whole model, or what was trained of it.
    """

    checkpoints: Path | None
    at_once: int
    params_dtype: torch.dtype
    export: Path | None
    export_dtype: torch.dtype
    whole_model: bool

    def needs(self, everything: int, trained: int) -> list[tuple[Path, int, str]]:
        """Return (place, bytes, what they are) of all that is still to be written.

        Args:
            everything: Parameters of the model.
            trained: Those that are trained.
        """
        found = []
        if self.checkpoints is not None:
            one = checkpoint_bytes(trained, self.params_dtype)
            missing = max(1, self.at_once - len(checkpoints_in(self.checkpoints)))
            what = f"checkpoints, {as_size(one)} each and up to {self.at_once} at a time"
            found.append((self.checkpoints, one * missing, what))
        if self.export is not None:
            size = (everything if self.whole_model else trained) * self.export_dtype.itemsize
            found.append((self.export, size, "the exported model"))
        return found

    def warnings(self, everything: int, trained: int) -> list[str]:
        """Return what does not fit, a sentence for each file system; see `needs`."""
        needs: dict[int, list[tuple[Path, int, str]]] = {}
        for need in self.needs(everything, trained):
            needs.setdefault(os.stat(existing(need[0])).st_dev, []).append(need)
        texts = []
        for together in needs.values():
            place, size = together[0][0], sum(each[1] for each in together)
            free = free_bytes(place)
            if size > free:
                texts.append(
                    f"This run is going to write {as_size(size)} to the file system of {place}, where {as_size(free)} "
                    f"are free: {' and '.join(each[2] for each in together)}. Make room, or keep fewer with "
                    "exp_manager.checkpoint_callback_params.save_top_k."
                )
        return texts


class SpaceCheck(Callback):
    """Compares what a run is going to write with what is free, when training begins, and warns.

    Args:
        plan: What it is.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare; one all-reduce of two numbers."""
        counts = count_parameters(pl_module.models)  # type: ignore[arg-type]
        if trainer.is_global_zero:
            for text in self._plan.warnings(*counts):
                logger.warning("%s", text)


def count_parameters(models: list[torch.nn.Module]) -> tuple[int, int]:
    """Return how many parameters the whole model has, and how many of them are trained; collective.

    One all-reduce of two numbers over the world.

    Args:
        models: This rank's chunks, not wrapped.
    """
    metadata = sharding_metadata()
    counts = [0, 0]
    for model in models:
        for number, state in enumerate(
            (model.sharded_state_dict(metadata=metadata), sharded_trained(model, metadata))
        ):  # type: ignore[operator]
            for value in state.values():
                if isinstance(value, ShardedTensor | ShardedTensorFactory) and is_main_replica(value.replica_id):
                    counts[number] += value.data.numel()
    total = torch.tensor(counts, dtype=torch.int64, device=next(models[0].parameters()).device)
    dist.all_reduce(total)
    everything, trained = total.tolist()
    return everything, trained
