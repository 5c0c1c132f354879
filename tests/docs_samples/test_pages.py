"""What pages name is there: other pages and their headings, files, keys, tests, and what Python and JSON they show."""

from __future__ import annotations

import ast
import dataclasses
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_kto.config.legacy import IGNORED, NEUTRAL, RENAMED
from nemo_kto.config.schema import KTOConfig
from tests.docs_samples.pages import PAGES, ROOT, anchors, blocks, links, spans

SECTIONS = tuple(field.name for field in dataclasses.fields(KTOConfig))
KEY = re.compile(rf"(?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+(?=$|[=\s.])")
NOT_KEYS = re.compile(
    r"\.(safetensors|json|py)\b|^trainer\.(should_stop|callback_metrics)|^model\.(decoder|layers|norm)\."
)
"""What begins like a key and is none: files, attributes of objects in Python."""

OLD_KEYS = ("docs/coming_from/nemo_aligner.md", "docs/configuration.md", "CHANGELOG.md")
"""Pages that name NeMo-Aligner's keys besides."""

FILES = re.compile(r"(?:nemo_kto|tests|docs|examples|benchmarks|conf)/[\w./*-]+")
NOT_KEPT = ("tests/cuda_sim/build", "docs/performance-summary.md", "docs/performance-summary-archive.md")
"""A folder that tests make, and pages of other projects."""


def keys_of(config: Any, prefix: str = "") -> set[str]:
    """Return all keys, those of sections too."""
    found = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found.add(prefix + field.name)
        if dataclasses.is_dataclass(value):
            found |= keys_of(value, f"{prefix}{field.name}.")
    return found


KEYS = keys_of(KTOConfig())
OLD = {*IGNORED, *NEUTRAL, *RENAMED}


def missing_links(page: str) -> list[str]:
    """Return the links of a page that lead nowhere."""
    missing = []
    for target in links(page):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page), file)) if file else page
        there = place in PAGES or ((ROOT / place).exists() and not place.startswith(".."))
        if not there or (anchor and anchor not in anchors(place)):
            missing.append(target)
    return missing


def unknown_keys(page: str) -> list[str]:
    """Return what a page names as a key, in backticks, and is none."""
    found = [match[0] for span in spans(page) if not NOT_KEYS.search(span) for match in [KEY.match(span)] if match]
    known = KEYS | OLD if page in OLD_KEYS else KEYS
    below = tuple(f"{key}." for key in (*IGNORED, "exp_manager.wandb_logger_kwargs")) if page in OLD_KEYS else ()
    return [key for key in found if key.rstrip(".") not in known and not key.startswith(below or ("\0",))]


def missing_files(page: str) -> list[str]:
    """Return the files of the repository that a page names, in backticks, and that are not there."""
    named = [match for span in spans(page) for match in FILES.findall(span) if FILES.match(span)]
    return [name for name in named if name.rstrip("./") not in NOT_KEPT and not list(ROOT.glob(name.rstrip("./")))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert missing_links(page) == []


@pytest.mark.parametrize("page", PAGES)
def test_keys_are_keys(page: str) -> None:
    assert unknown_keys(page) == []


@pytest.mark.parametrize("page", PAGES)
def test_files_are_there(page: str) -> None:
    assert missing_files(page) == []


@pytest.mark.parametrize("page", PAGES)
def test_tests_are_there(page: str) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)", PAGES[page]):
        functions = {
            node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{page}: {file} has no {name}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python", "json")])
def test_python_and_json_can_be_read(page: str) -> None:
    for block in blocks(page, "python"):
        compile(block.text, f"{page}:{block.line}", "exec")
    for block in blocks(page, "json"):
        for line in [block.text] if block.text.startswith(("{\n", "[")) else block.text.splitlines():
            json.loads(line)


@pytest.mark.parametrize("page", PAGES)
def test_nothing_leads_to_a_machine(page: str) -> None:
    assert not re.search(r"https?://(localhost|127\.|10\.|192\.168\.)|/home/\w+/(?!\.)|/tmp/work", PAGES[page])


def test_what_is_missing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "# A page\n[a](docs/nowhere.md), [b](README.md#no-such-heading), [c](#a-page), [`d`](LICENSE)\n"
        "`model.kto.betta`, `model.optim.lr=1e-6`, `model.kto`, `nemo_kto/no_file.py`, `tests/conftest.py`\n"
        "```text\n[e](inside.md) `model.code`\n```\n"
    )
    monkeypatch.setitem(PAGES, "PAGE.md", text)
    assert missing_links("PAGE.md") == ["docs/nowhere.md", "README.md#no-such-heading"]
    assert unknown_keys("PAGE.md") == ["model.kto.betta"]
    assert missing_files("PAGE.md") == ["nemo_kto/no_file.py"]


def test_the_readme_leads_to_every_page() -> None:
    assert {page for page in PAGES if page.startswith("docs/")} <= {*links("README.md")}


def test_every_page_of_the_repository_is_known_here() -> None:
    assert {"README.md", "docs/configuration.md", "docs/coming_from/trl.md"} <= PAGES.keys()
    assert len(PAGES) >= len(list(Path(ROOT / "docs").rglob("*.md"))) + 4
