"""Counts where the host waits for the device, in what runs on the simulated one."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cuda_sim import simulated_cuda

aten = torch.ops.aten

_DEPENDENT = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
    aten._unique2.default,
}
"""Operators of CUDA whose results have shapes, or values, that the host needs to know before it goes on."""

_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class HostSyncs(TorchDispatchMode):
    """Counts host waits, and copies from the host that wait, while it is entered.

    Attributes:
        found: (what, where in the product's or Megatron's code) -> how often.
        uploads: Copies from pinned memory, which do not wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self.uploads = 0

    def __enter__(self) -> HostSyncs:
        simulated_cuda.WAITED.append(self._note)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        simulated_cuda.WAITED.remove(self._note)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_cuda = any(tensor.is_cuda for tensor in tensors)
        if on_cuda and func is aten._local_scalar_dense.default:
            self._note("item")
        elif on_cuda and (func in _DEPENDENT or _by_mask(func, args)):
            self._note(str(func))
        elif func in (aten._to_copy.default, aten.copy_.default):
            self._note_copy(func, args, kwargs)
        return func(*args, **kwargs)

    def _note_copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if func is aten.copy_.default:
            there, here, waits = args[0].device, args[1], not (args[2] if len(args) > 2 else False)
        else:
            here, waits = args[0], not kwargs.get("non_blocking", False)
            there = torch.device(kwargs.get("device") or here.device)
        if there.type == here.device.type:
            return
        host = here if there.type == "cuda" else args[0] if func is aten.copy_.default else None
        pinned = host is not None and host.is_pinned()
        if waits or not pinned:  # a copy from ordinary memory waits whatever it is told
            self._note(f"copy {here.device.type} -> {there.type}")
        elif there.type == "cuda":
            self.uploads += 1

    def _note(self, what: str) -> None:
        self.found[what, _where()] += 1


def _by_mask(func: Any, args: tuple[Any, ...]) -> bool:
    if func not in _INDEXING or all(index is None or index.dtype != torch.bool for index in args[1]):
        return False
    # torch fills by the mask, and counts nothing, when what is put there is a number (canDispatchToMaskedFill)
    is_number = func is not aten.index.Tensor and args[2].dim() == 0 and not args[2].is_cuda
    return not is_number


def _where() -> str:
    """Return the innermost place in the product's or Megatron's code."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        for part in ("nemo_kto/", "megatron/core/"):
            if part in name and "/tests/" not in name:
                return f"{name[name.rindex(part) :]} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
