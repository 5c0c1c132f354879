"""What all tests share: ranks to run on, and that no test fails because the machine is busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.distributed_harness import RankServer

# how long an example takes says more about what else the machine does than about the code
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Callable[..., list[Any]]]:
    """Return `run_ranks(function, world_size, *arguments)`: a top-level function on gloo ranks, results by rank."""
    server = RankServer()

    def run(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        return server.run(function, world_size, arguments)

    yield run
    server.close()
