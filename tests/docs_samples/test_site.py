"""The site can be built, strictly, and takes nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG

pytest.importorskip("mkdocs", reason="comes with the extra `docs`")

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\bsrc=\"(?:https?:)?//|<link[^>]*rel=\"(?:stylesheet|preconnect|preload)\"[^>]*"
    r"href=\"(?:https?:)?//|url\(\"?(?:https?:)?//"
)
"""What a browser would load from another place by itself; links that are clicked are none of it."""


TOP = ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")


def build(target: Path, *, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    return subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, timeout=HANG)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    top = {Path(name) for name in ("index.html", "contributing.html", "changelog.html", "security.html")}
    assert {path.relative_to(site) for path in site.rglob("*.html")} == pages | top | {Path("404.html")}


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(files) > 20
    assert not {str(file) for file in files if ELSEWHERE.search(file.read_text(encoding="utf-8"))}
    assert ELSEWHERE.search('<link href="x" rel="stylesheet" href="https://fonts.example/a.css">')


def test_links_to_the_repository_are_paths_and_the_others_work(site: Path) -> None:
    page = (site / "configuration.html").read_text(encoding="utf-8")
    assert "Every key of <code>conf/gpt_kto.yaml</code>" in page
    assert 'href="index.html#reading-the-curves"' in (site / "troubleshooting.html").read_text(encoding="utf-8")
    assert not [
        file for file in site.rglob("*.html") if re.search(r'href="[^"#:]*\.(md|py|yaml)["#]', file.read_text())
    ]


def test_docstrings_are_in_it(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in ("load_config", "kto_loss", "KTOLossConfig", "FeedbackRecord", "CheckpointError"):
        assert re.search(rf'id="nemo_kto[\w.]*\.{name}"', page), name


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("[a](nowhere.md)", "nowhere.md"),
        ("[a](losses.md#no-such-heading)", "no-such-heading"),
        ("[a](../examples/nowhere.py)", "examples/nowhere.py, which is not there"),
    ],
)
def test_a_broken_link_ends_the_build(tmp_path: Path, link: str, said: str) -> None:
    for name in (
        "conf",
        "nemo_kto",
        "examples",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "LICENSE",
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs" / "tools").mkdir(parents=True)
    for name in ("losses.md", "tools/site_hooks.py"):
        (tmp_path / "docs" / name).write_text((ROOT / "docs" / name).read_text(encoding="utf-8"), encoding="utf-8")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings + "\nnav: [page.md, losses.md]\n", encoding="utf-8")
    (tmp_path / "docs" / "page.md").write_text(f"# Page\n\n{link}\n", encoding="utf-8")
    done = build(tmp_path / "site", root=tmp_path)
    assert done.returncode != 0 and said in done.stderr, done.stderr
