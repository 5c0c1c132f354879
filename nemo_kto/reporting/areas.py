"""Series that make up a whole: areas on each other over the steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemo_kto.reporting.panels import Line, Panel
from nemo_kto.reporting.plots import COLORS, finite_values, framed, smooth, smoothing_window

HATCHES = ("", "////", "....", "\\\\\\\\", "", "xxxx", "----")
"""As many as there are colours: areas are told apart without them too."""

FAR = 3
"""The axis ends at twice the usual height where the highest is more than so many times that."""


def draw_areas(panel: Panel, lines: list[Line]) -> Figure:
    """Return the figure of a panel whose series are stacked, the first at the bottom, each with its tag as `gid`."""
    return framed(panel, lines, partial(_stack, lines))


def areas_caption(panel: Panel, lines: list[Line]) -> str:
    """Return how to read it."""
    heap = _heap(lines)
    sentences = [panel.note] if panel.note else []
    sentences.append("Areas lie on each other; together they are the whole.")
    if heap.window > 1:
        sentences.append(f"Mean of the {heap.window} logged steps around.")
    above = int((heap.heights.sum(axis=0) > heap.top).sum())
    if above:
        sentences.append(f"Cut off above: {above:,} of {heap.steps.size:,} steps.")
    return " ".join(sentences)


@dataclass(frozen=True)
class _Heap:
    """What is stacked.

    Attributes:
        steps: `[n]` at which any line has a finite value.
        heights: `[lines, n]`, zero where a line has none.
        window: Over how many values they are smoothed; 1: not at all.
        top: Upper end of the axis: a few steps that took far longer than the others are cut off.
    """

    steps: np.ndarray
    heights: np.ndarray
    window: int
    top: float


def _heap(lines: list[Line]) -> _Heap:
    found = [finite_values(line) for line in lines]
    steps = np.unique(np.concatenate([steps for steps, _ in found]))
    heights = np.zeros((len(lines), steps.size))
    for row, (places, values) in zip(heights, found, strict=True):
        row[np.searchsorted(steps, places)] = values
    window = smoothing_window(steps.size)
    if window > 1:
        heights = np.stack([smooth(row, window) for row in heights])
    totals = heights.sum(axis=0)
    usual = float(np.median(totals)) if totals.size else 0.0
    highest = float(totals.max(initial=0.0))
    return _Heap(steps, heights, window, 2 * usual if highest > FAR * usual > 0 else 1.05 * highest)


def _stack(lines: list[Line], axes: Axes) -> list[Artist]:
    """Draw the areas and return them."""
    heap = _heap(lines)
    looks = {
        "colors": [COLORS[line.look % len(COLORS)] for line in lines],
        "hatch": [HATCHES[line.look % len(HATCHES)] for line in lines],
    }
    areas: list[Any] = axes.stackplot(heap.steps, heap.heights, edgecolor="white", linewidth=0.3, **looks)
    for line, area in zip(lines, areas, strict=True):
        area.set_gid(line.series.tag)
        if heap.steps.size == 1:  # an area of one step has no width
            area.set_linewidth(6)
            area.set_edgecolor(COLORS[line.look % len(COLORS)])
    if heap.top > 0:
        axes.set_ylim(0, heap.top)
    return list(areas)
