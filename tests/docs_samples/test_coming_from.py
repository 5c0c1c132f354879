"""docs/coming_from/: every key of NeMo-Aligner's gpt_kto.yaml is there, and becomes of it what the table says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nemo_kto.config.legacy import IGNORED, NEUTRAL, RENAMED
from nemo_kto.config.reader import leaf_values
from nemo_kto.config.schema import KTOConfig
from tests.config.test_config import ALIGNER
from tests.docs_samples.pages import PAGES

PAGE = PAGES["docs/coming_from/nemo_aligner.md"]
ROWS = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*?) \| (.*?) ?\|$", PAGE, re.MULTILINE)
OTHERS = {
    "trainer.precision",
    "trainer.gradient_clip_val",
    "model.peft.lora_tuning.adapter_dropout",
    "model.peft.lora_tuning.column_init_method",
    "model.peft.lora_tuning.layer_selection",
    "model.peft.lora_tuning.position_embedding_strategy",
    "model.peft.lora_tuning.row_init_method",
    "model.optim.overlap_param_sync",
    "model.ub_tp_comm_overlap_cfg",
}
"""Keys of the file that tests/config/test_config.py does not need, of 0.7.0 or of the last commit."""

DEFAULTS = leaf_values(KTOConfig())


def written(value: Any) -> str:
    """Return a default as the pages write it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return {None: "null", True: "true", False: "false"}.get(value, str(value))


def test_every_key_is_there_once() -> None:
    keys = [key for key, *_ in ROWS]
    wanted = {key.removesuffix(".data.data_prefix") if "overwrite" in key else key for key in ALIGNER} | OTHERS
    assert sorted(keys) == sorted(wanted)


@pytest.mark.parametrize(("key", "there", "here", "default"), ROWS)
def test_what_becomes_of_a_key(key: str, there: str, here: str, default: str) -> None:
    del there, default
    below = [name for name in DEFAULTS if name == key or name.startswith(f"{key}.")]
    if here.startswith("kept"):
        assert below
    elif here.startswith("sets"):
        assert RENAMED[key] == re.match(r"sets `([\w.]+)`", here)[1]  # type: ignore[index]
    elif here.startswith("ignored"):
        assert key in IGNORED
    else:
        accepted, _ = NEUTRAL[key]
        values = re.match(r"only (.*?)(?::|$)", here)[1]  # type: ignore[index]
        written = {"null": None, "False": False, "1": 1, "json": "json", "jsonl": "jsonl"}
        assert {written[value] for value in re.split(r", | or ", values)} == {*accepted}


@pytest.mark.parametrize(("key", "there", "here", "default"), [row for row in ROWS if row[3]])
def test_defaults_of_today(key: str, there: str, here: str, default: str) -> None:
    del there
    name = key if here.startswith("kept") else RENAMED[key]
    shown = re.match(r"`?([^`:,]+)", default)[1]  # type: ignore[index]
    assert shown == written(DEFAULTS[name]) or float(shown) == DEFAULTS[name]


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/coming_from/")])
def test_a_page_says_what_was_looked_at(page: str) -> None:
    assert re.search(r"^Looked at: .*\d+ (May|October) 202[56]", PAGES[page], re.MULTILINE | re.DOTALL)
    for title in ("The same run", "Data", "Metrics", "What else differs"):
        assert f"\n## {title}\n" in PAGES[page]


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/coming_from/")])
def test_defaults_in_tables_of_options(page: str) -> None:
    """The last column of a row of one key is that key's default."""
    rows = re.findall(
        r"^\| [^|]+ \| [^|]* \| `((?:\w+\.)+\w+)`[^`|]* \| ([^|:]+?)(?:: [^|]*)? \|$", PAGES[page], re.MULTILINE
    )
    assert len(rows) > 10 or page.endswith("nemo_aligner.md")
    for key, cell in rows:
        default = cell.partition(",")[0] if not isinstance(DEFAULTS[key], list) else cell
        assert default == written(DEFAULTS[key]) or float(default) == DEFAULTS[key], f"{page}: {key} {cell}"
