"""Which series share a picture, what they are called and in which unit they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nemo_kto.reporting.reading import Run, Series

SPLITS = {"train": "train", "val": "validation"}
"""First part of a tag -> what the report calls it."""

TRAIN, VALIDATION = SPLITS["train"], SPLITS["val"]

OTHER = "Other"
"""Section of the series that no panel knows."""


@dataclass(frozen=True)
class Panel:
    """What one picture shows.

    Attributes:
        section: Heading it belongs under.
        title: Its own heading.
        metrics: Metric (a tag without its split) -> what its lines are called.
        unit: Label of the vertical axis.
        note: What to know for reading it.
        log_if_wide: Whether the vertical axis is logarithmic where the values span decades.
        limits: Of the vertical axis; None: of the values.
        key: Heading of the legend.
        stacked: Whether the values of a step make up a whole: areas lie on each other.
    """

    section: str
    title: str
    metrics: dict[str, str]
    unit: str
    note: str = ""
    log_if_wide: bool = False
    limits: tuple[float, float] | None = None
    key: str = ""
    stacked: bool = False


@dataclass(frozen=True)
class Line:
    """A series in a picture.

    Attributes:
        series: Its values.
        label: What the legend calls it.
        look: Number that chooses colour, dashes and marker: of the run where there are several, else of the metric.
        validation: Whether it was measured on validation data, and so at few steps.
        missing: `[m]` int64, rising: logged steps between its first and last at which it has no value.
    """

    series: Series
    label: str
    look: int
    validation: bool
    missing: np.ndarray


def _by_class(name: str) -> dict[str, str]:
    return {f"{name}/chosen": "desirable", f"{name}/rejected": "undesirable"}


LEARNING, OPTIMIZER, SPEED, PROGRESS = "Learning", "Optimizer", "Speed", "Progress"
TIME_TITLE = "Where the time goes"

PANELS = (
    Panel(LEARNING, "Loss", {"loss": "loss"}, "loss"),
    Panel(LEARNING, "Loss by class", _by_class("loss"), "loss"),
    Panel(LEARNING, "KL", {"kl": "KL"}, "nats", "The estimate of how far the policy has moved from the reference."),
    Panel(
        LEARNING,
        "Rewards",
        _by_class("rewards"),
        "beta × nats",
        "Beta times the log-ratio to the reference; desirable should rise above undesirable.",
    ),
    Panel(LEARNING, "Reward margin", {"rewards/margins": "margin"}, "beta × nats", "Desirable minus undesirable."),
    Panel(
        LEARNING,
        "Reward accuracy",
        {"rewards/accuracies": "accuracy"},
        "share of samples",
        "Share of samples whose reward has the sign of their label.",
        limits=(-0.03, 1.03),
    ),
    Panel(LEARNING, "Log-probs of the responses", _by_class("logps"), "nats"),
    Panel(
        LEARNING, "Reward shift", {"delta": "delta"}, "beta × nats", "Mean reward of all samples of the steps before."
    ),
    Panel(
        LEARNING, "SFT term", {"sft_loss": "SFT term"}, "nats", "Likelihood of desirable responses, before its weight."
    ),
    Panel(
        LEARNING,
        "Unclamped tokens",
        {"unclamped": "unclamped"},
        "share of tokens",
        "Share of response tokens whose log-ratio is inside of humanline's clamp.",
        limits=(-0.03, 1.03),
    ),
    Panel(
        LEARNING, "Balance of the experts", {"moe_aux_loss": "moe_aux_loss"}, "loss", "1 where their loads are even."
    ),
    Panel(OPTIMIZER, "Loss scale", {"loss_scale": "loss scale"}, "factor", log_if_wide=True),
    Panel(OPTIMIZER, "Gradient norm", {"grad_norm": "gradient norm"}, "norm", log_if_wide=True),
    Panel(OPTIMIZER, "Learning rate", {"lr": "learning rate"}, "learning rate"),
    Panel(SPEED, "Throughput", {"tokens_per_second": "throughput"}, "tokens/s"),
    Panel(SPEED, "Time per step", {"step_time": "time per step"}, "seconds", log_if_wide=True),
    Panel(
        SPEED,
        TIME_TITLE,
        {
            "time/data": "waiting for data",
            "time/kl": "KL set",
            "time/reference": "reference",
            "time/gradients": "gradients",
            "time/gradient_sync": "exchange of gradients",
            "time/optimizer": "optimizer",
            "time/other": "other",
        },
        "seconds",
        "Of the first process, waiting for its batch included.",
        stacked=True,
    ),
    Panel(
        SPEED,
        "Model FLOPs utilisation",
        {"mfu": "utilisation"},
        "share of the peak",
        "Operations of the model, without recomputation, beside the most that the GPUs can do.",
    ),
    Panel(PROGRESS, "Samples seen", {"consumed_samples": "samples"}, "samples"),
    Panel(PROGRESS, "Epoch", {"epoch": "epoch"}, "epochs"),
)

KNOWN = {
    metric: panel.title if len(panel.metrics) == 1 else f"{panel.title}, {label}"
    for panel in PANELS
    for metric, label in panel.metrics.items()
}
"""Metric -> its full title."""


def split_tag(tag: str) -> tuple[str, str]:
    """Return (what the report calls the split, the metric) of a tag; the split is empty where the tag has none."""
    first, _, rest = tag.partition("/")
    return (SPLITS[first], rest) if first in SPLITS and rest else ("", tag)


def logged_steps(run: Run, split: str) -> np.ndarray:
    """Return the steps `[n]` int64, rising, at which a run logged what it always logs of a split."""
    parts = [(split_tag(tag), series.steps) for tag, series in run.series.items()]
    found = [steps for (part, metric), steps in parts if part == split and metric in KNOWN]
    return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *found]))


def all_metrics(runs: list[Run]) -> list[str]:
    """Return the metrics of some runs: the known ones in the order of the panels, then the others by name."""
    found = {split_tag(tag)[1] for run in runs for tag in run.series}
    return [metric for metric in KNOWN if metric in found] + sorted(found - KNOWN.keys())


def panels_of(runs: list[Run]) -> list[tuple[Panel, list[Line]]]:
    """Return the pictures to draw and the lines of each; together they hold every series of every run.

    Several runs are overlaid: each metric then has a picture of its own, in which a look stands for a run.
    """
    found = all_metrics(runs)
    panels = list(PANELS)
    if len(runs) > 1:
        panels = [
            replace(panel, title=KNOWN[metric], metrics={metric: panel.metrics[metric]}, stacked=False)
            for panel in panels
            for metric in panel.metrics
        ]
    panels += [
        Panel(OTHER, metric, {metric: metric}, metric, log_if_wide=True) for metric in found if metric not in KNOWN
    ]
    drawn = [(panel, _lines(panel, runs)) for panel in panels]
    return [(_with_key(panel, lines) if len(runs) > 1 else panel, lines) for panel, lines in drawn if lines]


def _with_key(panel: Panel, lines: list[Line]) -> Panel:
    """Say in the legend's heading what the legend of several runs does not: which lines are of validation."""
    kinds = {line.validation for line in lines}
    return replace(panel, key="lines: train · markers: validation" if len(kinds) == 2 else "")


def _missing(series: Series, logged: np.ndarray) -> np.ndarray:
    between = logged[(logged > series.steps[0]) & (logged < series.steps[-1])]
    return np.setdiff1d(between, series.steps)


def _lines(panel: Panel, runs: list[Run]) -> list[Line]:
    metrics = list(panel.metrics)
    lines = []
    for number, run in enumerate(runs):
        for tag, series in run.series.items():
            split, metric = split_tag(tag)
            if metric not in panel.metrics:
                continue
            if len(runs) > 1:
                parts = [run.name]
            else:
                parts = [
                    panel.metrics[metric] if len(metrics) > 1 or not split else "",
                    "" if panel.stacked else split,
                ]
            look = number if len(runs) > 1 else metrics.index(metric)
            # of what others log nobody knows at which steps they meant to
            missing = _missing(series, logged_steps(run, split)) if metric in KNOWN else series.steps[:0]
            lines.append(Line(series, ", ".join(filter(None, parts)), look, split == VALIDATION, missing))
    return sorted(lines, key=lambda line: (line.look, line.validation))
