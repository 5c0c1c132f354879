"""The table of families in docs/models.md is of all families, and names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_kto.network.families import family_of, model_types
from nemo_kto.network.quantised import KINDS as QUANTISED
from tests.generation.test_decoding import BIASED, DENSE, SPARSE
from tests.integration.assets import KINDS
from tests.integration.test_matrix import MODELS
from tests.network import tiny_hf
from tests.network.published_shapes import PUBLISHED
from tests.network.test_lora import PEFT

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
COLUMNS = ("Models", "Built as", "Full", "LoRA", "TP", "PP", "CP", "EP", "Generation", "PEFT", "kind", "name")


def rows() -> dict[str, dict[str, str]]:
    """Return `model_type` -> column -> cell."""
    lines = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE.read_text(), flags=re.MULTILINE)
    return {
        family: dict(zip(COLUMNS, (cell.strip().strip("`") for cell in cells.split("|")), strict=True))
        for family, cells in lines
        if family != "model_type"
    }


ROWS = rows()


def test_the_table_is_of_all_families() -> None:
    assert tuple(sorted(ROWS)) == model_types()


@pytest.mark.parametrize("family", ROWS)
def test_a_family_has_the_tests_that_the_table_names(family: str) -> None:
    row, models = ROWS[family], tiny_hf.families()
    kind, name = row["kind"], row["name"]
    assert KINDS[kind][0].model_type == models[name].model_type == family
    assert name in (*DENSE, *SPARSE, *BIASED)
    in_matrix = {folder for folder, _, _ in MODELS.values()}
    assert kind in in_matrix or (kind == "llama" and "hf" in in_matrix)
    assert family in {models[base].model_type for base, _ in PEFT.values()}
    assert row["Built as"] == PUBLISHED[family].model.rpartition("/")[2]


@pytest.mark.parametrize("family", ROWS)
def test_what_a_mixture_can_have(family: str) -> None:
    row, config = ROWS[family], tiny_hf.families()[ROWS[family]["name"]]
    is_mixture = family_of(config).mixture(config) is not None
    assert (row["EP"], row["TP"]) == (("yes", "with SP") if is_mixture else ("", "yes"))
    assert row["LoRA"] == ("all" if family_of(config).feed_forward_adapters else "attention")


def test_the_table_of_folders_in_fewer_bits_is_of_all_methods() -> None:
    table = PAGE.read_text().split("### Folders in fewer bits")[1]
    assert re.findall(r"^\| [^|`]+: `([\w-]+)`[^|]*\|", table, flags=re.MULTILINE) == list(QUANTISED)
