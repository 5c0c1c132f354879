"""The page on new families names files, parts and tests that there are, and leaves out nothing a family can say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_kto.network import tables
from nemo_kto.network.families import SUPPORTED_MODEL_TYPES
from nemo_kto.network.family import Family
from nemo_kto.network.model_config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "add_a_family.md").read_text()
NAMED = dict.fromkeys(re.findall(r"`([\w./<>()]+)(?:=\w+)?`", PAGE))
SAID = {field.name for field in dataclasses.fields(Family)}
FIELDS = {field.name for field in dataclasses.fields(ModelConfig)}
OWN = FIELDS - {field.name for field in dataclasses.fields(TransformerConfig)}
OF_SIZES = {"attention_output_bias", "norms_of_all_heads", "latent", "delta", "rotary_scales_queries", "rotary_tables"}
"""Fields that are not a family's to set: they follow from what else it says."""


def rows(heading: str) -> list[list[str]]:
    """Return the rows of the table below a heading, without the row of titles."""
    (section,) = re.findall(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_all_that_a_family_can_say_is_on_the_page() -> None:
    assert {name for name in SAID | (OWN - OF_SIZES) if name not in NAMED} == set()


def test_its_files_are_there() -> None:
    files = [name for name in NAMED if name.endswith(".py") and "<" not in name]
    assert len(files) > 20
    places = (ROOT, ROOT / "nemo_kto", ROOT / "nemo_kto/network", ROOT / "nemo_kto/network/families")
    assert [name for name in files if not any((place / name).is_file() for place in places)] == []


@pytest.mark.parametrize("says", [row[1] for row in rows("2. Write the file")])
def test_what_a_row_says_can_be_said(says: str) -> None:
    for name in re.findall(r"`(\w+)(?:=\w+)?`", says):
        assert name in SAID | FIELDS | {"ExpertNames", "LINEAR_OF", "norm"}, name
    for name in re.findall(r"`tables\.(\w+)`", says):
        assert callable(getattr(tables, name)), name


@pytest.mark.parametrize("place", [row[1] for row in rows("3. Add the tests") if "tests/" in row[1]])
def test_its_tables_of_tests_are_there(place: str) -> None:
    """Each cell names tables or functions `in` a file, or further names `in` what that file has."""
    (file,) = re.findall(r"`(tests/[\w/]+\.py)`", place)
    text = (ROOT / file).read_text()
    names = re.findall(r"`(\w+)(?:\(\))?`", place)
    assert names
    for name in names:
        assert re.search(rf"\b(def )?{name}\b", text), (name, file)


def test_its_examples_are_families() -> None:
    examples = {
        name.removesuffix(".py") for row in rows("2. Write the file") for name in re.findall(r"\w+\.py", row[2])
    }
    assert examples <= set(SUPPORTED_MODEL_TYPES)
