"""How much memory a rank of any layout takes, found out without that memory, a GPU or the other ranks.

Inside of `alone` new tensors have shapes and dtypes but no contents (torch's FakeTensorMode, on the device "cpu"), and
what would come from other ranks is taken as received (torch's "fake" process group). The code that runs is the one
that trains, Megatron's included; what is counted is the storage of each tensor, from when it is made until the last
reference to it is gone, as CUDA's allocator would give it out.

Whole numbers, as the tokens and boundaries of a row, keep their contents until they meet a tensor that has none, or
become many; so do tensors made before. What depends on other contents cannot be found out: a number that is asked for
is 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_kto.errors import ConfigError
from nemo_kto.runtime import cpu_megatron, parallel
from nemo_kto.runtime.layout import Layout

_BLOCK = 512
"""Bytes that CUDA's allocator rounds up to."""

_FEW = 2**20
"""Numbers that are computed with."""

_COLLECTIVES = ("c10d::", "_c10d_functional::")


class DryRun(TorchDispatchMode):
    """Makes tensors without contents, and counts the bytes that they would take on the device.

    Attributes:
        held: Bytes of the tensors that are there.
        peaks: Phase -> most of them at once, since `forget_peaks`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)  # tensors with contents may take part
        self._counted: set[int] = set()
        self._phase = "between"
        self._on_device = True
        self.held = 0
        self.peaks: dict[str, int] = {}

    def forget_peaks(self) -> None:
        """Begin anew with what is held now."""
        self.peaks = {self._phase: self.held}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is held in the block, and what it makes, as this phase's."""
        before, self._phase = self._phase, name
        self._note()
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Count nothing that the block makes: it is in the host's memory."""
        before, self._on_device = self._on_device, False
        try:
            yield
        finally:
            self._on_device = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for kind in {type(tensor) for tensor in tensors}:
            if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not issubclass(kind, FakeTensor):
                with self:  # it is made of tensors, and says what is done with them
                    return kind.__torch_dispatch__(func, types, args, kwargs)
        if func.name().startswith(_COLLECTIVES):
            return _as_if_received(func, args)
        without = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if without and func is torch.ops.aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if tensors and not without and not _make_many(tensors):
            result = func(*args, **kwargs)
        else:
            with self._fake:
                result = func(*args, **kwargs)
            if not tensors and _is_of_numbers(func, result):
                result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._counted:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK if self._on_device else 0
        self._counted.add(key)
        self.held += size
        self._note()
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.held -= size

    def _note(self) -> None:
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.held)


def _is_of_numbers(func: Any, made: Any) -> bool:
    """Return whether what a function has made of nothing is whole numbers, and few."""
    if not isinstance(made, torch.Tensor) or made.is_floating_point() or func.name().startswith("aten::empty"):
        return False
    return made.numel() <= _FEW


def _make_many(tensors: list[torch.Tensor]) -> bool:
    """Return whether an operator that goes through the tensors element by element makes many."""
    try:
        return torch.broadcast_shapes(*(tensor.shape for tensor in tensors)).numel() > _FEW
    except RuntimeError:  # it is no such operator
        return False


def _as_if_received(func: Any, args: tuple[Any, ...]) -> Any:
    """Return what an exchange returns that has been done."""
    from torch._C._distributed_c10d import FakeWork

    work = FakeWork().boxed()
    return work if len(func._schema.returns) == 1 else (args[0], work)


def _everyone_says_the_same(everyone: list[Any], mine: Any, group: Any = None) -> None:
    everyone[:] = [mine] * len(everyone)


def _stay(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Leave a module on the only device there is: torch would swap its parameters, which must not be referred to."""
    return module


@contextmanager
def alone(layout: Layout, rank: int) -> Iterator[DryRun]:
    """Be one rank of a layout whose others are not there, on no device.

    It takes a process of its own: Megatron is patched for CPUs (`cpu_megatron.py`), and stays so.

    Args:
        layout: The layout.
        rank: Which of its ranks.

    Raises:
        ConfigError: This process sees a CUDA device, or is a rank of something else.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError("A dry run needs a process of its own; this one belongs to a run.")
    cpu_megatron.enable_cpu()
    new_group: Callable[..., Any] = dist.distributed_c10d.new_group

    def group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        return new_group(ranks, timeout, "fake", *args, **kwargs)

    with ExitStack() as stack:
        for module in (dist, dist.distributed_c10d):
            stack.enter_context(replaced(module, "new_group", group))
            stack.enter_context(replaced(module, "all_gather_object", _everyone_says_the_same))
        stack.enter_context(replaced(torch.nn.Module, "to", _stay))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        stack.callback(parallel.destroy)
        parallel.initialize(layout, seed=0)
        yield stack.enter_context(DryRun())


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let an attribute have another value in the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
