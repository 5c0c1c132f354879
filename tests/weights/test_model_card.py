"""The README.md of exported folders: its numbers are those of the data and the run, and its example runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_kto.config.folders import FACTS_FILE
from nemo_kto.runtime.checkpoint_manifest import MANIFEST_FILE
from nemo_kto.weights.model_card import model_card
from tests.distributed_harness import free_port
from tests.integration.assets import make_model_folder, read_series, settings, train_on_rank, write_feedback

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "nlp" / "kto" / "quickstart"
LORA = {"model__peft__peft_scheme": "lora", "model__peft__lora_tuning__adapter_dim": 4}
STEPS = 3
ABSOLUTE = re.compile(r"(?<![\w:/.])/\w[\w.-]*/")
"""A path from the root of the file system; not the inside of an address or of a relative path."""


def labels_of(file: Path) -> list[bool]:
    return [json.loads(line)["label"] for line in file.read_text().splitlines()]


def export_on_rank(cases: list[tuple[Path, Path, bool]]) -> None:
    """Export checkpoints as the command does: (checkpoint, folder, whether adapters are merged)."""
    import torch.distributed as dist

    from nemo_kto.commands.export import export_checkpoint

    dist.destroy_process_group()
    for checkpoint, folder, merge in cases:
        export_checkpoint(checkpoint, folder, merge=merge)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of two runs: `whole` of words, and `adapter` on the quickstart's chat model."""
    folder = tmp_path_factory.mktemp("cards")
    make_model_folder(folder / "hf")
    for name, number, labels in (
        ("first.jsonl", 21, [True, True, False]),
        ("second.jsonl", 12, [False, True, False, False]),
        ("held_out.jsonl", 9, [True, False]),
    ):
        write_feedback(folder / name, number=number, seed=number, labels=labels)
    lines = (QUICKSTART / "data" / "train.jsonl").read_text().splitlines()
    (folder / "chat.jsonl").write_text("\n".join(lines[:16]) + "\n")
    return folder


@pytest.fixture(scope="module")
def whole(root: Path, run_ranks: Callable[..., Any]) -> Path:
    """Return the log folder of a run of a whole model without a chat template, with validation."""
    changes = {
        "exp_manager__name": "polite",
        "model__data__data_prefix__train": [str(root / "first.jsonl"), str(root / "second.jsonl")],
        "model__data__data_prefix__validation": str(root / "held_out.jsonl"),
    }
    return trained(root, root / "whole", run_ranks, changes)


@pytest.fixture(scope="module")
def adapter(root: Path, run_ranks: Callable[..., Any]) -> Path:
    """Return the log folder of a run of an adapter for a model with a chat template, without validation."""
    changes = {
        **LORA,
        "pretrained_checkpoint__restore_from_path": str(QUICKSTART / "model"),
        "model__data__data_prefix__train": str(root / "chat.jsonl"),
    }
    return trained(root, root / "adapter", run_ranks, changes)


def trained(root: Path, log_dir: Path, run_ranks: Callable[..., Any], changes: dict[str, Any]) -> Path:
    kept = {"exp_manager__create_checkpoint_callback": True, "export__enabled": True, "trainer__kto__max_steps": STEPS}
    run_ranks(train_on_rank, 1, free_port(), settings(root, log_dir, **kept, **changes))
    return log_dir


def newest(log_dir: Path) -> Path:
    (checkpoint,) = (log_dir / "checkpoints").glob("*-last")
    return checkpoint


@pytest.fixture(scope="module")
def exported(root: Path, whole: Path, adapter: Path, run_ranks: Callable[..., Any]) -> dict[str, Path]:
    """Return every kind of exported folder: those of the runs, and of their checkpoints."""
    cases = {
        "whole checkpoint": (newest(whole), False),
        "adapter checkpoint": (newest(adapter), False),
        "merged checkpoint": (newest(adapter), True),
    }
    folders = {name: root / name.replace(" ", "_") for name in cases}
    run_ranks(export_on_rank, 1, [(place, folders[name], merge) for name, (place, merge) in cases.items()])
    return {"whole": whole / "hf", "adapter": adapter / "hf", **folders}


