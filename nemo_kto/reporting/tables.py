"""The numbers of a report as rows of text: facts, final values, differences, configuration."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from nemo_kto.config.reader import flatten, leaf_values
from nemo_kto.config.schema import KTOConfig
from nemo_kto.reporting.panels import (
    KNOWN,
    PANELS,
    PROGRESS,
    SPEED,
    TIME_TITLE,
    TRAIN,
    VALIDATION,
    all_metrics,
    logged_steps,
    split_tag,
)
from nemo_kto.reporting.reading import Run, Series

ABSENT = "–"
LAST = 10
"""Training values of so many logged steps are averaged: a single batch says little."""


@dataclass(frozen=True)
class Table:
    """A table: names of the columns, then rows of as many cells; the first cell of a row is its heading."""

    columns: list[str]
    rows: list[list[str]]


def number(value: float | None) -> str:
    """Return a number as people read it: four digits that matter, or whole with separators from 1,000 on."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3e}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return a time in its two largest units."""
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def find(run: Run, split: str, metric: str) -> Series | None:
    """Return a series of a run, or None; a tag without a split counts as training."""
    named = {split_tag(tag): series for tag, series in run.series.items()}
    return named.get((split, metric)) or (named.get(("", metric)) if split == TRAIN else None)


def facts(runs: list[Run]) -> Table:
    """Return what the runs were: how long, how fast, on what; one column a run."""
    rows = [
        ["Started", *(_started(run) for run in runs)],
        ["Layout", *(str(run.info.get("layout") or ABSENT) for run in runs)],
        ["Accelerator", *(str(run.info.get("accelerator") or ABSENT) for run in runs)],
        ["Steps", *(number(run.steps) for run in runs)],
        ["Samples seen", *(_last(run, "consumed_samples") for run in runs)],
        ["Epochs", *(_last(run, "epoch") for run in runs)],
        ["Time, pauses left out", *(duration(run.seconds) for run in runs)],
        ["Tokens/s, median", *(_median(run, "tokens_per_second") for run in runs)],
        ["Seconds per step, median", *(_median(run, "step_time") for run in runs)],
        [f"{TIME_TITLE}, median", *(_shares(run) for run in runs)],
        ["Model FLOPs utilisation, median", *(_median(run, "mfu") for run in runs)],
        ["Log folder", *(str(run.folder) for run in runs)],
    ]
    return Table(["", *(run.name for run in runs)], [row for row in rows if set(row[1:]) != {ABSENT}])


def final_numbers(runs: list[Run]) -> Table:
    """Return what the runs ended with: for one run a row per metric, for several a column per run."""
    in_facts = {metric for panel in PANELS if panel.section in (SPEED, PROGRESS) for metric in panel.metrics}
    metrics = [metric for metric in all_metrics(runs) if metric not in in_facts]
    if len(runs) == 1:
        columns = ["", "train, last step", f"train, mean of last {LAST}", "validation"]
        rows = [[KNOWN.get(metric, metric), *map(number, _ends(runs[0], metric))] for metric in metrics]
        return Table(columns, rows)
    rows = []
    for metric in metrics:
        _, means, validations = zip(*(_ends(run, metric) for run in runs), strict=True)
        title = KNOWN.get(metric, metric)
        rows += [[f"{title}: validation, last", *map(number, validations)]]
        rows += [[f"{title}: train, mean of last {LAST}", *map(number, means)]]
    return Table(["", *(run.name for run in runs)], [row for row in rows if set(row[1:]) != {ABSENT}])


def all_series(runs: list[Run]) -> Table:
    """Return one row for every series of every run."""
    rows = []
    for run in runs:
        for tag, series in run.series.items():
            finite = series.values[np.isfinite(series.values)]
            low, high = (finite.min(), finite.max()) if finite.size else (None, None)
            numbers = [number(value) for value in (series.values[0], low, high, series.values[-1])]
            rows.append([tag, *([run.name] if len(runs) > 1 else []), f"{series.steps.size:,}", *numbers])
    return Table(["series", *(["run"] if len(runs) > 1 else []), "points", "first", "lowest", "highest", "last"], rows)


def data_numbers(data: dict[str, Any]) -> Table:
    """Return the counts of samples of the splits that run.json describes."""
    splits = {split: counts for split, counts in data.items() if counts}
    names = ("samples", "desirable", "undesirable", "overlong", "truncated", "bad")
    rows = [[name, *(number(counts.get(name)) for counts in splits.values())] for name in names]
    return Table(["", *splits], rows)


