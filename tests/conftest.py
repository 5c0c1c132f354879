"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.distributed_harness import DEFAULT_TIMEOUT, RankServer


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Callable[..., list[Any]]]:
    """Return `run_ranks(function, world_size, *arguments)`: a top-level function on gloo ranks, results by rank."""
    server = RankServer()

    def run(
        function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = DEFAULT_TIMEOUT
    ) -> list[Any]:
        results: list[Any] = server.run(function, world_size, arguments, timeout)
        return results

    yield run
    server.close()