EVERY = ["whole", "whole checkpoint", "adapter", "adapter checkpoint", "merged checkpoint"]
KINDS = {name: "peft" if name.startswith("adapter") else "transformers" for name in EVERY}


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def table(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading, without its first two lines."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.mark.parametrize("kind", EVERY)
def test_every_folder_has_a_card(exported: dict[str, Path], root: Path, kind: str) -> None:
    text = card_of(exported[kind])
    _, front, body = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["library_name"] == KINDS[kind] and fields["pipeline_tag"] == "text-generation"
    assert {"kto", "nemo_kto"} <= set(fields["tags"]) and ("lora" in fields["tags"]) == (KINDS[kind] == "peft")
    assert fields.get("base_model") == ("model" if KINDS[kind] == "peft" else None)
    assert f"* Steps: {STEPS}, of 8 samples each" in body
    assert f"* Base model: `{'hf' if kind.startswith('whole') else 'model'}`" in body
    assert str(root) not in text and str(QUICKSTART) not in text and not ABSOLUTE.findall(text)


def test_a_checkpoints_card_is_the_runs(exported: dict[str, Path]) -> None:
    for kind in ("whole", "adapter"):
        assert card_of(exported[f"{kind} checkpoint"]) == card_of(exported[kind])


def test_the_numbers_of_the_data(exported: dict[str, Path], root: Path) -> None:
    """21 records of which every third has thumbs down, 12 of which every fourth has thumbs up, 9 in turns."""
    expected = [
        ["train", "33", "17", "16", "first.jsonl`, `second.jsonl"],
        ["validation", "9", "5", "4", "held_out.jsonl"],
    ]
    assert table(card_of(exported["whole"]), "Data") == expected
    labels = labels_of(root / "chat.jsonl")
    counts = [str(number) for number in (16, labels.count(True), labels.count(False))]
    assert table(card_of(exported["adapter"]), "Data") == [["train", *counts, "chat.jsonl"]]


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_metrics_are_the_last_that_were_logged(
    exported: dict[str, Path], whole: Path, adapter: Path, kind: str
) -> None:
    rows = dict(table(card_of(exported[kind]), "Last metrics"))
    assert {"train/loss", "train/rewards/margins", "train/rewards/accuracies"} <= set(rows)
    assert ("val/loss" in rows) == ("val/rewards/margins" in rows) == (kind == "whole")
    logged = read_series(whole if kind == "whole" else adapter)
    for name, text in rows.items():
        assert max(logged[name]) == STEPS - 1
        assert float(text) == pytest.approx(logged[name][STEPS - 1], rel=1e-3), name


def test_the_settings_of_the_run(exported: dict[str, Path]) -> None:
    rows = dict(table(card_of(exported["whole"]), "Settings"))
    assert rows["model.kto.ref_policy_kl_penalty"] == "0.5" and rows["model.optim.lr"] == "0.001"
    assert rows["model.global_batch_size"] == "8" and not any("lora" in key for key in rows)
    assert "[KTO](https://arxiv.org/abs/2402.01306)" in card_of(exported["whole"])
    assert card_of(exported["whole"]).split("---\n", 2)[2].startswith("\n# polite\n")
    rows = dict(table(card_of(exported["adapter"]), "Settings"))
    assert rows["model.peft.peft_scheme"] == "lora" and rows["model.peft.lora_tuning.adapter_dim"] == "4"


@pytest.mark.parametrize("kind", ["whole", "adapter", "merged checkpoint"])
def test_the_example_runs(exported: dict[str, Path], capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """For a model without a chat template, and as an adapter and a whole model with one."""
    text = card_of(exported[kind])
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert ("apply_chat_template" in code) == (kind != "whole")
    assert code.count("path/to/this/folder") == 2
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(exported[kind])), names)
    assert capsys.readouterr().out.strip()
    start, answer = names["inputs"]["input_ids"], names["answer"]
    assert answer.shape[1] > start.shape[1] and bool((answer[:, : start.shape[1]] == start).all())


