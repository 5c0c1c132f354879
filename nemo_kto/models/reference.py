"""The reference policy: the weights training started from, scored by the live model's own code.

A second model is never built. `activated` puts the reference weights into the live model for the duration of a
`with` block and restores the policy exactly, also when the block raises.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from nemo_kto.errors import ConfigError


class ReferencePolicy(Protocol):
    """Anything that can make the live model behave as the reference for a while."""

    def activated(self) -> AbstractContextManager[None]:
        """Return a context manager inside which the live model is the reference policy."""
        ...


class _ExchangedReference(ABC):
    """Holds the reference's weights and exchanges them with the live parameters' and back."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Take the current weights of `model` as the reference."""
        self._parameters = list(model.parameters())
        self._stored = [self._copy(parameter) for parameter in self._parameters]

    @contextmanager
    def activated(self) -> Iterator[None]:
        """Exchange policy and reference, and exchange them back at the end, also when the block raises."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @staticmethod
    @abstractmethod
    def _copy(parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return the copy of a parameter that is kept."""

    @abstractmethod
    def _exchange(self) -> None:
        """Exchange the parameters' contents with the kept copies; twice restores both exactly."""


class CpuSwapReference(_ExchangedReference):
    """Keeps the reference in CPU memory (pinned for CUDA) and exchanges the contents with the live parameters.

    Memory: one copy of this rank's parameters in CPU memory, plus one parameter on the device while it is exchanged.
    The parameters keep their storage, so views into them stay valid.
    """

    @staticmethod
    def _copy(parameter: torch.nn.Parameter) -> torch.Tensor:
        copy = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=parameter.is_cuda)
        return copy.copy_(parameter.detach())

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, stored in zip(self._parameters, self._stored, strict=True):
            live = parameter.detach().clone()
            parameter.copy_(stored, non_blocking=True)
            stored.copy_(live)  # blocks until `live` is on the host, so the next exchange finds it complete


class ResidentReference(_ExchangedReference):
    """Keeps the reference on the parameters' device and exchanges pointers: nothing is copied.

    Memory: one copy of this rank's parameters on the device.
    """

    @staticmethod
    def _copy(parameter: torch.nn.Parameter) -> torch.Tensor:
        return parameter.detach().clone()

    def _exchange(self) -> None:
        for index, parameter in enumerate(self._parameters):
            parameter.data, self._stored[index] = self._stored[index], parameter.data


def make_reference(mode: str, model: torch.nn.Module) -> ReferencePolicy:
    """Return the reference policy of `mode`, holding the current weights of `model`.

    Args:
        mode: `cpu_swap`, `resident`, or `auto`: `resident` on a CPU, where both would be in the same memory and
            exchanging pointers is free, else `cpu_swap`, which leaves the device's memory to training.
        model: The live model, before it is wrapped or trained.

    Raises:
        ConfigError: `mode` is unknown.
    """
    if mode == "auto":
        mode = "cpu_swap" if next(model.parameters()).is_cuda else "resident"
    if mode == "cpu_swap":
        return CpuSwapReference(model)
    if mode == "resident":
        return ResidentReference(model)
    raise ConfigError(f"model.kto.reference.mode={mode} is unknown. Use auto, cpu_swap or resident.")
