"""The parallel layout: checked once in plain integers, then set up once as Megatron process groups.

Everything outside `runtime/` receives groups, ranks and sizes from here and never reads Megatron's global state.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from nemo_kto.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the processes of a run are divided.

    Attributes:
        world_size: Number of processes, one per device.
        tensor: Tensor-model-parallel size.
        pipeline: Pipeline-model-parallel size.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1

    @property
    def data(self) -> int:
        """Data-parallel size: what tensor and pipeline parallelism leave over."""
        return self.world_size // (self.tensor * self.pipeline)

    def __str__(self) -> str:
        """Return the layout as one readable line."""
        return (
            f"{self.world_size} process{'es' if self.world_size != 1 else ''}: "
            f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}"
        )


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a model that a layout has to divide."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int


def check_layout(layout: Layout, sizes: ModelSizes) -> None:
    """Raise a ConfigError that names the keys and numbers when `layout` cannot hold a model of `sizes`."""
    model_parallel = layout.tensor * layout.pipeline
    if layout.world_size % model_parallel:
        raise ConfigError(
            f"{layout.world_size} processes (trainer.devices x trainer.num_nodes) cannot be divided by "
            f"model.tensor_model_parallel_size={layout.tensor} x model.pipeline_model_parallel_size={layout.pipeline} "
            f"= {model_parallel}. Use a multiple of {model_parallel} processes or smaller parallel sizes."
        )
    for name, value in (
        ("attention heads", sizes.num_attention_heads),
        ("key/value heads (query groups)", sizes.num_query_groups),
        ("feed-forward units", sizes.ffn_hidden_size),
    ):
        if value % layout.tensor:
            raise ConfigError(
                f"The model's {value} {name} cannot be divided by model.tensor_model_parallel_size={layout.tensor}. "
                f"Choose a tensor-parallel size that divides {value}."
            )
    if sizes.num_layers % layout.pipeline:
        raise ConfigError(
            f"The model's {sizes.num_layers} layers cannot be divided by "
            f"model.pipeline_model_parallel_size={layout.pipeline}. "
            f"Choose a pipeline-parallel size that divides {sizes.num_layers}."
        )


def check_batch(
    layout: Layout, *, global_batch_size: int, micro_batch_size: int, forward_micro_batch_size: int
) -> None:
    """Raise a ConfigError when the batch sizes do not fit the number of data-parallel ranks."""
    if global_batch_size % layout.data:
        raise ConfigError(
            f"model.global_batch_size={global_batch_size} cannot be divided by {layout.data} data-parallel ranks "
            f"({layout}). Use a multiple of {layout.data}."
        )
    share = global_batch_size // layout.data
    for key, size in (
        ("model.micro_batch_size", micro_batch_size),
        ("model.kto.log_prob_forward_micro_batch_size", forward_micro_batch_size),
    ):
        if share % size:
            raise ConfigError(
                f"{key}={size} does not divide a rank's share of the batch, {share} = model.global_batch_size="
                f"{global_batch_size} / {layout.data} data-parallel ranks. Use a divisor of {share}."
            )


def device_count(devices: int | str, accelerator: str) -> int:
    """Return the number of processes of one node for `trainer.devices`.

    "auto" means what torchrun started here, else every GPU, else one CPU process.
    """
    if devices != "auto":
        return int(devices)
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return torch.cuda.device_count() if accelerator == "gpu" else 1


def check_launched(layout: Layout) -> None:
    """Raise a ConfigError when torchrun started another number of processes than the configuration names."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) != layout.world_size:
        raise ConfigError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, but trainer.devices x trainer.num_nodes is "
            f"{layout.world_size}. Set trainer.devices=auto and trainer.num_nodes to what torchrun was given."
        )


def initialize(layout: Layout, *, seed: int) -> None:
    """Create Megatron's process groups for `layout` and seed every generator; needs an initialised default group."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor, pipeline_model_parallel_size=layout.pipeline
        )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def destroy() -> None:
    """Destroy Megatron's and torch's process groups, if there are any."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class RankPosition:
    """This process's place in the layout.

    Attributes:
        tp_rank: Rank within the tensor-parallel group.
        pp_rank: Pipeline stage.
        dp_rank: Rank within the data-parallel group.
        dp_size: Size of the data-parallel group.
        is_first_stage: Whether this process holds the embedding.
        is_last_stage: Whether this process holds the output layer, and with it the log-probs and the loss.
        tp_group: Tensor-parallel process group.
        pp_group: Pipeline-parallel process group.
        dp_group: Data-parallel process group.
    """

    tp_rank: int
    pp_rank: int
    dp_rank: int
    dp_size: int
    is_first_stage: bool
    is_last_stage: bool
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup

    @property
    def reports(self) -> bool:
        """Whether this process contributes to sums over the whole world: one per data-parallel replica."""
        return self.is_last_stage and self.tp_rank == 0


def position() -> RankPosition:
    """Return this process's place; needs `initialize`."""
    return RankPosition(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
    )


def run_on_rank_zero(action: Callable[[], None], failure: str) -> None:
    """Run `action` on global rank 0 while the others wait: one broadcast of one object.

    Args:
        action: What touches files.
        failure: What it means when that fails.

    Raises:
        CheckpointError: `action` raised an OSError; on all ranks, so that none waits for the others in vain.
    """
    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            outcome = [f"{failure}: {error}"]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise CheckpointError(outcome[0])
