"""Overrides and time limits of the training command; the command itself: tests/integration."""

from __future__ import annotations

from datetime import timedelta

import pytest

from nemo_kto.run import _forced
from nemo_kto.train import _time_limit


@pytest.mark.parametrize(
    ("argument", "forced"),
    [
        ("model.seed=1", "++model.seed=1"),
        ("+model.seed=1", "++model.seed=1"),
        ("++model.micro_batch_size=2", "++model.micro_batch_size=2"),
        ("~model.optim", "~model.optim"),
        ("hydra.job.name=x", "hydra.job.name=x"),
        ("--help", "--help"),
    ],
)
def test_overrides_are_forced_past_hydra(argument: str, forced: str) -> None:
    assert _forced(argument) == forced


def test_a_time_limit_in_days_hours_minutes_and_seconds() -> None:
    assert _time_limit("01:02:03:04") == timedelta(days=1, hours=2, minutes=3, seconds=4)
    assert _time_limit(None) is None
