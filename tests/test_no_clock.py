"""No test reads the clock: on a busy machine whatever is timed, or waited for by time, fails without a fault."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).resolve().parent

DEADLINE = r"\bdeadline\s*="
CLOCK = r"\b(monotonic|perf_counter|process_time|thread_time|time\.time)(_ns)?\("
SLEEP = r"\bsleep\("
FORBIDDEN = {
    DEADLINE: "the profile in conftest.py has no deadlines",
    CLOCK: "assert what the time stands for",
    SLEEP: "wait for a condition, with wait_until of tests/waiting.py",
    r"\btimeout\s*(:\s*float\s*)?=\s*[\d.]": "tests/waiting.py has the one time-out, HANG",
    r"\.(wait|poll|join|communicate|acquire|get)\(\s*\d[\d.]*\s*\)": "tests/waiting.py has the one time-out, HANG",
    r"\btimedelta\(\s*(seconds|minutes)\s*=\s*[\d.]": "tests/waiting.py has the one time-out, HANG",
}
"""Regular expression -> what to do instead."""

ALLOWED = {
    "conftest.py": {DEADLINE},
    "waiting.py": {CLOCK, SLEEP},
    "integration/killed_run.py": {CLOCK},  # chooses the moment of a kill by it; the run has to survive any
    "test_no_clock.py": set(FORBIDDEN),
}
"""File -> the expressions that it may match."""


def found_in(source: str, allowed: set[str] = frozenset()) -> list[str]:
    """Return the lines of `source` that depend on how fast it runs, each with what to do instead."""
    return [
        f"line {number}: {line.strip()}: {instead}"
        for number, line in enumerate(source.splitlines(), start=1)
        for pattern, instead in FORBIDDEN.items()
        if pattern not in allowed and re.search(pattern, line)
    ]


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: str(file.relative_to(TESTS)))
def test_no_test_depends_on_speed(file):
    allowed = ALLOWED.get(file.relative_to(TESTS).as_posix(), set())
    assert not found_in(file.read_text(encoding="utf-8"), allowed)


@pytest.mark.parametrize("name", ALLOWED)
def test_every_exception_is_needed(name):
    source = (TESTS / name).read_text(encoding="utf-8")
    assert all(re.search(pattern, source) for pattern in ALLOWED[name])


def test_examples_have_no_deadline():
    assert settings.default.deadline is None


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("@settings(max_examples=60, deadline=None)", True),
        ("@settings(max_examples=60)", False),
        ("done = subprocess.run(command, timeout=240)", True),
        ("done = subprocess.run(command, timeout=HANG)", False),
        ("def finish(process, timeout: float = 240):", True),
        ("output, _ = process.communicate(timeout = 1.5)", True),
        ("process.join(10)", True),
        ("process.wait(HANG)", False),
        ("' '.join(words)", False),
        ("dist.init_process_group('gloo', timeout=timedelta(seconds=180))", True),
        ("assert code != 0 and time.monotonic() - started < 90", True),
        ("seconds.append(time.perf_counter() - started)", True),
        ("time.sleep(5)  # until they have imported what they need", True),
        ("monkeypatch.setattr(time, 'time', lambda: 1120.0)", False),
    ],
)
def test_the_check_itself(line, caught):
    assert bool(found_in(line)) == caught
