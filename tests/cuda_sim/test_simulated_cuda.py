"""The simulated device itself: it refuses what CUDA refuses, and shows what would be read before it is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist


def look(rank_values: list[float]) -> dict[str, Any]:
    """Return what the device is like, on each rank."""
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    here = torch.tensor(rank_values[rank], device="cuda")
    total = here.clone()
    dist.all_reduce(total)
    fresh = torch.empty(100, device="cuda")
    pinned = torch.arange(3.0, pin_memory=True)
    return {
        "device": str(here.device),
        "sum": total.item(),
        "backend": dist.get_backend(),
        "fresh": bool(fresh.isnan().all()),
        "pinned": (pinned.is_pinned(), torch.arange(3).is_pinned()),
        "moved": (pinned.to("cuda", non_blocking=True) * here).cpu().tolist(),
        "view": str(fresh.view(10, 10)[2:].T.device),
    }


def test_each_rank_has_a_device_of_its_own(gpu_ranks: Callable[..., list[Any]]) -> None:
    values = [2.0, 5.0]
    for rank, found in enumerate(gpu_ranks(look, 2, values)):
        assert found == {
            "device": f"cuda:{rank}",
            "sum": 7.0,
            "backend": "nccl",
            "fresh": True,
            "pinned": (True, False),
            "moved": [0.0, values[rank], 2 * values[rank]],
            "view": f"cuda:{rank}",
        }


def refused(name: str) -> str:
    """Return the error of something that a CUDA device refuses."""
    here, there = torch.ones(3, device="cuda"), torch.ones(3)
    attempts: dict[str, Callable[[], Any]] = {
        "mixed": lambda: here + there,
        "joined": lambda: torch.cat([here, there]),
        "index of the device": lambda: there[here.long()],
        "nccl": lambda: dist.all_reduce(there),
        "numpy": lambda: here.numpy(),
        "pinned": lambda: torch.empty(3, device="cuda", pin_memory=True),
        "another rank's": lambda: torch.load(_written(here, "cuda:1"), weights_only=True),
    }
    try:
        attempts[name]()
    except (RuntimeError, TypeError) as error:
        return str(error)
    return "nothing was refused"


def _written(tensor: torch.Tensor, device: str) -> Any:
    import io

    file = io.BytesIO()
    torch.save(tensor.to(device), file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixed", "Expected all tensors to be on the same device"),
        ("joined", "Expected all tensors to be on the same device"),
        ("index of the device", "indices should be either on cpu or on the same device"),
        ("nccl", "No backend type associated with device type cpu"),
        ("numpy", "can't convert cuda:0 device type tensor to numpy"),
        ("pinned", "Only dense CPU tensors can be pinned"),
        ("another rank's", "a tensor of cuda:1 was read by the rank of cuda:0"),
    ],
)
def test_what_mixes_devices_is_refused(gpu_ranks: Callable[..., list[Any]], name: str, message: str) -> None:
    (error,) = gpu_ranks(refused, 1, name)
    assert message in error


def test_this_process_has_no_such_device() -> None:
    """It is for the ranks' processes: whatever runs in this one next must not meet it."""
    assert os.environ.get("TORCHDYNAMO_DISABLE") is None
    assert not torch.cuda.is_available()