# without a card


def test_nothing_is_known_of_older_checkpoints(
    whole: Path, exported: dict[str, Path], tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    """The rest is exported as ever."""
    bare = Path(shutil.copytree(newest(whole), tmp_path / newest(whole).name))
    (bare / "hf" / FACTS_FILE).unlink()
    (bare / MANIFEST_FILE).unlink()  # of which older ones had none
    run_ranks(export_on_rank, 1, [(bare, tmp_path / "bare", False)])
    expected = {file.name: file.read_bytes() for file in exported["whole"].iterdir() if file.name != "README.md"}
    assert {file.name: file.read_bytes() for file in (tmp_path / "bare").iterdir()} == expected


def test_no_facts_no_card() -> None:
    assert model_card({}, {}, step=1, adapter=False) is None


def test_transformers_neither_reads_nor_writes_it(exported: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported["whole"])
    tokenizer = AutoTokenizer.from_pretrained(exported["whole"])
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("mine")
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


class Rendered(HTMLParser):
    """What a card looks like: the cells of its tables, its headings, and which tags it consists of."""

    def __init__(self, card: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {"h1": [], "li": [], "p": []}
        self.tags: set[str] = set()
        self._into: list[str] = []
        # GitHub's and the hub's Markdown: tables, and HTML that is not escaped passes
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2]))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._into = self.rows[-1]
            self._into.append("")
        elif tag in self.texts:
            self._into = self.texts[tag]
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", *self.texts):
            self._into = []

    def handle_data(self, data: str) -> None:
        if self._into:
            self._into[-1] += data


NAMES = [
    "a|b.jsonl",
    "<img src=x onerror=alert(1)>.jsonl",
    "`code` and ``more``.jsonl",
    "`",
    "$a$ *b* _c_ [d](e) ~f~ #g &lt; \\|.jsonl",
    "日本語\u3000😀.jsonl",
]


@pytest.mark.parametrize("name", [*NAMES, "two\nlines\r\x1b[31m.jsonl", "no text \udcff.jsonl"])
def test_names_are_shown_as_they_are(whole: Path, name: str) -> None:
    """Wherever they stand; signs that cannot be shown are written as Python writes them."""
    facts = json.loads((whole / FACTS_FILE).read_text(encoding="utf-8"))
    facts["name"] = name
    facts["data"]["train"]["sources"] = [{"path": f"/data/{name}"}, {"path": "/data/other.jsonl"}]
    facts["config"]["pretrained_checkpoint"]["restore_from_path"] = f"/models/{name}"
    facts["config"]["model"]["kto"]["loss"] = name
    facts["versions"] = {"torch": name}
    shown = name.replace("\n", "\\n").replace("\r", "\\r").replace("\x1b", "\\x1b").replace("\udcff", "\\udcff")
    for adapter in (False, True):
        card = model_card(facts, {"train/loss": 0.5}, step=3, adapter=adapter)
        assert card is not None
        card.encode("utf-8")
        page = Rendered(card)
        assert page.texts["h1"] == [shown]
        assert page.texts["li"][0] == f"Base model: {shown}"
        assert next(row for row in page.rows if row[0] == "train")[-1] == f"{shown}, other.jsonl"
        assert ["model.kto.loss", shown] in page.rows
        assert any(text.endswith(f"by KTO with the loss {shown}.") for text in page.texts["p"])
        assert f"Versions: torch {shown}" in page.texts["p"]
        tags = {"h1", "h2", "p", "ul", "li", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"}
        assert page.tags == tags
        assert {len(row) for row in page.rows} == {2, 5}
        header = yaml.safe_load(card.split("---\n")[1])
        assert header.get("base_model") == (shown if adapter else None)