def source_numbers(data: dict[str, Any]) -> Table:
    """Return one row for every source of every split that run.json describes."""
    rows = [
        [
            source["path"],
            split,
            *map(number, (source["samples"], source["desirable"], source["samples"] - source["desirable"])),
        ]
        for split, counts in data.items()
        for source in (counts or {}).get("sources", [])
    ]
    return Table(["source", "split", "samples", "desirable", "undesirable"], rows)


def configuration(run: Run) -> tuple[Table, Table]:
    """Return (the keys that are not at their default, the others) of a run; both empty without a run.json."""
    defaults = leaf_values(KTOConfig())
    values = _config(run)
    changed = [
        [key, _text(value), _text(defaults[key]) if key in defaults else ABSENT]
        for key, value in values.items()
        if key not in defaults or value != defaults[key]
    ]
    default = [[key, _text(value)] for key, value in values.items() if key in defaults and value == defaults[key]]
    return Table(["key", "value", "default"], changed), Table(["key", "value"], default)


def differences(runs: list[Run]) -> Table:
    """Return the configuration keys and versions in which some runs differ; runs without a run.json say nothing."""
    described = [(run.name, {**_config(run), **_versions(run)}) for run in runs if run.info]
    keys = sorted({key for _, values in described for key in values})
    rows = [[key, *(_text(values[key]) if key in values else ABSENT for _, values in described)] for key in keys]
    return Table(["key", *(name for name, _ in described)], [row for row in rows if len(set(row[1:])) > 1])


def versions(run: Run) -> Table:
    """Return the versions of the packages a run was made with."""
    rows = [[name, str(version)] for name, version in (run.info.get("versions") or {}).items()]
    return Table(["package", "version"], rows)


def _config(run: Run) -> dict[str, Any]:
    return flatten(run.info.get("config") or {}, leaf_values(KTOConfig()))


def _versions(run: Run) -> dict[str, Any]:
    return {f"version of {name}": version for name, version in (run.info.get("versions") or {}).items()}


def _text(value: Any) -> str:
    """A value as in the YAML."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _started(run: Run) -> str:
    try:
        started = datetime.fromisoformat(run.info["started"])
    except (KeyError, TypeError, ValueError):
        started = run.started
    return f"{started:%Y-%m-%d %H:%M} {started.tzname() or ''}".strip()


def _last(run: Run, metric: str) -> str:
    series = find(run, TRAIN, metric)
    return ABSENT if series is None else number(series.values[-1])


def _median(run: Run, metric: str) -> str:
    series = find(run, TRAIN, metric)
    return ABSENT if series is None else number(float(np.median(series.values)))


def _shares(run: Run) -> str:
    """Return what share of a step each part takes, the greatest first; those below half a percent are left out."""
    (parts,) = (panel.metrics for panel in PANELS if panel.title == TIME_TITLE)
    found = {label: find(run, TRAIN, metric) for metric, label in parts.items()}
    medians = {label: float(np.median(series.values)) for label, series in found.items() if series is not None}
    shares = {label: median / sum(medians.values()) for label, median in medians.items() if median > 0}
    greatest = sorted(((share, label) for label, share in shares.items() if share >= 0.005), reverse=True)
    return ", ".join(f"{label} {share:.0%}" for share, label in greatest) or ABSENT


def _ends(run: Run, metric: str) -> tuple[float | None, float | None, float | None]:
    """Return (value of the last training step, mean over the last training steps, value of the last validation).

    None where those have no value, as of a class that the batch lacks.
    """
    last, mean = (_mean_of_last(run, TRAIN, metric, count) for count in (1, LAST))
    return last, mean, _mean_of_last(run, VALIDATION, metric, 1)


def _mean_of_last(run: Run, split: str, metric: str, count: int) -> float | None:
    """Return the mean over the last `count` logged steps of a split, of those of them that have the metric."""
    series = find(run, split, metric)
    if series is None:
        return None
    # of what others log nobody knows at which steps they meant to
    steps = (logged_steps(run, split_tag(series.tag)[0]) if metric in KNOWN else series.steps)[-count:]
    values = series.values[np.isin(series.steps, steps)]
    return float(values.mean()) if values.size else None
