"""`trainer.profile_steps`: what is in the files, of which steps and ranks, and that no run ends because of them."""

from __future__ import annotations

import errno
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from torch.profiler import profile

from tests.distributed_harness import free_port, heard
from tests.integration.assets import read_series, refusal_on_rank, settings, train_on_rank

RESUMABLE = {"exp_manager__create_checkpoint_callback": True, "model__optim__sched__name": "Constant"}


def events_of(file: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return events


def ranges_of(file: Path) -> Counter[str]:
    """Return how often each part of a step is in a trace."""
    return Counter(event["name"] for event in events_of(file) if event.get("cat") == "user_annotation")


def names(log_dir: Path) -> list[str]:
    return sorted(file.name for file in (log_dir / "profile").iterdir())


def test_the_steps_that_are_named_are_traced(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    values = settings(root, tmp_path, trainer__kto__max_steps=4, trainer__profile_steps=[2, 3])
    run_ranks(train_on_rank, 1, free_port(), values)
    assert names(tmp_path) == ["steps_2-3_rank_0.json.gz"]
    file = tmp_path / "profile" / "steps_2-3_rank_0.json.gz"
    parts = ranges_of(file)
    expected = {"kl": 2, "reference": 2, "gradients": 2, "gradient_sync": 2, "optimizer": 2}
    assert {part: parts[part] for part in expected} == expected
    events = events_of(file)
    assert any(event.get("name") == "aten::mm" and event["args"].get("Input Dims") for event in events)
    assert any(event.get("name") == "[memory]" for event in events)
    # a part's operators are within its range
    (range_, *_) = (event for event in events if event.get("name") == "gradients" and event["ph"] == "X")
    inside = [
        event
        for event in events
        if event.get("name") == "aten::mm"
        and range_["ts"] <= event["ts"] <= event["ts"] + event["dur"] <= range_["ts"] + range_["dur"]
    ]
    assert inside


def test_a_rank_of_each_stage_writes_and_the_run_is_the_same(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    """Two stages of two tensor-parallel ranks each; the profile ends with the run, which is shorter."""
    layout = {"model__pipeline_model_parallel_size": 2, "model__tensor_model_parallel_size": 2}
    for name, steps in (("plain", None), ("traced", [2, 9])):
        values = settings(root, tmp_path / name, trainer__kto__max_steps=3, trainer__profile_steps=steps, **layout)
        run_ranks(train_on_rank, 4, free_port(), values)
    assert names(tmp_path / "traced") == ["steps_2-3_rank_0.json.gz", "steps_2-3_rank_2.json.gz"]
    assert ranges_of(tmp_path / "traced" / "profile" / "steps_2-3_rank_2.json.gz")["gradients"] == 2
    assert not (tmp_path / "plain" / "profile").exists()
    plain, traced = (read_series(tmp_path / name) for name in ("plain", "traced"))
    assert plain["train/loss"] == traced["train/loss"] and plain["train/grad_norm"] == traced["train/grad_norm"]


def warnings_of(port: int, overrides: dict[str, Any]) -> list[str]:
    found = heard(logger="nemo_kto.runtime.profiling")
    train_on_rank(port, overrides)
    return found


def test_a_resumed_run_traces_what_is_left_or_says_that_nothing_is(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    for steps, traced, left in ((2, None, None), (4, [1, 3], ["steps_3-3_rank_0.json.gz"])):
        values = settings(root, tmp_path, trainer__kto__max_steps=steps, trainer__profile_steps=traced, **RESUMABLE)
        assert run_ranks(warnings_of, 1, free_port(), values) == [[]]
        assert left is None or names(tmp_path) == left
    values = settings(root, tmp_path, trainer__kto__max_steps=5, trainer__profile_steps=[1, 3], **RESUMABLE)
    (found,) = run_ranks(warnings_of, 1, free_port(), values)
    assert found == ["trainer.profile_steps=[1, 3]: the run goes on after step 4, so nothing is profiled."]


def warnings_on_a_full_disk(port: int, overrides: dict[str, Any]) -> list[str]:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(profile, "export_chrome_trace", side_effect=full):
        return warnings_of(port, overrides)


def test_a_disk_that_is_full_costs_the_trace_only(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    values = settings(root, tmp_path, trainer__kto__max_steps=2, trainer__profile_steps=[1, 1])
    (found,) = run_ranks(warnings_on_a_full_disk, 1, free_port(), values)
    assert found == ["The profile cannot be written: no space is left on its file system."]
    assert set(read_series(tmp_path)["train/loss"]) == {0, 1}


def test_steps_that_the_run_has_not_are_refused(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    values = settings(root, tmp_path, trainer__kto__max_steps=2, trainer__profile_steps=[3, 4])
    (refused,) = run_ranks(refusal_on_rank, 1, free_port(), values)
    message = "trainer.profile_steps=[3, 4]: the run has no more than 2 steps. Name some of them."
    assert refused == ("ConfigError", message)
