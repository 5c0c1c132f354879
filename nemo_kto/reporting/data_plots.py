"""Pictures of the data: lengths by class and samples by source, from what training wrote into run.json."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nemo_kto.reporting.plots import COLORS, new_figure, shorten, style

CLASSES = ("desirable", "undesirable")
LONGEST_NAME = 26
MOST_SOURCES = 15
"""So many sources get a bar of their own, the largest; the others share one."""


def draw_lengths(title: str, histogram: dict[str, list[float]]) -> Figure:
    """Return a histogram of both classes.

    Args:
        title: Its heading.
        histogram: `edges` (k + 1 numbers of tokens, rising), `desirable` and `undesirable` (k counts each).
    """
    edges = np.asarray(histogram["edges"], dtype=np.float64)
    with style():
        figure, axes = new_figure()
        first, second = (np.asarray(histogram[name], dtype=np.float64) for name in CLASSES)
        axes.stairs(first, edges, fill=True, color=COLORS[0], alpha=0.45, label=CLASSES[0])
        axes.stairs(second, edges, color=COLORS[1], hatch="////", linewidth=1.4, label=CLASSES[1])
        axes.set(title=shorten(title, 60), xlabel="tokens", ylabel="samples")
        axes.set_ylim(bottom=0)
        if edges[0] > 0 and edges[-1] > 50 * edges[0]:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_sources(title: str, sources: list[dict[str, Any]]) -> Figure:
    """Return a bar for every source, divided by class.

    Args:
        title: Its heading.
        sources: `path`, `samples` and `desirable` (numbers of samples) of each; at least one.
    """
    bars = _bars(sources)
    with style():
        figure, axes = new_figure(1.2 + 0.25 * max(len(bars), 2))
        positions = np.arange(len(bars))
        names, desirable, undesirable = zip(*bars, strict=True)
        axes.barh(positions, desirable, color=COLORS[0], label=CLASSES[0])
        axes.barh(
            positions, undesirable, left=desirable, color="white", edgecolor=COLORS[1], hatch="////", label=CLASSES[1]
        )
        for position, good, bad in zip(positions, desirable, undesirable, strict=True):
            axes.annotate(
                f"{good:,} + {bad:,}",
                (good + bad, position),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_yticks(positions, [_tail(name) for name in names])
        axes.set_ylim(max(len(bars), 2) - 0.4, -0.6)
        axes.margins(x=0.4)
        axes.set_xlim(left=0)
        axes.grid(False, axis="y")
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("samples")
        figure.suptitle(shorten(title, 60), x=0.02, ha="left", fontsize=10, fontweight="bold")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _tail(name: str) -> str:
    """The end of a path: its beginning is what sources have in common."""
    return shorten(name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}")


def _bars(sources: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Return (name, desirable samples, undesirable samples) of every bar, the largest first."""
    largest = sorted(sources, key=lambda source: -source["samples"])
    bars = [(s["path"], s["desirable"], s["samples"] - s["desirable"]) for s in largest]
    if len(bars) > MOST_SOURCES:
        rest = bars[MOST_SOURCES - 1 :]
        total = (f"{len(rest)} more sources", sum(bar[1] for bar in rest), sum(bar[2] for bar in rest))
        bars = [*bars[: MOST_SOURCES - 1], total]
    return bars
