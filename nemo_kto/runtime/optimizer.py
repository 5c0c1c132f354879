"""What training adds to a Megatron model: gradients in buffers, the optimizer, and what Megatron's passes call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.utils import get_model_config

from nemo_kto.config.schema import OptimConfig
from nemo_kto.runtime.checkpoint import fuse_torch_adam
from nemo_kto.runtime.dry_run import replaced
from nemo_kto.runtime.frugal_adam import FrugalAdam

_FIRST_LOSS_SCALE = 2.0**16
"""For float16; Megatron begins with 2^32 and loses some twenty steps before the first update."""


def wrap_for_training(chunks: Iterable[Any], optim: OptimConfig) -> torch.nn.ModuleList:
    """Return the chunks of a stage wrapped for data parallelism.

    The average over replicas is part of the loss scaling. The optimizer's state is always divided among the ranks that
    hold the same parameters: it is the one form that can be read under every other layout.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=optim.overlap_grad_sync,
        overlap_param_gather=optim.overlap_param_sync,
    )
    return torch.nn.ModuleList(DistributedDataParallel(get_model_config(chunk), config, chunk) for chunk in chunks)


def make_optimizer(
    chunks: Sequence[Any], optim: OptimConfig, *, params_dtype: torch.dtype, gradient_clip: float
) -> MegatronOptimizer:
    """Return Megatron's optimizer of wrapped chunks, connected to the hooks of Megatron's passes.

    Args:
        chunks: What `wrap_for_training` returned.
        optim: Its settings.
        params_dtype: Dtype of the parameters, see `MegatronStrategy`.
        gradient_clip: See `MegatronStrategy`.
    """
    config = MegatronOptimizerConfig(
        optimizer="adam",
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        fp16=params_dtype == torch.float16,
        initial_loss_scale=_FIRST_LOSS_SCALE,
        use_distributed_optimizer=True,
        overlap_param_gather=optim.overlap_param_sync,
        lr=optim.lr,
        min_lr=optim.sched.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=gradient_clip or math.inf,  # Megatron measures the norm only where it may clip
    )
    with _frugal(config, optim):
        optimizer: MegatronOptimizer = get_megatron_optimizer(config, list(chunks))
    fuse_torch_adam(optimizer)
    of_model = get_model_config(chunks[0])  # the one the schedule asks
    of_model.grad_scale_func = optimizer.scale_loss
    of_model.finalize_model_grads_func = finalize_model_grads
    of_model.no_sync_func = chunks[0].no_sync if len(chunks) == 1 else [chunk.no_sync for chunk in chunks]
    return optimizer


def frugal_adams(optimizer: MegatronOptimizer) -> list[FrugalAdam]:
    """Return those of Megatron's optimizers, of experts and of all else, that are `FrugalAdam`."""
    inner = [chained.optimizer for chained in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [one for one in inner if isinstance(one, FrugalAdam)]


@contextmanager
def _frugal(config: MegatronOptimizerConfig, optim: OptimConfig) -> Iterator[None]:
    """Let Megatron make `FrugalAdam` in the block, if its settings ask for what that does.

    Megatron's own ways (Megatron-Core 0.16): `use_precision_aware_optimizer` needs Transformer Engine's Adam;
    `optimizer_cpu_offload` (`HybridDeviceOptimizer`) refuses models in float32 ("can't optimize a non-leaf Tensor"),
    cannot be resumed without Transformer Engine, and then leaves the float32 parameters on the GPU. What both have in
    common is that the optimizer keeps the float32 parameters, which is what the flag set here means.
    """
    with ExitStack() as stack:
        if optim.states != "float32" or optim.offload_fraction:
            config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
            dtype = getattr(torch, optim.states)
            adam = partial(FrugalAdam, moments_dtype=dtype, offload_fraction=optim.offload_fraction)
            stack.enter_context(replaced(megatron_optimizer, "Adam", adam))
            stack.enter_context(replaced(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False))
        yield
