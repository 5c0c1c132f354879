"""Pictures of a run, or of several beside each other: a page that works offline, and the pictures as PNG files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from nemo_kto.errors import DataError
from nemo_kto.reporting.areas import areas_caption, draw_areas
from nemo_kto.reporting.data_plots import draw_lengths, draw_sources
from nemo_kto.reporting.page import DataGroup, render
from nemo_kto.reporting.panels import OTHER, panels_of
from nemo_kto.reporting.plots import Picture, caption, draw_panel, encode
from nemo_kto.reporting.reading import Run, read_runs

PAGE_FILE = "report.html"


def write_report(log_dirs: Sequence[Path], output: Path) -> Path:
    """Write report.html and its pictures, and return the page's path.

    Args:
        log_dirs: Log folders of one run or several, which are then overlaid; each holds TensorBoard's event files,
            also in folders `run_0`, `run_1` ... of its earlier parts, and, where training wrote them, run.json and
            generations.jsonl.
        output: Folder to write to; created if it is missing, files of an earlier report are replaced.

    Raises:
        DataError: A log folder is missing, given twice or without event files, a file in it cannot be read, or
            `output` cannot be written.
        ValueError: There is no log folder.
    """
    if not log_dirs:
        raise ValueError("log_dirs is empty")
    runs = read_runs(log_dirs)
    curves = draw_curves(runs)
    groups = _by_data(runs)
    page = output / PAGE_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        for picture in [*curves, *(picture for group in groups for picture in group.pictures)]:
            (output / picture.file).write_bytes(picture.png)
        # names of files may have bytes in them that are no text
        page.write_text(render(runs, curves, groups), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise DataError(
            f"{output} cannot be written ({error.strerror}). Name another folder with --output."
        ) from error
    return page


def draw_curves(runs: list[Run]) -> list[Picture]:
    """Return the pictures of all series of some runs."""
    pictures: list[Picture] = []
    for panel, lines in panels_of(runs):
        name = f"{OTHER} {panel.title}" if panel.section == OTHER else panel.title
        pictures.append(
            Picture(
                section=panel.section,
                title=panel.title,
                file=_file_name(name, taken={picture.file for picture in pictures}),
                png=encode((draw_areas if panel.stacked else draw_panel)(panel, lines)),
                tags=tuple(dict.fromkeys(line.series.tag for line in lines)),
                caption=(areas_caption if panel.stacked else caption)(panel, lines),
            )
        )
    return pictures


def draw_data(data: dict[str, Any], group: int) -> list[Picture]:
    """Return the pictures of the data that run.json describes.

    Args:
        data: Split -> its counts, or null.
        group: Number of this data among the different ones of a report, from 1; it tells their files apart.
    """
    figures = {}
    for split, counts in data.items():
        for kind in ("prompt", "response"):
            title = f"{kind.title()} lengths, {split}"
            if counts and counts.get(f"{kind}_lengths"):
                figures[title] = draw_lengths(title, counts[f"{kind}_lengths"])
        title = f"Samples by source, {split}"
        if counts and counts.get("sources"):
            figures[title] = draw_sources(title, counts["sources"])
    return [
        Picture(
            "Data",
            title,
            _file_name(f"data {group} {title}" if group > 1 else f"data {title}"),
            encode(figure),
            (),
            "",
        )
        for title, figure in figures.items()
    ]


def _by_data(runs: list[Run]) -> list[DataGroup]:
    """Return the different data of some runs, each with the runs that were trained on it."""
    groups: list[tuple[list[Run], dict[str, Any]]] = []
    for run in runs:
        data = run.info.get("data")
        same = next((group for group, other in groups if other == data), None)
        if same is not None:
            same.append(run)
        elif data:
            groups.append(([run], data))
    return [DataGroup(group, data, draw_data(data, number)) for number, (group, data) in enumerate(groups, start=1)]


def _file_name(title: str, taken: Container[str] = ()) -> str:
    """Return a file name for any title, none of those `taken`."""
    plain = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")[:60]
    names = (f"{plain}{'' if number == 1 else f'_{number}'}.png" for number in itertools.count(1))
    return next(name for name in names if name not in taken)
