"""What `nemo-kto doctor` looks at outside of the run itself: its log folder and disk, its port, its other ranks."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PretrainedConfig

from nemo_kto.config.folders import STOP_FILE, log_directory
from nemo_kto.config.schema import KTOConfig
from nemo_kto.network.projections import LoRASettings
from nemo_kto.runs.facts import common_versions
from nemo_kto.runs.reference import lora_settings
from nemo_kto.runs.trainer import space_plan
from nemo_kto.runtime import meeting
from nemo_kto.runtime.checkpoint_folders import checkpoints_in, fault_of, is_unfinished
from nemo_kto.runtime.disk import as_size, existing, free_bytes
from nemo_kto.runtime.launch import launch
from nemo_kto.runtime.log_lock import state_of
from nemo_kto.runtime.strategy import cluster_environment
from nemo_kto.weights.adapter_tensors import expected_shapes

Level = Literal["ok", "warning", "error"]

_SKEW = 1.0
"""Seconds by which clocks may differ: less is what asking for them takes on a busy machine."""

_TRIES = 3

_PATIENCE = timedelta(seconds=40)
"""How long the ranks wait for each other, so that all is said within a minute."""


@dataclass(frozen=True)
class Finding:
    """One line: how bad it is, what it is about, and what was found, with what to do."""

    level: Level
    topic: str
    text: str


def log_folder(config: KTOConfig) -> Iterator[Finding]:
    """Look at the log folder: whether it can be written to, who is writing there, and what a run would go on from."""
    log_dir = log_directory(config)
    there = existing(log_dir)
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        text = f"{there} cannot be written to. Name another one in exp_manager.explicit_log_dir."
        yield Finding("error", "log folder", text)
        return
    yield Finding("ok", "log folder", f"{log_dir}, {as_size(free_bytes(log_dir))} are free")
    lock = state_of(log_dir)
    if lock is not None:
        yield Finding("error" if lock[0] else "warning", "lock", lock[1])
    if (log_dir / STOP_FILE).exists():
        text = f"{log_dir / STOP_FILE} is there: a run would stop after its first step. Remove it."
        yield Finding("warning", "log folder", text)
    yield from _checkpoints(log_dir / "checkpoints")


def _checkpoints(folder: Path) -> Iterator[Finding]:
    for checkpoint in checkpoints_in(folder):
        if is_unfinished(checkpoint):
            yield Finding("warning", "checkpoint", f"{checkpoint.name}: a run was stopped while it was written")
            continue
        fault = fault_of(checkpoint, checksums=False)
        if fault is not None:
            yield Finding("warning", "checkpoint", f"{checkpoint.name} is damaged: {fault}")
            continue
        yield Finding("ok", "checkpoint", f"the run goes on from {checkpoint.name}")
        return


def disk(config: KTOConfig, hf_config: PretrainedConfig) -> Iterator[Finding]:
    """Compare what a run is going to write with what is free; see `SpaceCheck`, which does so when it has begun.

    Args:
        config: The configuration.
        hf_config: The model's configuration.
    """
    lora = lora_settings(config, hf_config)
    validates = bool(config.model.data.data_prefix.validation or config.model.data.validation_fraction)
    best = config.exp_manager.checkpoint_callback_params.save_top_k if validates else 0
    plan = space_plan(config, hf_config, adapters=lora is not None, best=max(best, 0))
    counts = _parameters(hf_config, lora)
    for place, size, what in plan.needs(*counts):
        yield Finding("ok", "disk", f"{as_size(size)} are going to be written to {place}: {what}")
    if best == -1:
        text = "exp_manager.checkpoint_callback_params.save_top_k=-1 adds a checkpoint with each validation"
        yield Finding("warning", "disk", text)
    for text in plan.warnings(*counts):
        yield Finding("warning", "disk", text)


def _parameters(hf_config: PretrainedConfig, lora: LoRASettings | None) -> tuple[int, int]:
    """Return how many parameters the model has, and how many of them are trained."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    everything = sum(parameter.numel() for parameter in model.parameters())
    if lora is None:
        return everything, everything
    adapters = sum(math.prod(shape) for shape in expected_shapes(lora, hf_config).values())
    return everything + adapters, adapters


def port() -> Iterator[Finding]:
    """Look whether the port is free where this process would have to open it."""
    named = os.environ.get("MASTER_PORT")
    local = os.environ.get("MASTER_ADDR") in (None, "localhost", "127.0.0.1", socket.gethostname())
    if named is None or not local or launch().starter is not None:  # whoever has launched this process holds it
        return
    with socket.socket() as tried:
        try:
            tried.bind(("", int(named)))
        except (OSError, ValueError, OverflowError) as error:
            yield Finding(
                "error", "port", f"MASTER_PORT={named} cannot be used ({error}). Unset it, or name another one."
            )
            return
    yield Finding("ok", "port", f"MASTER_PORT={named} is free")


def ranks() -> Iterator[Finding]:
    """Meet the other ranks, if a launcher has started some; compare clocks and versions of packages with theirs."""
    if launch().starter is None:
        return
    environment = cluster_environment()
    world_size = environment.world_size()
    if world_size == 1:
        return
    rules = _Hurried(timeout=_PATIENCE, hang_folder=Path(), facts={})
    meeting.join(
        "gloo",
        address=environment.main_address,
        port=environment.main_port,
        rank=environment.global_rank(),
        world_size=world_size,
        rules=rules,
    )
    try:
        yield Finding("ok", "ranks", f"all {world_size} have met")
        yield from _clocks(_times(world_size))
        meeting.check_alike(common_versions())
        yield Finding("ok", "ranks", "all have the same versions of packages")
    finally:
        dist.destroy_process_group()


class _Hurried(meeting.RankRules):
    """Rules under which no rank has longer to come than any other thing may take."""

    @property
    def start(self) -> timedelta:
        return self.timeout


def _times(world_size: int) -> list[tuple[str, float]]:
    """Return each rank's machine and what its clock said at the same moment, as nearly as a few tries come to it."""
    found = []
    for _ in range(_TRIES):
        dist.barrier()
        mine = (socket.gethostname(), time.time())
        times: list[tuple[str, float]] = [mine] * world_size
        dist.all_gather_object(times, mine)
        found.append(times)
    return min(found, key=lambda times: max(moment for _, moment in times) - min(moment for _, moment in times))


def _clocks(times: list[tuple[str, float]]) -> Iterator[Finding]:
    (leader, now), *others = times
    far = {host: moment - now for host, moment in others if abs(moment - now) > _SKEW}
    if not far:
        yield Finding("ok", "clocks", f"those of all ranks agree within {_SKEW:.0f} s")
    for host, ahead in far.items():
        yield Finding(
            "warning",
            "clocks",
            f"that of {host} is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {leader}: logs and "
            "files of a run that goes on elsewhere will be in the wrong order. Set them by NTP.",
        )
