"""Lets a process believe that it has CUDA, on the device made of host memory in `device.cpp`.

`install` must run before torch is imported. `torch.cuda` then answers as on a machine with eight GPUs, and the backend
"nccl" exchanges their tensors by gloo. Where tensors are is as it would be: what mixes devices is refused, so is a CPU
tensor given to NCCL, and a tensor read from a file to another rank's GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from tests.cuda_sim.building import NAME, build

if TYPE_CHECKING:
    import torch

DEVICES = 8
MEMORY = 80 * 2**30

WAITED: list[Callable[[str], None]] = []
"""Called with the name of each function by which the host waits for a stream, an event or the device."""

_device: ModuleType


def install() -> None:
    """Do so, for this process and those that it forks."""
    global _device
    spec = importlib.util.spec_from_file_location(NAME, build())
    assert spec is not None and spec.loader is not None
    _device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(_device)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch
    import torch._dynamo  # which looks at what torch.cuda is when it is imported

    torch._dynamo.config.disable = True
    # while there is no GPU: its kernels for CUDA are another library, those of its own in torch run anywhere
    from nemo_kto.runtime.bits import bitsandbytes

    bitsandbytes()
    for name, value in {**_devices(), **_state(), **_memory()}.items():
        setattr(torch.cuda, name, value)
    for owner, name, value in _elsewhere():
        setattr(owner, name, value)
    torch.serialization.register_package(1, lambda storage: None, _restored)
    _install_nccl()
    from tests.cuda_sim import kept_for_backward

    kept_for_backward.install()


def _nothing(*arguments: Any, **keywords: Any) -> None:
    return None


def _waiting(name: str) -> Callable[..., None]:
    def wait(*arguments: Any, **keywords: Any) -> None:
        for called in WAITED:
            called(name)

    return wait


# devices


def _current() -> int:
    import torch

    return torch.accelerator.current_device_index()


def _make_current(device: torch.device | int | str | None) -> None:
    import torch

    index = device if isinstance(device, int) or device is None else torch.device(device).index
    if index is not None:
        torch.accelerator.set_device_index(index)


class _OnDevice(contextlib.ContextDecorator):
    def __init__(self, device: torch.device | int | str | None) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._before = _current()
        _make_current(self._device)

    def __exit__(self, *exception: Any) -> None:
        _make_current(self._before)


class Stream:
    """A stream on which everything has been done."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        import torch

        self.cuda_stream = 0
        self.device = torch.device("cuda", _current())

    wait_stream = wait_event = _nothing
    synchronize = _waiting("Stream.synchronize")

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event that has happened."""
        return event or Event()

    def query(self) -> bool:
        """Whether all is done."""
        return True

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: Any) -> None: ...


class Event:
    """An event that has happened."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None: ...

    record = wait = _nothing
    synchronize = _waiting("Event.synchronize")

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def elapsed_time(self, other: Event) -> float:
        """Return milliseconds."""
        return 1.0


def _devices() -> dict[str, Any]:
    properties = SimpleNamespace(
        name="simulated",
        major=9,
        minor=0,
        total_memory=MEMORY,
        multi_processor_count=132,
        warp_size=32,
        uuid="simulated",
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": _nothing,
        "_lazy_init": _nothing,
        "_lazy_call": lambda call, **keywords: call(),
        "device_count": lambda: DEVICES,
        "current_device": _current,
        "set_device": _make_current,
        "device": _OnDevice,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "get_device_name": lambda *_: properties.name,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": _waiting("torch.cuda.synchronize"),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": _nothing,
        "is_current_stream_capturing": lambda: False,
        "nvtx": SimpleNamespace(range_push=_nothing, range_pop=_nothing),
    }


class _Generator:
    """The CPU's, which is that of the device too."""

    def get_state(self) -> torch.Tensor:
        import torch

        return torch.get_rng_state()

    def set_state(self, state: torch.Tensor) -> _Generator:
        import torch

        torch.set_rng_state(state)
        return self


def _state() -> dict[str, Any]:
    import torch

    return {
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": _nothing,
        "seed": _nothing,
        "seed_all": _nothing,
        "default_generators": (_Generator(),) * DEVICES,
    }


def _memory() -> dict[str, Callable[..., Any]]:
    return {
        "memory_allocated": lambda *_: _device.live_bytes(),
        "memory_reserved": lambda *_: _device.live_bytes(),
        "max_memory_allocated": lambda *_: _device.peak_bytes(),
        "reset_peak_memory_stats": lambda *_: _device.reset_peak(),
        "memory_stats": lambda *_: {},
        "mem_get_info": lambda *_: (MEMORY - _device.live_bytes(), MEMORY),
        "empty_cache": _nothing,
        "ipc_collect": _nothing,
    }


def _elsewhere() -> list[tuple[Any, str, Any]]:
    """Return (owner, name, value) of what is patched outside `torch.cuda`."""
    import torch

    def storage_clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone().untyped_storage()

    def cuda(tensor: torch.Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> torch.Tensor:
        return tensor.to(torch.device("cuda", _current()) if device is None else device, non_blocking=non_blocking)

    return [
        (torch._C, "_cuda_getDevice", _current),
        (torch._C, "_cuda_setDevice", _make_current),
        (torch._C, "_cuda_getDeviceCount", lambda: DEVICES),
        (torch._C, "_cuda_getCurrentRawStream", lambda index: 0),
        (torch.cuda.nccl, "version", lambda: (2, 27, 3)),
        (torch.cuda.random, "get_rng_state", torch.cuda.get_rng_state),
        (torch.cuda.random, "set_rng_state", torch.cuda.set_rng_state),
        (torch.UntypedStorage, "clone", storage_clone),
        (torch.Tensor, "record_stream", _nothing),
        (torch.Tensor, "cuda", cuda),
    ]


def _restored(storage: Any, location: str) -> torch.UntypedStorage | None:
    """Return a storage read from a file, on the device it was on.

    Raises:
        RuntimeError: That is not this rank's: on a real GPU it would cost a context of some 500 MiB there.
    """
    import torch

    if not location.startswith("cuda"):
        return None
    if torch.device(location).index != _current():
        raise RuntimeError(f"a tensor of {location} was read by the rank of cuda:{_current()}")
    untyped = storage if isinstance(storage, torch.UntypedStorage) else storage.untyped()
    return torch.empty(0, dtype=torch.uint8).set_(untyped).to(location).untyped_storage()


# NCCL


def _install_nccl() -> None:
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from tests.cuda_sim.simulated_nccl import make_backend

    name = "simulated_nccl"
    dist.Backend.register_backend(name, make_backend(_device.host_view), devices=["cuda"])
    init, new_group, get_backend = dist.init_process_group, dist.new_group, dist.get_backend

    def init_process_group(backend: str | None = None, *arguments: Any, **keywords: Any) -> None:
        init(name if backend in ("nccl", None) else backend, *arguments, **keywords)

    def new(
        ranks: Any = None, timeout: Any = None, backend: str | None = None, *arguments: Any, **keywords: Any
    ) -> Any:
        return new_group(ranks, timeout, name if backend == "nccl" else backend, *arguments, **keywords)

    def backend_of(group: Any = None) -> str:
        found = get_backend(group)
        return "nccl" if found == name else found

    for module in (dist, distributed_c10d):
        module.init_process_group = init_process_group
        module.new_group = new
        module.get_backend = backend_of
