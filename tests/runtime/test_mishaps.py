"""Errors of PyTorch that become a sentence, and those that stay what they are."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from nemo_kto.errors import ConfigError, DataError, KTOError
from nemo_kto.runtime.mishaps import understood


class Deadly(Dataset[int]):
    """Its second item kills the process that loads it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> int:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def raised(action: Any) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        action()
    return caught.value


def test_a_lost_process_that_loads_batches() -> None:
    error = understood(raised(lambda: list(DataLoader(Deadly(), num_workers=1, multiprocessing_context="fork"))))
    assert isinstance(error, KTOError) and "is killed by signal: Killed" in str(error)
    assert "model.data.num_workers" in str(error)


def test_want_of_memory() -> None:
    error = understood(raised(lambda: torch.empty(10**15)))
    assert isinstance(error, ConfigError) and "can't allocate memory: you tried to allocate" in str(error)
    assert "enforce fail" not in str(error) and "model.micro_batch_size" in str(error)
    of_cuda = understood(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nmore"))
    assert isinstance(of_cuda, ConfigError) and "not enough memory: CUDA out of memory. Tried" in str(of_cuda)
    assert isinstance(understood(MemoryError()), ConfigError)


@pytest.mark.parametrize("error", [DataError("a.jsonl:7"), RuntimeError("shapes differ"), ZeroDivisionError()])
def test_all_else_stays_as_it_is(error: BaseException) -> None:
    assert understood(error) is error
