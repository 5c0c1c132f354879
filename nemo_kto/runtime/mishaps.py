"""Errors of PyTorch that are a user's, or a machine's, and no fault of the program: what to say of them."""

from __future__ import annotations

import re

import torch

from nemo_kto.errors import ConfigError, KTOError

_LOADER = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\)[^.]*")


def understood(error: BaseException) -> BaseException:
    """Return what to raise in place of an error: one that says what to do, or, of a fault of the program, itself.

    Args:
        error: What was raised while a model was trained or scored.
    """
    if isinstance(error, KTOError):
        return error
    return _out_of_memory(error) or _lost_loader(error) or error


def _out_of_memory(error: BaseException) -> KTOError | None:
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if not on_cpu and not isinstance(error, torch.OutOfMemoryError | MemoryError):
        return None
    (first, *_) = str(error).splitlines() or [type(error).__name__]
    reason = first.rpartition("DefaultCPUAllocator: ")[2]  # behind the place in PyTorch's source
    return ConfigError(
        f"There is not enough memory: {reason.rstrip('.')}. Lower model.micro_batch_size, model.micro_batch_tokens or "
        "model.data.seq_length, set model.activations_checkpoint_granularity, train fewer weights (model.peft), or "
        "divide the model among more processes, as with model.tensor_model_parallel_size."
    )


def _lost_loader(error: BaseException) -> KTOError | None:
    """Return what to say where a process that loads batches has ended; PyTorch tells how in what it was told first."""
    if not isinstance(error, RuntimeError) or not _LOADER.search(str(error)):
        return None
    cause = error.__cause__ or error.__context__
    found = _LOADER.search(str(cause)) or _LOADER.search(str(error))
    assert found is not None
    return KTOError(
        f"A process that loads batches was lost ({found[0].strip()}), as when memory runs out. If that comes again, "
        "lower model.data.num_workers."
    )
