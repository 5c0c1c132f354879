"""Time limits of a run; the run itself: tests/integration."""

from __future__ import annotations

from datetime import timedelta

from nemo_kto.runs.trainer import _time_limit


def test_a_time_limit_in_days_hours_minutes_and_seconds() -> None:
    assert _time_limit("01:02:03:04") == timedelta(days=1, hours=2, minutes=3, seconds=4)
    assert _time_limit(None) is None
