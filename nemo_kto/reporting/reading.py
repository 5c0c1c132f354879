"""A log folder as one run: its series merged over all its parts, and what training wrote beside them.

A run that was resumed has several parts: more event files beside the first, or files that NeMo's exp_manager moved to
`run_0`, `run_1` ... The parts overlap where a killed one had gone on after its last checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from nemo_kto.config.folders import ANSWERS_FILE, FACTS_FILE
from nemo_kto.errors import DataError

EVENT_FILES = "events.out.tfevents*"
IMAGE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+")
MOST_IMAGE_CHARACTERS = 68 * 1024
"""An image of a prompt is shown up to this size: training writes thumbnails of 128 pixels at most, of noise too."""


@dataclass(frozen=True)
class Series:
    """One logged quantity.

    Attributes:
        tag: Its name in the log, such as train/loss.
        steps: `[n]`, int64, rising, at least one.
        values: `[n]`, float64; NaN and infinities stay as they were logged.
    """

    tag: str
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Generation:
    """What the policy, and the reference if it was asked, answered to a prompt at a step.

    Attributes:
        step: Steps taken.
        prompt: Its text.
        policy: The policy's answer.
        reference: The reference's, or None.
        images: The prompt's images, as data URIs that are safe to show.
        unusable_images: Others, which are left out.
    """

    step: int
    prompt: str
    policy: str
    reference: str | None
    images: tuple[str, ...] = ()
    unusable_images: int = 0

    @property
    def question(self) -> tuple[str, tuple[str, ...], int]:
        """What was asked: the same words about other images are another question."""
        return self.prompt, self.images, self.unusable_images


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: What the report calls it; differs between the runs of a report.
        folder: Its log folder.
        series: Tag -> series, sorted by tag.
        started: When the first value was logged, UTC.
        seconds: Time from the first to the last logged value, added up over the parts: pauses do not count.
        info: What run.json holds; empty without one.
        generations: By step, then in the order of the file.
        unreadable_generations: Lines of generations.jsonl that are left out.
    """

    name: str
    folder: Path
    series: dict[str, Series]
    started: datetime
    seconds: float
    info: dict[str, Any]
    generations: list[Generation]
    unreadable_generations: int

    @property
    def steps(self) -> int:
        """Steps that were taken; the log counts them from 0."""
        return 1 + max(int(series.steps[-1]) for series in self.series.values())


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs of some log folders, in the order given.

    Raises:
        DataError: A folder is missing or given twice, holds no event files, or holds a file that cannot be read.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise DataError(f"{folder} is given twice. Name every log folder once.")
    infos = [_read_info(folder) for folder in resolved]
    return [
        _read_run(folder, name, info)
        for folder, name, info in zip(resolved, _names(resolved, infos), infos, strict=True)
    ]


def _read_run(folder: Path, name: str, info: dict[str, Any]) -> Run:
    series, started, seconds = _read_events(folder)
    generations, unreadable = _read_generations(folder)
    return Run(
        name=name,
        folder=folder,
        series=series,
        started=datetime.fromtimestamp(started, timezone.utc),
        seconds=seconds,
        info=info,
        generations=generations,
        unreadable_generations=unreadable,
    )


def _names(folders: list[Path], infos: list[dict[str, Any]]) -> list[str]:
    """Names that tell the runs apart: their own, else their folders', with as many parents as that takes."""
    depth = max(len(folder.parts) for folder in folders)
    choices = [[str(info.get("name") or folder.name) for folder, info in zip(folders, infos, strict=True)]]
    choices += [["/".join(folder.parts[-count:]) for folder in folders] for count in range(1, depth + 1)]
    return next(names for names in choices if len(set(names)) == len(names))


def _parts(folder: Path) -> list[Path]:
    """The folders of a run's parts, the latest last."""
    earlier = [child for child in folder.glob("run_*") if child.is_dir() and re.fullmatch(r"run_\d+", child.name)]
    return [*sorted(earlier, key=lambda child: int(child.name[4:])), folder]


def _read_events(folder: Path) -> tuple[dict[str, Series], float, float]:
    """Return (tag -> series, time of the first value since 1970, seconds of all parts)."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Name the log folder of a run.")
    files = [file for part in _parts(folder) for file in sorted(part.glob(EVENT_FILES))]
    if not files:
        raise DataError(
            f"{folder} holds no event files (events.out.tfevents...). Name the log folder of a run that was started "
            "with exp_manager.create_tensorboard_logger=true."
        )
    merged: dict[str, dict[int, tuple[float, float]]] = {}  # tag -> step -> (time, value)
    started, seconds = float("inf"), 0.0
    for file in files:
        # 0: keep every value. One file at a time, as each is a part of the run and the time between them is a pause.
        events = EventAccumulator(str(file), size_guidance={SCALARS: 0}).Reload()
        times = [time for tag in events.Tags()[SCALARS] for time in _merge(merged.setdefault(tag, {}), events, tag)]
        if times:
            started, seconds = min(started, min(times)), seconds + max(times) - min(times)
    if not merged:
        raise DataError(f"The event files in {folder} hold no numbers yet. Wait until the run has logged a step.")
    return {tag: _series(tag, merged[tag]) for tag in sorted(merged)}, started, seconds


def _merge(points: dict[int, tuple[float, float]], events: EventAccumulator, tag: str) -> Iterator[float]:
    """Add a file's values of one series; of two for a step the later one stays. Yields when each was written."""
    for event in events.Scalars(tag):
        if event.step not in points or event.wall_time >= points[event.step][0]:
            points[event.step] = (event.wall_time, event.value)
        yield event.wall_time


def _series(tag: str, points: dict[int, tuple[float, float]]) -> Series:
    steps = sorted(points)
    return Series(
        tag, np.array(steps, dtype=np.int64), np.array([points[step][1] for step in steps], dtype=np.float64)
    )


def _read_info(folder: Path) -> dict[str, Any]:
    """What the run.json of the latest part holds."""
    for part in reversed(_parts(folder)):
        file = part / FACTS_FILE
        if not file.is_file():
            continue
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file} is not valid JSON ({error}). Remove it to get a report without it.") from error
        if not isinstance(info, dict):
            raise DataError(f"{file} must hold a JSON object. Remove it to get a report without it.")
        return info
    return {}


def _read_generations(folder: Path) -> tuple[list[Generation], int]:
    """Return (generations by step, number of lines that are none: a killed run may leave half a line)."""
    found: dict[tuple[Any, ...], Generation] = {}
    unreadable = 0
    for part in _parts(folder):
        file = part / ANSWERS_FILE
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        for line in filter(str.strip, lines):
            generation = _parse_generation(line)
            if generation is None:
                unreadable += 1
            else:
                found[generation.step, generation.question] = generation
    return sorted(found.values(), key=lambda generation: generation.step), unreadable


def _parse_generation(line: str) -> Generation | None:
    try:
        row = json.loads(line)
        reference = row.get("reference")
        images, unusable = _parse_images(row.get("images"))
        return Generation(
            int(row["step"]),
            str(row["prompt"]),
            str(row["policy"]),
            None if reference is None else str(reference),
            images,
            unusable,
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _parse_images(value: Any) -> tuple[tuple[str, ...], int]:
    """Return (the images that can be shown, number of the others): no address, no other kind, nothing large."""
    if value is None:
        return (), 0
    if not isinstance(value, list):
        return (), 1
    images = tuple(
        image
        for image in value
        if isinstance(image, str) and len(image) <= MOST_IMAGE_CHARACTERS and IMAGE.fullmatch(image)
    )
    return images, len(value) - len(images)
