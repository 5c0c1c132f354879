"""What the site has besides docs/: the pages at the top of the repository, and what becomes of links out of docs/.

The README is the site's first page. A link to a page that the site has leads there; one to another file of the
repository becomes that file's path, as the repository has no address of its own. A link to what is not there is a
warning, which ends a strict build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
"""Page of the site -> file at the top of the repository."""

logger = logging.getLogger("mkdocs.hooks.site")

FENCED = re.compile(r"^( *)(```+|~~~+).*?^\1\2`*~* *$", re.MULTILINE | re.DOTALL)
CODE_OR_LINK = re.compile(
    r"(?P<code>(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<bang>!?)\[(?P<text>(?:`[^`]*`|[^\[\]`])*)\]\((?P<target>[^)\s]+)\)",
    re.DOTALL,
)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages at the top of the repository; called by MkDocs."""
    for page, name in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page's text with its links made into the site's; called by MkDocs."""
    written = posixpath.join("docs", page.file.src_uri)
    source = PAGES.get(page.file.src_uri, written)
    parts, end = [], 0
    for block in FENCED.finditer(markdown):
        parts += [_with_site_links(markdown[end : block.start()], source, page.file.src_uri), block[0]]
        end = block.end()
    return "".join([*parts, _with_site_links(markdown[end:], source, page.file.src_uri)])


def _with_site_links(text: str, source: str, page: str) -> str:
    """Return text outside of fenced code; `source` is its file in the repository, `page` its page."""
    return CODE_OR_LINK.sub(lambda match: match[0] if match["code"] else _site_link(match, source, page), text)


def _site_link(match: re.Match[str], source: str, page: str) -> str:
    target, hash_sign, anchor = match["target"].partition("#")
    if not target or "://" in target or target.startswith("mailto:"):
        return match[0]
    place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if place in PAGES.values():
        place = posixpath.join("docs", next(name for name, file in PAGES.items() if file == place))
    if place.startswith("docs/"):
        there = posixpath.relpath(place.removeprefix("docs/"), posixpath.dirname(page) or ".")
        return f"{match['bang']}[{match['text']}]({there}{hash_sign}{anchor})"
    if not (ROOT / place).exists():
        logger.warning("%s: a link to %s, which is not there", source, place)
    text = match["text"].strip("`")
    return f"`{place}`" if place.endswith(text) else f"{match['text']} (`{place}`)"
