"""What a training step asks of Megatron's optimizer and gradients that Megatron does not offer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import get_model_config


def step_if_finite(optimizer: MegatronOptimizer, *, usable: bool = True) -> tuple[bool, float | None]:
    """Step Megatron's optimizer, unless the gradient is not finite or not usable: then nothing is changed.

    Megatron (optimizer/optimizer.py, 0.16) measures the gradient's norm, the same on all ranks, and then steps
    whatever it is. In float16 it looks itself, and lowers the loss scale.

    Args:
        optimizer: Megatron's, of all chunks.
        usable: Whether the step is to be taken if its gradient is finite; the same on all ranks.

    Returns:
        Whether the parameters were updated, and the gradient's norm, None where float16 could not hold the gradient.
    """
    measure, take = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    norms: list[float] = []

    def measured() -> float:
        norms.append(float(measure()))
        return norms[-1]

    def taken() -> bool:
        return usable and math.isfinite(norms[-1]) and bool(take())

    optimizer.get_grad_norm, optimizer.step_with_ready_grads = measured, taken
    try:
        updated, _, _ = optimizer.step()
    finally:
        del optimizer.get_grad_norm, optimizer.step_with_ready_grads  # the class's own are seen again
    return bool(updated), norms[-1] if norms else None


@contextmanager
def unreduced_gradients(chunks: Sequence[Any]) -> Iterator[None]:
    """Let a pass leave each rank's gradients as that rank has made them; the buffers are emptied first.

    Args:
        chunks: This rank's chunks, wrapped for data parallelism.
    """
    config = get_model_config(chunks[0])
    kept = config.finalize_model_grads_func, config.no_sync_func
    config.finalize_model_grads_func, config.no_sync_func = None, nullcontext
    try:
        with ExitStack() as stack:
            for chunk in chunks:
                chunk.zero_grad_buffer()
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        config.finalize_model_grads_func, config.no_sync_func = kept


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Return the gradient that Megatron has gathered for a parameter, in its shape; None if it has none."""
    gradient: torch.Tensor | None = getattr(parameter, "main_grad", None)
    return gradient
