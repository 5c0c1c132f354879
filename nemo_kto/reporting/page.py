"""The page: what goes where. Everything that comes from a run is escaped."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from jinja2 import Environment, StrictUndefined

from nemo_kto import __version__
from nemo_kto.reporting import tables
from nemo_kto.reporting.panels import LEARNING, OPTIMIZER, OTHER, PROGRESS, SPEED
from nemo_kto.reporting.plots import Picture
from nemo_kto.reporting.reading import MOST_IMAGE_CHARACTERS, Generation, Run
from nemo_kto.reporting.template import CSS, PAGE

SECTIONS = (LEARNING, OPTIMIZER, SPEED, OTHER, PROGRESS)
"""Headings of the curves, in the order of the page."""

MOST_PROMPTS = 8
"""So many prompts are shown of a step."""

MOST_IMAGES = 4
"""So many images are shown of a prompt."""

MOST_PAGE_CHARACTERS = 4 * 1024 * 1024
"""So large are all images of prompts on a page together."""


@dataclass(frozen=True)
class DataGroup:
    """Runs that were trained on the same data, what it is, and its pictures."""

    runs: list[Run]
    data: dict[str, Any]
    pictures: list[Picture]


@dataclass(frozen=True)
class Card:
    """A prompt and who answered what; images are data URIs, some may be left out."""

    prompt: str
    answers: list[tuple[str, str]]
    images: tuple[str, ...] = ()
    left_out: int = 0


@dataclass(frozen=True)
class Cards:
    """The cards under one heading."""

    heading: str
    cards: list[Card] = field(default_factory=list)
    left_out: int = 0


def render(runs: list[Run], curves: list[Picture], data: list[DataGroup]) -> str:
    """Return the page as HTML that loads nothing from anywhere."""
    by_heading = {name: [picture for picture in curves if picture.section == name] for name in SECTIONS}
    sections = {name: pictures for name, pictures in by_heading.items() if pictures}
    cards = within_limits(generation_cards(runs))
    described = [run for run in runs if run.info]
    headings = ["Summary", *(["Differences"] if len(runs) > 1 else []), *sections]
    headings += (
        ["Data"] * bool(data) + ["Generations"] * bool(cards) + ["Series"] + ["Configuration"] * bool(described)
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = _base64
    return environment.from_string(PAGE).render(
        title=" · ".join(run.name for run in runs),
        version=__version__,
        written=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        css=CSS,
        contents=headings,
        runs=runs,
        facts=tables.facts(runs),
        final=tables.final_numbers(runs),
        differences=tables.differences(runs),
        described=len(described),
        sections=sections,
        data=[_data_view(group) for group in data],
        generations=cards,
        images_left_out=sum(card.left_out for group in cards for card in group.cards),
        most_kilobytes=MOST_IMAGE_CHARACTERS // 1024,
        most_images=MOST_IMAGES,
        most_megabytes=MOST_PAGE_CHARACTERS // 1024**2,
        unreadable=sum(run.unreadable_generations for run in runs),
        series=tables.all_series(runs),
        configurations=[_configuration_view(run) for run in described],
    )


def generation_cards(runs: list[Run]) -> list[Cards]:
    """Return what the runs generated: of one run a few steps, the latest first; of several the last step of each."""
    if len(runs) > 1:
        return _compared(runs)
    generations = runs[0].generations
    steps = sorted({generation.step for generation in generations})
    chosen = sorted({steps[-1], steps[len(steps) // 2], steps[0]}, reverse=True) if steps else []
    groups = []
    for step in chosen:
        found = [generation for generation in generations if generation.step == step]
        cards = [Card(one.prompt, _answers(one), one.images, one.unusable_images) for one in found[:MOST_PROMPTS]]
        groups.append(Cards(f"After {step:,} steps", cards, len(found) - len(cards)))
    return groups


def _compared(runs: list[Run]) -> list[Cards]:
    answers: dict[tuple[str, tuple[str, ...], int], list[tuple[str, str]]] = {}
    references: dict[tuple[str, tuple[str, ...], int], list[tuple[str, str]]] = {}
    for run in runs:
        for one in run.generations:
            if one.step != run.generations[-1].step:
                continue
            answers.setdefault(one.question, []).append((f"{run.name}, step {one.step:,}", one.policy))
            if one.reference is not None:
                references[one.question] = [("reference", one.reference)]
    cards = [
        Card(question[0], [*given, *references.get(question, [])], *question[1:])
        for question, given in answers.items()
    ]
    left_out = max(0, len(cards) - MOST_PROMPTS)
    return [Cards("Last step of each run", cards[:MOST_PROMPTS], left_out)] if cards else []


def within_limits(groups: list[Cards]) -> list[Cards]:
    """Return the cards with as many of their images as a prompt and a page may have."""
    left = MOST_PAGE_CHARACTERS
    limited = []
    for group in groups:
        cards = []
        for card in group.cards:
            images: list[str] = []
            for image in card.images[:MOST_IMAGES]:
                if len(image) <= left:
                    images.append(image)
                    left -= len(image)
            left_out = card.left_out + len(card.images) - len(images)
            cards.append(replace(card, images=tuple(images), left_out=left_out))
        limited.append(replace(group, cards=cards))
    return limited


def _answers(generation: Generation) -> list[tuple[str, str]]:
    answers = [("policy", generation.policy)]
    return answers if generation.reference is None else [*answers, ("reference", generation.reference)]


def _data_view(group: DataGroup) -> dict[str, Any]:
    return {
        "names": [run.name for run in group.runs],
        "numbers": tables.data_numbers(group.data),
        "sources": tables.source_numbers(group.data),
        "pictures": group.pictures,
    }


def _configuration_view(run: Run) -> dict[str, Any]:
    changed, default = tables.configuration(run)
    return {"name": run.name, "changed": changed, "default": default, "versions": tables.versions(run)}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
