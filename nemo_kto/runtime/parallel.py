"""A layout set up: Megatron's process groups, and this process's place in them.

Everything outside `runtime/` receives groups, ranks and sizes from here and never reads Megatron's global state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from nemo_kto.errors import CheckpointError, ConfigError, KTOError
from nemo_kto.runtime import cpu_megatron, megatron_fixes, row_shapes
from nemo_kto.runtime.launch import check_environment, known_device_count, launch, meeting_place
from nemo_kto.runtime.layout import Layout

_T = TypeVar("_T")


def device_count(devices: int | str, accelerator: str) -> int:
    """Return the number of processes of one node for `trainer.devices`.

    "auto" means what torchrun or Slurm started here, else every GPU, else one CPU process.

    Raises:
        ConfigError: This process does not see as many GPUs.
    """
    visible = torch.cuda.device_count() if accelerator == "gpu" else 1
    known = known_device_count(devices)
    if known is None:
        return visible
    if accelerator == "gpu" and known > visible:
        asked = f"trainer.devices={devices}" if devices != "auto" else f"{launch().starter} started {known} processes"
        raise ConfigError(
            f"{asked}, but this process sees {visible} GPUs, and each process takes one of its own. Under Slurm every "
            "task has to see all of its node: ask for them with --gpus-per-node, not --gpus-per-task or --gpu-bind."
        )
    return known


@contextmanager
def default_group() -> Iterator[None]:
    """Provide the default process group of a command that runs without Lightning.

    It is one of the processes that torchrun or Slurm has started, or of this one. Afterwards all groups are gone.
    """
    on_cuda = torch.cuda.is_available()
    check_environment()
    found = launch()
    if on_cuda:
        torch.cuda.set_device(found.local_rank)
    else:
        cpu_megatron.enable_cpu()
    backend = "nccl" if on_cuda else "gloo"
    if found.starter == "torchrun":
        dist.init_process_group(backend)
    elif found.starter == "Slurm":
        address, port = meeting_place()
        assert found.world_size is not None
        place = f"tcp://{address}:{port}"
        dist.init_process_group(backend, init_method=place, rank=found.rank, world_size=found.world_size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        destroy()


def initialize(layout: Layout, *, seed: int, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Create Megatron's process groups for `layout` and seed every generator; needs an initialised default group.

    Args:
        layout: The layout.
        seed: The seed.
        timeout: How long a rank waits for the others in an exchange.
    """
    megatron_fixes.route_without_transformer_engine()
    megatron_fixes.keep_less_for_backward()
    megatron_fixes.measure_norms_on_the_device()
    megatron_fixes.load_without_torch_adams_step()
    megatron_fixes.write_without_manager()
    megatron_fixes.outlive_failed_writes()
    row_shapes.exchange_no_shapes()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
            virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor_size,
            distributed_timeout_minutes=timeout / timedelta(minutes=1),  # which makes a timedelta of it again
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
        cp_rank: Rank within the context-parallel group.
        dp_rank: Rank within the data-parallel group.
        dp_size: Size of the data-parallel group.
        is_first_stage: Whether this process holds the embedding.
        is_last_stage: Whether this process holds the output layer, and with it the log-probs and the loss.
        tp_group: Tensor-parallel process group.
        pp_group: Pipeline-parallel process group.
        cp_group: Context-parallel process group.
        dp_group: Data-parallel process group.
        dp_cp_group: Data- and context-parallel ranks together: those that hold the same parameters.
    """

    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    dp_size: int
    is_first_stage: bool
    is_last_stage: bool
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup

    @property
    def reports(self) -> bool:
        """Whether this process contributes to sums over the whole world: one per data-parallel replica."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0


def position() -> RankPosition:
    """Return this process's place; needs `initialize`."""
    return RankPosition(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        is_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def run_everywhere(action: Callable[[], _T]) -> _T:
    """Return what `action` returns, which every rank runs, or fail together: one gathering of objects.

    Args:
        action: What may go wrong on some ranks; without exchanges between them.

    Raises:
        KTOError: `action` raised it on this rank, or another.
    """
    result, failure = None, None
    try:
        result = action()
    except KTOError as error:
        failure = error
    failures: list[KTOError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    first = next((error for error in failures if error is not None), None)
    if first is not None:
        raise first
    return cast(_T, result)


def run_on_rank_zero(action: Callable[[], None], failure: str) -> None:
    """Run `action` on global rank 0 while the others wait: one broadcast of one object.

    Args:
        action: What touches files.
        failure: What it means when that fails.

    Raises:
        CheckpointError: `action` raised an OSError; on all ranks, so that none waits for the others in vain.
        KTOError: `action` raised it; also on all ranks.
    """
    outcome: list[KTOError | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except KTOError as error:
            outcome = [error]
        except OSError as error:
            outcome = [CheckpointError(f"{failure}: {error}")]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
