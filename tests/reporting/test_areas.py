"""The picture of where the time goes: areas on each other, whose heights are what was logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nemo_kto.reporting.areas import areas_caption, draw_areas
from nemo_kto.reporting.panels import Line, Panel, panels_of
from nemo_kto.reporting.reading import read_runs
from nemo_kto.reporting.report import write_report
from tests.reporting.test_report import Page, log

PARTS = {
    "data": 0.5,
    "kl": 1.0,
    "reference": 2.0,
    "gradients": 4.0,
    "gradient_sync": 0.0,
    "optimizer": 0.5,
    "other": 0.0,
}


def folder_of(place: Path, *, steps: int = 4, **changes: dict[int, float]) -> Path:
    series = {part: dict.fromkeys(range(steps), seconds) for part, seconds in PARTS.items()}
    series = {part: {**points, **changes.get(part, {})} for part, points in series.items()}
    return log(place, {f"train/time/{part}": points for part, points in series.items()})


def panel_of(folder: Path) -> tuple[Panel, list[Line]]:
    ((panel, lines),) = panels_of(read_runs([folder]))
    assert panel.title == "Where the time goes" and panel.stacked
    return panel, lines


def heights(panel: Panel, lines: list[Line]) -> dict[str, dict[int, tuple[float, float]]]:
    """Return tag -> step -> lower and upper edge of its area."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for area in draw_areas(panel, lines).axes[0].collections:
        corners: Any = area.get_paths()[0].vertices
        at = {float(step): sorted(corners[corners[:, 0] == step][:, 1]) for step in np.unique(corners[:, 0])}
        found[str(area.get_gid())] = {int(step): (edges[0], edges[-1]) for step, edges in at.items()}
    return found


def test_each_part_lies_on_those_before(tmp_path: Path) -> None:
    """In the order of a step; at step 2 the reference takes 3 seconds instead of 2."""
    panel, lines = panel_of(folder_of(tmp_path, reference={2: 3.0}))
    found = heights(panel, lines)
    assert [line.label for line in lines][:3] == ["waiting for data", "KL set", "reference"]
    assert found["train/time/data"][0] == (0.0, 0.5) and found["train/time/kl"][0] == (0.5, 1.5)
    assert found["train/time/reference"] == {0: (1.5, 3.5), 1: (1.5, 3.5), 2: (1.5, 4.5), 3: (1.5, 3.5)}
    assert found["train/time/gradients"][2] == (4.5, 8.5)
    assert draw_areas(panel, lines).axes[0].get_ylim() == (0, pytest.approx(1.05 * 9.0))


def test_a_first_step_that_took_far_longer_does_not_flatten_the_others(tmp_path: Path) -> None:
    panel, lines = panel_of(folder_of(tmp_path, steps=5, gradients={0: 400.0}))
    assert draw_areas(panel, lines).axes[0].get_ylim() == (0, 16.0)  # twice 8
    assert areas_caption(panel, lines).endswith("Cut off above: 1 of 5 steps.")


def test_many_steps_are_smoothed_and_the_caption_says_so(tmp_path: Path) -> None:
    panel, lines = panel_of(folder_of(tmp_path, steps=100, kl={step: 1.0 + step % 2 for step in range(100)}))
    found = heights(panel, lines)["train/time/kl"]
    assert found[50][1] - found[50][0] == pytest.approx(7 / 5)  # of 1, 2, 1, 2, 1
    assert "Mean of the 5 logged steps around." in areas_caption(panel, lines)


def test_a_step_without_a_part_has_none_of_it(tmp_path: Path) -> None:
    folder = log(tmp_path, {"train/time/data": {0: 1.0, 1: 1.0}, "train/time/kl": {1: 2.0}})
    assert heights(*panel_of(folder))["train/time/kl"] == {0: (1.0, 1.0), 1: (1.0, 3.0)}


def test_the_page_has_the_picture_and_the_shares(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run")
    page = write_report([folder], tmp_path / "report")
    # of 8 seconds; what takes less than half a percent is left out
    assert Page(page).row("Where the time goes, median") == [
        "gradients 50%, reference 25%, KL set 12%, waiting for data 6%, optimizer 6%"
    ]
    with Image.open(tmp_path / "report" / "where_the_time_goes.png") as picture:
        colors = len(picture.convert("RGB").getcolors(1 << 20) or ())
    assert colors > 8
    assert all(f"train/time/{part}" in page.read_text(encoding="utf-8") for part in PARTS)


def test_several_runs_are_compared_part_by_part(tmp_path: Path) -> None:
    runs = read_runs([folder_of(tmp_path / name) for name in ("a", "b")])
    panels = {panel.title: lines for panel, lines in panels_of(runs)}
    assert len(panels) == len(PARTS) and not any(panel.stacked for panel, _ in panels_of(runs))
    assert {line.label.partition(",")[0] for line in panels["Where the time goes, reference"]} == {"a", "b"}
