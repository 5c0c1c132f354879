"""Tensors of the CPU, brought to a device without anybody waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 16
"""Bytes; a multiple of every dtype's size."""


def upload(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """The tensors on `device`; those that are there already as they are.

    On CUDA all others go in one copy from pinned memory, which runs when the device comes to it; a copy from ordinary
    memory would wait for all that the device has to do before. They share their memory.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    moving = [tensor for tensor in tensors if not tensor.is_cuda]
    sizes = [-(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED for tensor in moving]
    pinned = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for part, tensor in zip(torch.split(pinned, sizes), moving, strict=True):
        _as(part, tensor).copy_(tensor)
    arriving = torch.split(pinned.to(device, non_blocking=True), sizes)
    arrived = iter([_as(part, tensor) for part, tensor in zip(arriving, moving, strict=True)])
    return [tensor.to(device) if tensor.is_cuda else next(arrived) for tensor in tensors]


def _as(memory: Tensor, tensor: Tensor) -> Tensor:
    """The beginning of `memory`, as a tensor of the other's dtype and shape."""
    return memory[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
