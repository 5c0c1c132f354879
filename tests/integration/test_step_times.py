"""What a run logs of where its steps' time goes: the parts add up to the whole, by a clock that counts its looks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.distributed_harness import free_port
from tests.integration.assets import read_series, settings, train_on_rank

STEPS = 3


def run_that_counts(port: int, overrides: dict[str, Any]) -> None:
    """Train with a clock that is a second further whenever somebody looks."""
    from nemo_kto.kto import megatron_gpt_kto_model
    from nemo_kto.runtime import step_clock

    clock = SimpleNamespace(perf_counter=map(float, itertools.count()).__next__)
    with mock.patch.object(step_clock, "time", clock), mock.patch.object(megatron_gpt_kto_model, "time", clock):
        train_on_rank(port, overrides)


@pytest.mark.parametrize(
    ("ranks", "changes", "parts"),
    [
        pytest.param(1, {}, {"kl", "reference"}, id="live reference"),
        pytest.param(
            2,
            {"model__pipeline_model_parallel_size": 2, "model__kto__loss": "apo_zero_unpaired"},
            {"reference"},
            id="without a KL set, in two stages",
        ),
    ],
)
def test_the_parts_of_each_step_add_up_to_its_time(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], ranks: int, changes: dict[str, Any], parts: set[str]
) -> None:
    values = settings(
        root,
        tmp_path,
        trainer__kto__max_steps=STEPS,
        trainer__kto__val_check_interval=2,  # which is scored by the same code and is no part of a step
        model__data__data_prefix__validation=str(root / "validation.jsonl"),
        **changes,
    )
    run_ranks(run_that_counts, ranks, free_port(), values)
    series = read_series(tmp_path)
    times = {name.rpartition("/")[2]: found for name, found in series.items() if name.startswith("train/time/")}
    assert set(times) == parts | {"data", "gradients", "gradient_sync", "optimizer", "other"}
    for step in range(STEPS):
        assert all(found[step] >= 1 for found in times.values())
        whole = sum(found[step] for part, found in times.items() if part != "data")
        assert series["train/step_time"][step] == whole


def test_only_logged_steps_have_times(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    values = settings(root, tmp_path, trainer__kto__max_steps=5, trainer__log_every_n_steps=2)
    run_ranks(train_on_rank, 1, free_port(), values)
    series = read_series(tmp_path)
    assert set(series["train/time/data"]) == set(series["train/step_time"]) == {1, 3}
