"""NCCL's part played by gloo, on the host's view of the simulated device's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

HostView = Callable[[torch.Tensor], torch.Tensor]
"""Tensor of the device -> the host's tensor over the same memory."""

_TENSORS = {
    "allreduce": 1,
    "allreduce_coalesced": 1,
    "broadcast": 1,
    "reduce": 1,
    "send": 1,
    "recv": 1,
    "_allgather_base": 2,
    "_reduce_scatter_base": 2,
    "alltoall_base": 2,
    "alltoall": 2,
    "gather": 2,
    "scatter": 2,
}
"""Name -> how many of its first arguments are tensors, or lists of them."""

_NEW_NAMES = {
    "all_gather_single": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "all_to_all_single": "alltoall_base",
}
"""What torch 2.13 asks for -> what it was before."""

_COALESCED = {
    "allgather_into_tensor_coalesced": "_allgather_base",
    "all_gather_single_coalesced": "_allgather_base",
    "reduce_scatter_tensor_coalesced": "_reduce_scatter_base",
    "reduce_scatter_single_coalesced": "_reduce_scatter_base",
}


class _Done(dist.Work):
    def __init__(self) -> None:
        super().__init__()

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def make_backend(host_view: HostView) -> Callable[..., dist.ProcessGroup]:
    """Return what makes a group of the backend."""

    def make(store: dist.Store, rank: int, size: int, timeout: Any) -> dist.ProcessGroup:
        return SimulatedNccl(store, rank, size, timeout, host_view)

    return make


class SimulatedNccl(dist.ProcessGroup):
    """A process group for tensors of the device only."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: Any, host_view: HostView) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._place = (rank, size)
        self._host_view = host_view

    def getBackendName(self) -> str:
        """Return the name that callers tell groups apart by."""
        return "nccl"

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cuda")]

    def rank(self) -> int:
        """Return the rank in the group."""
        return self._place[0]

    def size(self) -> int:
        """Return the group's size."""
        return self._place[1]

    def barrier(self, *_: Any, **__: Any) -> dist.Work:
        """Wait for the others."""
        return self._gloo.barrier(dist.BarrierOptions())

    def allgather(self, outputs: Any, inputs: Any, *_: Any) -> dist.Work:
        """Gather; parts may differ in length, as NCCL then broadcasts each."""
        for parts, mine in zip(self._host(outputs), self._host(inputs), strict=True):
            parts[self.rank()].copy_(mine)
            for rank, part in enumerate(parts):
                self._gloo.broadcast([part], _broadcast_options(rank)).wait()
        return _Done()

    def reduce_scatter(self, outputs: Any, inputs: Any, options: Any = None) -> dist.Work:
        """Reduce and scatter; parts may differ in length."""
        for mine, parts in zip(self._host(outputs), self._host(inputs), strict=True):
            for rank, part in enumerate(parts):
                total = part.clone()
                reduction = dist.AllreduceOptions()
                reduction.reduceOp = dist.ReduceOp.SUM if options is None else options.reduceOp
                self._gloo.allreduce([total], reduction).wait()
                if rank == self.rank():
                    mine.copy_(total)
        return _Done()

    def _host(self, tensors: Any) -> Any:
        """Return the host's views; what NCCL refuses is refused."""
        if isinstance(tensors, list | tuple):
            return [self._host(tensor) for tensor in tensors]
        if not tensors.is_cuda:
            raise RuntimeError("No backend type associated with device type cpu")
        if not tensors.is_contiguous():
            raise RuntimeError("NCCL: tensors must be contiguous")
        return self._host_view(tensors)

    def _call(self, name: str, count: int, arguments: Sequence[Any]) -> Any:
        hosted = [self._host(argument) for argument in arguments[:count]]
        return getattr(self._gloo, name)(*hosted, *arguments[count:])


def _broadcast_options(root: int) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = root, 0
    return options


def _calls() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield (name, method) of what is passed on to gloo."""

    def passed_on(name: str) -> Callable[..., Any]:
        def call(self: SimulatedNccl, *arguments: Any, **keywords: Any) -> Any:
            return self._call(name, _TENSORS[name], [*arguments, *keywords.values()])

        return call

    def one_by_one(name: str) -> Callable[..., Any]:
        def call(self: SimulatedNccl, outputs: Any, inputs: Any, *options: Any, **keywords: Any) -> Any:
            for pair in zip(outputs, inputs, strict=True):
                self._call(name, 2, [*pair, *options, *keywords.values()]).wait()
            return _Done()

        return call

    for name in _TENSORS:
        yield name, passed_on(name)
    for name, old in _NEW_NAMES.items():
        yield name, passed_on(old)
    for name, old in _COALESCED.items():
        yield name, one_by_one(old)


for _name, _method in _calls():
    setattr(SimulatedNccl, _name, _method)
