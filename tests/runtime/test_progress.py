"""What a run prints of how far it is, where the output is no terminal."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_kto.runtime.progress import ProgressBar, ProgressLines, progress


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Take the steps of a run, from one to another; return what is printed."""

    def run(last: int, *, log_every: int = 1, begin: int = 0, end: int | None = None) -> list[str]:
        shown = ProgressLines()
        monkeypatch.setattr(shown, "get_metrics", lambda *_: {"v_num": 0, "loss": 0.5, "kl": 1 / 3})
        trainer = SimpleNamespace(global_step=begin, max_steps=last, log_every_n_steps=log_every)
        shown.on_train_start(trainer)  # type: ignore[arg-type]
        for step in range(begin + 1, (last if end is None else end) + 1):
            trainer.global_step = step
            shown.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
        output = capsys.readouterr().out
        assert "\r" not in output
        return output.splitlines()

    return run


def steps(lines: list[str]) -> list[int]:
    return [int(line.split()[1]) for line in lines]


def test_a_short_run_has_a_line_for_each_step(lines: Any) -> None:
    found = lines(3)
    assert steps(found) == [1, 2, 3]
    assert found[0].startswith("Step 1 of 3, loss 0.5, kl 0.3333, ") and found[2].endswith("s each, 0:00:00 left")


def test_a_long_run_has_a_hundred(lines: Any) -> None:
    assert steps(lines(1000)) == [1, *range(10, 1001, 10)]
    assert steps(lines(1001)) == [1, *range(11, 1001, 11), 1001]


def test_steps_that_are_not_logged_have_none(lines: Any) -> None:
    assert steps(lines(20, log_every=8)) == [1, 8, 16, 20]
    assert steps(lines(1000, log_every=8)) == [1, *range(16, 1001, 16), 1000]


def test_a_resumed_run_begins_where_it_is(lines: Any) -> None:
    assert steps(lines(1000, begin=503, end=520)) == [504, 510, 520]


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress(), ProgressLines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert isinstance(progress(), ProgressBar)
