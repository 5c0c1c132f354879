"""How tests wait: for a condition, never for a time. The clock is read here only, and only to end what hangs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

HANG = 900.0
"""Seconds; only catches hangs. So many that nothing else takes them, however busy the machine is."""


def wait_until(holds: Callable[[], Any], *, process: subprocess.Popen[str] | None = None, every: float = 0.02) -> None:
    """Return once `holds()` is true; fail if it is not when `process`, which makes it true, has ended or hangs.

    Args:
        holds: The condition.
        process: What makes it true; None for anything.
        every: Seconds between two looks at it, for what lasts for less than the default.
    """
    end = time.monotonic() + HANG
    while not holds():
        ended = process is not None and process.poll() is not None
        assert not ended or holds(), f"the process ended with exit code {process and process.returncode}"
        assert time.monotonic() < end, f"the process hangs: {HANG:.0f} s have passed"
        time.sleep(every)
