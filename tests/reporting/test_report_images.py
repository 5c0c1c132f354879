"""Images of prompts on a report's page: shown where they are safe, left out with a count where not."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nemo_kto.data.tokens.image_files import THUMBNAIL
from nemo_kto.data.tokens.image_files import thumbnail as written_by_training
from nemo_kto.reporting import page as pages
from nemo_kto.reporting.reading import MOST_IMAGE_CHARACTERS, read_runs
from nemo_kto.reporting.report import write_report
from tests.data.tiny_processors import png
from tests.reporting.test_report import Page, generate, log

ALT = re.compile(r"Image (\d) of the prompt")
LEFT_OUT = re.compile(r"Images of prompts that are left out: (\d+)\.")


def thumbnail(colour: str, kind: str = "png") -> str:
    """Return a picture of one colour as a data URI."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def row(step: int, images: Any, prompt: str = "Which colour?", policy: str = "red") -> dict[str, Any]:
    return {"step": step, "prompt": prompt, "policy": policy, "reference": None, "images": images}


def page_of(folder: Path, *rows: dict[str, Any]) -> tuple[str, Page]:
    """Return the source of the page of a run with these answers, and what is on it."""
    log(folder, {"train/loss": {0: 0.5}})
    generate(folder, *rows)
    file = write_report([folder], folder / "report")
    return file.read_text(encoding="utf-8"), Page(file)


def shown(page: Page) -> list[str]:
    """Return the addresses of the images of prompts."""
    return [str(a["src"]) for tag, a in page.tags if tag == "img" and ALT.fullmatch(str(a["alt"]))]


def left_out(page: Page) -> int:
    counts = [int(found[1]) for text in page.texts["p"] if (found := LEFT_OUT.search(text))]
    return counts[0] if counts else 0


def test_images_are_shown_beside_their_prompt(tmp_path: Path) -> None:
    images = [thumbnail("red"), thumbnail("blue", "jpeg")]
    _, page = page_of(tmp_path, row(3, images), {"step": 3, "prompt": "Text only", "policy": "a"})
    assert shown(page) == images and left_out(page) == 0
    places = [index for index, (tag, attributes) in enumerate(page.tags) if ALT.fullmatch(attributes.get("alt") or "")]
    articles = [index for index, (tag, _) in enumerate(page.tags) if tag == "article"]
    assert articles[0] < places[0] < places[1] < articles[1]  # in the card of the first prompt
    assert [page.tags[place][1]["alt"] for place in places] == ["Image 1 of the prompt", "Image 2 of the prompt"]
    colours = [Image.open(io.BytesIO(base64.b64decode(src.split(",")[1]))).getpixel((4, 4)) for src in shown(page)]
    assert colours[0] == (255, 0, 0)
    assert isinstance(colours[1], tuple) and colours[1][2] > 240


GOOD = thumbnail("red")
HOSTILE = [
    f'{GOOD}" onerror="alert(1)',
    f"{GOOD}'><script>alert(1)</script>",
    f"{GOOD}\n",
    f"\n{GOOD}",
    f"{GOOD} ",
    "data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImFsZXJ0KDEpIi8+",
    "data:image/gif;base64,R0lGODlh",
    "data:text/html;base64,PHNjcmlwdD4=",
    "DATA:image/png;base64,AAAA",
    "data:image/png,AAAA",
    "data:image/png;base64,",
    "data:image/png;base64,%3Cscript%3E",
    "data:image/png;base64,AA\u00c4A",
    "javascript:alert(1)",
    "https://example.com/one.png",
    "//example.com/one.png",
    "file:///etc/passwd",
    "/etc/passwd",
    "",
    "data:image/png;base64," + "A" * MOST_IMAGE_CHARACTERS,
    7,
    None,
    True,
    ["data:image/png;base64,AAAA"],
    {"url": GOOD},
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_plain_thumbnail_is_left_out_and_counted(tmp_path: Path, hostile: Any) -> None:
    source, page = page_of(tmp_path, row(0, [hostile, GOOD]))
    assert shown(page) == [GOOD]
    assert left_out(page) == 1
    addresses = {str(attributes["src"]) for _, attributes in page.tags if "src" in attributes}
    assert all(re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", address) for address in addresses)
    assert not re.search(r"onerror|<script|svg\+xml|text/html|javascript:|example\.com|passwd", source)
    assert len(source) < MOST_IMAGE_CHARACTERS * 3  # of which the picture of the curve is most


@pytest.mark.parametrize(("images", "count"), [(GOOD, 1), ({"image": GOOD}, 1), (7, 1), ([], 0), (None, 0)])
def test_what_is_no_list_of_images(tmp_path: Path, images: Any, count: int) -> None:
    _, page = page_of(tmp_path, row(0, images))
    assert shown(page) == [] and left_out(page) == count
    assert "Which colour?" in page.texts["pre"]


def test_a_thumbnail_of_the_largest_size_is_shown(tmp_path: Path) -> None:
    start = "data:image/png;base64,"
    largest = start + "A" * (MOST_IMAGE_CHARACTERS - len(start))
    _, page = page_of(tmp_path, row(0, [largest]))
    assert shown(page) == [largest] and left_out(page) == 0


def test_a_prompt_and_a_page_have_only_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = ["red", "blue", "green", "black", "white", "yellow"]
    many = [thumbnail(colour) for colour in colours]
    _, page = page_of(tmp_path / "many", row(0, many))
    assert shown(page) == many[:4] and left_out(page) == 2

    monkeypatch.setattr(pages, "MOST_PAGE_CHARACTERS", len(many[0]) + len(many[1]))
    _, page = page_of(tmp_path / "page", row(0, many[:1], "a"), row(0, many[1:2], "b"), row(0, many[2:4], "c"))
    assert shown(page) == many[:2] and left_out(page) == 2


def test_the_same_words_about_other_images_are_another_prompt(tmp_path: Path) -> None:
    """In one run, and where two are compared."""
    red, blue = thumbnail("red"), thumbnail("blue")
    for name in ("one", "two"):
        log(tmp_path / name, {"train/loss": {0: 0.5}})
        rows = [row(0, [red], policy=f"{name} red"), row(0, [blue], policy=f"{name} blue")]
        generate(tmp_path / name, *rows, row(0, ["http://a"], policy=f"{name} none"))
    (run,) = read_runs([tmp_path / "one"])
    assert [one.policy for one in run.generations] == ["one red", "one blue", "one none"]
    page = Page(write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "report"))
    assert shown(page) == [red, blue] and left_out(page) == 1
    question = "Which colour?"
    assert page.texts["pre"] == [
        text for image in ("red", "blue", "none") for text in (question, f"one {image}", f"two {image}")
    ]


def test_an_older_line_of_the_same_prompt_is_replaced(tmp_path: Path) -> None:
    log(tmp_path, {"train/loss": {0: 0.5}})
    red = thumbnail("red")
    (tmp_path / "run_0").mkdir()
    generate(tmp_path / "run_0", row(0, [red], policy="before the resume"))
    (tmp_path / "generations.jsonl").write_text(json.dumps(row(0, [red], policy="after it")) + "\n", encoding="utf-8")
    (run,) = read_runs([tmp_path])
    assert [one.policy for one in run.generations] == ["after it"]


def test_the_largest_thumbnail_of_training_is_shown() -> None:
    """Noise, which nothing makes smaller."""
    assert len(written_by_training(png(THUMBNAIL, THUMBNAIL))) <= MOST_IMAGE_CHARACTERS
