"""README's table of what works with what names cells of the matrix of tests, and where it names none there is none."""

from __future__ import annotations

import re

import nemo_kto
from tests.docs_samples.pages import PAGES, ROOT
from tests.integration.test_matrix import cells

MATRIX = {"-".join(cell.values) for cell in cells()}
COLUMNS = ("dense", "experts", "adapters", "experts, adapters")
SECTION = PAGES["README.md"].partition("### What works with what")[2].partition("\n### ")[0]
ROWS = re.findall(r"^\| ([^|]+) \| ((?:`[^`]+-[^`]+`|-) \| .*) \|$", SECTION, re.MULTILINE)


def test_every_cell_is_a_test() -> None:
    rows = {title: [cell.strip(" `") for cell in line.split(" | ")] for title, line in ROWS if "tests/" not in line}
    rows.pop("reference `adapter_off`", None)
    assert len(rows) == 13
    for title, line in rows.items():
        layout = next(cell for cell in line if "-" in cell[1:]).partition("-")[2]
        for column, cell in zip(COLUMNS, line, strict=True):
            name = f"{column}-{layout}"
            there = name in MATRIX or f"{name}-kept" in MATRIX
            assert (cell == name) == there, f"{title}, {column}: {cell}"
            assert cell == name or cell == "-" or (cell == "with sequence" and f"{column}-tp2sp-kept" in MATRIX)


def test_the_command_beside_it_names_a_cell() -> None:
    (wanted,) = re.findall(r'-k "([\w, -]+)"`', SECTION)
    assert wanted in MATRIX


def test_how_to_cite() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {nemo_kto.__version__}\n" in text and "\nlicense: Apache-2.0\n" in text
    assert "arXiv:2402.01306" in text
