"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.distributed_harness import DEFAULT_TIMEOUT, RankFailure, RankPool


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Callable[..., list[Any]]]:
    """Return `run_ranks(function, world_size, *arguments)`: a top-level function on gloo ranks, results by rank."""
    pools: dict[int, RankPool] = {}

    def run(
        function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = DEFAULT_TIMEOUT
    ) -> list[Any]:
        pool = pools.pop(world_size, None) or RankPool(world_size)
        results = pool.run(function, arguments, timeout)
        pools[world_size] = pool  # a failed pool has been ended and is not kept
        return results

    yield run
    for pool in pools.values():
        pool.close()


__all__ = ["RankFailure", "run_ranks"]
