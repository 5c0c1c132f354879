"""Draws docs/pictures/: `python docs/tools/draw_pictures.py [FOLDER]`.

The curves are the package's own loss functions and their gradients, so that a picture cannot say anything else than
what is trained. tests/docs_samples/test_pictures.py draws them again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from nemo_kto.algorithms.losses import LOSSES, LossFunction, kto_loss

DOCS = Path(__file__).resolve().parents[1]
UP, DOWN, QUIET = "#1b7f4b", "#b3362c", "#5f6b76"
LOG_RATIOS = torch.linspace(-40.0, 40.0, 161)
BETA = 0.2

matplotlib.use("svg")
plt.rcParams.update(
    {
        "svg.hashsalt": "nemo_kto",  # the same names inside of the file each time
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
)


def loss_curve(
    loss: LossFunction, *, desirable: bool, baseline: float = 0.0, beta: float = BETA
) -> tuple[Tensor, Tensor]:
    """Return the loss at each of LOG_RATIOS and its slope there, `[161]` float32 each.

    The slope's size says how strongly a sample pulls: the gradient with respect to the model is this times that of
    the response's log-prob.
    """
    log_ratios = LOG_RATIOS.clone().requires_grad_()
    labels = torch.full(log_ratios.shape, desirable)
    losses = loss(log_ratios, labels, torch.tensor(baseline), beta=beta).losses
    (slope,) = torch.autograd.grad(losses.sum(), log_ratios)
    return losses.detach(), slope


def draw_kto_loss() -> Any:
    """What a sample costs, and how strongly it pulls (up or down alike), with the baseline at 0 and at 10."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 3.0))
    for baseline, style in ((0.0, "-"), (10.0, "--")):
        for desirable, colour in ((True, UP), (False, DOWN)):
            losses, slope = loss_curve(kto_loss, desirable=desirable, baseline=baseline)
            left.plot(LOG_RATIOS, losses, style, color=colour)
        right.plot(LOG_RATIOS, slope.abs(), style, color=QUIET, label=f"z = {baseline:.0f}")
    left.text(-38.0, 0.9, "thumbs up", color=UP)
    left.text(-38.0, 0.06, "thumbs down", color=DOWN)
    left.set(xlabel="log-ratio r", ylabel="loss of the sample", title="What a sample costs")
    right.set(xlabel="log-ratio r", ylabel="size of the slope", title="How strongly it pulls")
    right.legend(loc="upper left")
    return figure


def draw_beta() -> Any:
    """The pull of a thumbs-up sample for several beta."""
    figure, axes = plt.subplots(figsize=(5.2, 3.0))
    for beta, style in ((0.05, ":"), (0.1, "-."), (0.2, "-"), (0.5, "--")):
        _, slope = loss_curve(kto_loss, desirable=True, beta=beta)
        axes.plot(LOG_RATIOS, slope.abs(), style, color=UP, label=f"beta = {beta}")
    axes.set(xlabel="log-ratio r, with z = 0", ylabel="size of the slope", title="Beta: how far a sample pulls")
    axes.legend()
    return figure


def draw_losses() -> Any:
    """The pull under each loss, with the baseline at 10."""
    figure, panels = plt.subplots(1, 2, figsize=(8.0, 3.0), sharey=True)
    for axes, desirable, colour, label in zip(
        panels, (True, False), (UP, DOWN), ("Thumbs up", "Thumbs down"), strict=True
    ):
        for (name, loss), style in zip(LOSSES.items(), ("-", "--", ":"), strict=True):
            _, slope = loss_curve(loss.function, desirable=desirable, baseline=10.0)
            axes.plot(LOG_RATIOS, slope.abs(), style, color=colour, label=name)
        axes.set(xlabel="log-ratio r, with a baseline of 10", title=label)
        axes.legend()
    panels[0].set_ylabel("size of the slope")
    return figure


# left edge, bottom, width, text; and the pairs of boxes that arrows connect
BOXES = {
    "batch": (0.0, 3.0, 2.5, "global batch\nG prompts with their responses"),
    "samples": (3.1, 3.5, 2.7, "samples\npacked rows, no padding"),
    "kl": (3.1, 2.5, 2.7, "KL set: each prompt with\nanother sample's response"),
    "reference": (6.4, 3.0, 2.7, "reference\nforward over both,\nor looked up"),
    "policy": (6.4, 1.8, 2.7, "policy\nforward over the KL set"),
    "baseline": (9.7, 2.4, 2.5, "z = max(0, mean log-ratio)\none sum over all ranks"),
    "train": (9.7, 3.6, 2.5, "policy, with gradients\n1F1B over the samples"),
    "loss": (12.8, 3.6, 2.2, "loss, by label\neach sample 1/G"),
    "step": (12.8, 2.4, 2.2, "clip, Adam,\nmetrics"),
}
ARROWS = (
    ("batch", "samples"),
    ("batch", "kl"),
    ("samples", "reference"),
    ("kl", "reference"),
    ("kl", "policy"),
    ("reference", "baseline"),
    ("policy", "baseline"),
    ("reference", "train"),
    ("baseline", "train"),
    ("train", "loss"),
    ("loss", "step"),
)
HEIGHT = 0.8


def draw_step() -> Any:
    """One training step: what is scored, by whom, in which order."""
    figure, axes = plt.subplots(figsize=(11.0, 2.9))
    axes.set(xlim=(-0.1, 15.1), ylim=(1.6, 4.6))
    axes.axis("off")
    for left, bottom, width, text in BOXES.values():
        axes.add_patch(
            FancyBboxPatch(
                (left, bottom), width, HEIGHT, boxstyle="round,pad=0.02", facecolor="#eef2f5", edgecolor=QUIET
            )
        )
        axes.text(left + width / 2, bottom + HEIGHT / 2, text, ha="center", va="center", fontsize=7.5)
    for start, end in ARROWS:
        axes.add_patch(
            FancyArrowPatch(*_ends(BOXES[start], BOXES[end]), arrowstyle="-|>", mutation_scale=9, color=QUIET)
        )
    return figure


def _ends(start: tuple[float, float, float, str], end: tuple[float, float, float, str]) -> tuple[Any, Any]:
    """Return where an arrow begins and ends: from right to left, or up or down where boxes are above each other."""
    if start[0] == end[0]:
        upwards = end[1] > start[1]
        middle = start[0] + start[2] / 2
        return (middle, start[1] + HEIGHT * upwards), (middle, end[1] + HEIGHT * (not upwards))
    return (start[0] + start[2], start[1] + HEIGHT / 2), (end[0], end[1] + HEIGHT / 2)


PICTURES: dict[str, Callable[[], Any]] = {
    "kto_loss.svg": draw_kto_loss,
    "beta.svg": draw_beta,
    "losses.svg": draw_losses,
    "step.svg": draw_step,
}


def main(folder: Path = DOCS / "pictures") -> None:
    """Draw all pictures into a folder."""
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(folder / name, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
