"""Curves over the steps: one figure per panel, readable on a phone and without colours.

A look is a colour, a dash pattern and a marker at once. Noisy series are a light line with a darker, smoothed
one on top. Where a step has no value, as of a class that its batch lacks, a line is interrupted.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter, StrMethodFormatter
from PIL import Image

from nemo_kto.reporting.panels import Line, Panel

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
"""Told apart with every kind of colour vision (Okabe and Ito, Color Universal Design), darkest contrasts first."""

DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

WIDTH, HEIGHT = 5.0, 3.0
"""Inches. A picture is shown about that wide on a phone, where 9 points must still be readable."""

DPI = 150
PALETTE = 64  # colours in a file
FONT = "DejaVu Sans"  # comes with matplotlib
STYLE: dict[Any, Any] = {
    "font.family": FONT,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "hatch.linewidth": 0.6,
}

FEW = 12
"""Up to so many points each gets a marker."""

SMOOTHED_FROM = 50
"""Shorter series are drawn as they are."""

WIDE = 30
"""A logarithmic axis where the largest value is more than so many times the smallest."""

LONGEST_LABEL = 34
MARGIN = 0.02
"""Where the crosses of values that are not finite stand: above the lower edge, as a share of the height."""


@dataclass(frozen=True)
class Picture:
    """A picture and what belongs under it.

    Attributes:
        section: Heading on the page.
        title: Its own heading.
        file: Name of its PNG file.
        png: What that file holds.
        tags: The series in it.
        caption: How to read it.
    """

    section: str
    title: str
    file: str
    png: bytes
    tags: tuple[str, ...]
    caption: str


def new_figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Return an empty figure, `height` inches high, with one pair of axes; call it within `style()`."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.add_subplot()


def style() -> Any:
    """Return a context in which figures get this module's looks, whatever the user's matplotlibrc says."""
    return matplotlib.rc_context(STYLE)


def encode(figure: Figure) -> bytes:
    """Return a figure as PNG, with so few colours that it takes a third of the space."""
    canvas = FigureCanvasAgg(figure)
    with style():  # the labels of ticks are made while drawing
        canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(PALETTE, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def shorten(text: str, longest: int = LONGEST_LABEL) -> str:
    """Return `text` as a picture can show it: one line, its middle left out if it is long, no formulas."""
    text = " ".join(text.split())
    if len(text) > longest:
        text = f"{text[: (longest - 1) // 2]}…{text[-(longest // 2) :]}"
    drawable = _characters()
    # a dollar sign would begin a formula
    return "".join(letter if ord(letter) in drawable else "?" for letter in text).replace("$", r"\$")


@cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())


def draw_panel(panel: Panel, lines: list[Line]) -> Figure:
    """Return the figure of one panel: a line for every series, each with its tag as `gid`."""

    def draw(axes: Axes) -> list[Artist]:
        artists = [_draw(axes, line, alpha=0.25 if len(lines) < 5 else 0.13) for line in lines]
        _scale(axes, panel, lines)
        return artists

    return framed(panel, lines, draw)


def framed(panel: Panel, lines: list[Line], draw: Callable[[Axes], list[Artist]]) -> Figure:
    """Return a figure over the steps, with title and legend.

    Args:
        panel: What it shows.
        lines: Its series.
        draw: Draws them and returns what stands for each in the legend.
    """
    labels = list(dict.fromkeys(line.label for line in lines))
    columns = max(1, min(len(labels), 78 // (max(len(shorten(label)) for label in labels) + 8)))
    rows = -(-len(labels) // columns) if len(lines) > 1 else 0
    with style():
        figure, axes = new_figure(HEIGHT + 0.18 * (rows + bool(rows and panel.key)))
        axes.set_title(shorten(panel.title, 60))
        axes.set_xlabel("step")
        axes.set_ylabel(shorten(panel.unit))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        handles: dict[str, list[Artist]] = {label: [] for label in labels}
        for line, artist in zip(lines, draw(axes), strict=True):
            handles[line.label].append(artist)
        steps = {step for line in lines for step in (line.series.steps[0], line.series.steps[-1])}
        if len(steps) == 1:  # there is nothing around a single step
            axes.set_xticks(list(steps))
        if rows:
            figure.legend(
                [tuple(same) for same in handles.values()],  # drawn over each other
                [shorten(label) for label in labels],
                loc="outside lower center",
                ncols=columns,
                title=panel.key or None,
                title_fontsize=8,
            )
    return figure


def caption(panel: Panel, lines: list[Line]) -> str:
    """Return how to read the figure of a panel."""
    sentences = [panel.note] if panel.note else []
    windows = sorted({_window(line) for line in lines} - {1})
    if windows:
        sentences.append(
            f"Light: every logged step; dark: mean of the {' or '.join(map(str, windows))} logged steps around."
        )
    if _is_wide(panel, lines):
        sentences.append("Logarithmic scale.")
    if any(line.missing.size for line in lines):
        sentences.append("Gaps: steps without a value, as of a class that the batch lacks.")
    broken = sum(int((~np.isfinite(line.series.values)).sum()) for line in lines)
    if broken:
        sentences.append(f"Crosses at the lower edge: {broken:,} values that are not finite.")
    return " ".join(sentences)


def is_noisy(values: np.ndarray) -> bool:
    """Return whether `values` `[n]`, finite, turn around at more than a fifth of their points.

    Noise turns at two thirds of them, a learning rate with warm-up and decay once.
    """
    directions = np.sign(np.diff(values))
    return int((directions[1:] * directions[:-1] < 0).sum()) * 5 > values.size


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the `window` (odd) values around each; at both ends, of those that there are.

    Args:
        values: `[n]`, finite, n at least `window`.
        window: Number of values.
    """
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def finite_values(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps `[n]` at which a line has a finite value, and those values."""
    keep = np.isfinite(line.series.values)
    return line.series.steps[keep], line.series.values[keep]


def _interrupted(line: Line, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the steps `[k]` of a line with those without a value, values `[k]`, NaN there, and which stand alone.

    Args:
        line: The line.
        values: `[n]`, one for each of its finite values.
    """
    finite = np.isfinite(line.series.values)
    steps = np.concatenate([line.series.steps, line.missing])
    found = np.full(steps.size, np.nan)
    found[: finite.size][finite] = values
    order = np.argsort(steps, kind="stable")
    steps, found = steps[order], found[order]
    gap = np.isnan(np.concatenate([[np.nan], found, [np.nan]]))
    return steps, found, ~gap[1:-1] & gap[:-2] & gap[2:]


def _window(line: Line) -> int:
    """Over how many values a line is smoothed; 1: not at all."""
    _, values = finite_values(line)
    return smoothing_window(values.size) if is_noisy(values) else 1


def smoothing_window(number: int) -> int:
    """Over how many of so many values a noisy line is smoothed; 1: not at all."""
    return max(5, number // 25 // 2 * 2 + 1) if number >= SMOOTHED_FROM else 1


def _draw(axes: Axes, line: Line, *, alpha: float) -> Artist:
    """Draw one series, its light line with opacity `alpha`, and return what stands for it in the legend."""
    _, values = finite_values(line)
    color = COLORS[line.look % len(COLORS)]
    look: dict[str, Any] = {"color": color, "linestyle": DASHES[line.look % len(DASHES)], "linewidth": 1.5}
    if line.validation or values.size <= FEW:
        look |= {"marker": MARKERS[line.look % len(MARKERS)], "markersize": 5, "markevery": max(1, values.size // 20)}
    if line.validation:  # thinner, with white edges, so that it also stands out on a line of the same colour
        look |= {"linewidth": 0.8, "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.8, "zorder": 3}
    window = _window(line)
    if window > 1:
        steps, raw, _ = _interrupted(line, values)
        axes.plot(steps, raw, color=color, alpha=alpha, linewidth=0.7, zorder=1.5, gid=f"{line.series.tag} raw")
        values = smooth(values, window)
    steps, values, alone = _interrupted(line, values)
    if alone.any() and "marker" not in look:  # a line of one point has no length
        axes.plot(steps[alone], values[alone], ".", color=color, markersize=3, gid=f"{line.series.tag} alone")
    broken = line.series.steps[~np.isfinite(line.series.values)]
    if broken.size:
        at_edge = axes.get_xaxis_transform()  # steps across, share of the height upwards
        axes.plot(broken, np.full(broken.size, MARGIN), "x", color=color, transform=at_edge, markersize=5)
    return axes.plot(steps, values, gid=line.series.tag, **look)[0]


def _is_wide(panel: Panel, lines: list[Line]) -> bool:
    values = np.concatenate([finite_values(line)[1] for line in lines])
    return bool(panel.log_if_wide and values.size and values.min() > 0 and values.max() > WIDE * values.min())


def _scale(axes: Axes, panel: Panel, lines: list[Line]) -> None:
    if panel.limits:
        axes.set_ylim(panel.limits)
    if _is_wide(panel, lines):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    values = np.concatenate([finite_values(line)[1] for line in lines])
    if values.size and 1e4 <= np.abs(values).max() < 1e7:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    else:
        plain = ScalarFormatter(useOffset=False)
        plain.set_powerlimits((-3, 6))
        axes.yaxis.set_major_formatter(plain)
