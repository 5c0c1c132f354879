"""Runs on data as people have it are the runs on the same data written out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.assets import WORDS, read_series

STEPS = {"trainer__kto__max_steps": 4}


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, *lines: dict[str, Any] | str) -> str:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(file)


@pytest.fixture(scope="module")
def plain(root: Path, train: Callable[..., Path]) -> dict[str, dict[int, float]]:
    return read_series(train(1, **STEPS))


def test_the_same_records_from_another_file(
    root: Path, train: Callable[..., Path], plain: dict[str, dict[int, float]], tmp_path: Path
) -> None:
    """Of other columns and another kind, with broken records between: nothing changes, and they are listed."""
    table = [
        {"question": row["prompt"], "answer": row["completion"], "stars": 5 if row["label"] else 2}
        for row in rows(root / "train.jsonl")
    ]
    table.insert(3, {"question": "red", "answer": "", "stars": 5})
    table.append({"question": "red", "answer": " green", "stars": None})
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "train.parquet")
    log_dir = train(
        2,
        **STEPS,
        model__tensor_model_parallel_size=2,
        model__data__data_prefix__train=str(tmp_path / "train.parquet"),
        model__data__fields={"prompt": "question", "response": "answer", "label": "stars"},
        model__data__desirable_if=">= 4",
        model__data__on_bad_record="skip",
    )
    found = read_series(log_dir)
    assert found["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-5)
    assert found["train/logps/chosen"] == pytest.approx(plain["train/logps/chosen"], rel=1e-5)
    bad = rows(log_dir / "bad_records.jsonl")
    assert [(record["line"], record["field"]) for record in bad] == [(4, "answer"), (42, "stars")]


def test_automatic_weights_are_those_worked_out_by_hand(
    root: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    """40 records with 10 thumbs up: the weight of those is 30 / 10."""
    uneven = [{**row, "label": i % 4 == 0} for i, row in enumerate(rows(root / "train.jsonl"))]
    path = write(tmp_path / "uneven.jsonl", *uneven)
    changes = {**STEPS, "model__data__data_prefix__train": path}
    automatic = train(
        1, **changes, model__kto__desirable_loss_weight="auto", model__kto__undesirable_loss_weight="auto"
    )
    by_hand = train(1, **changes, model__kto__desirable_loss_weight=3.0)
    assert read_series(automatic)["train/loss"] == read_series(by_hand)["train/loss"]


def test_a_validation_fraction_is_validated_on(root: Path, train: Callable[..., Path], tmp_path: Path) -> None:
    """50 prompts with two answers each; a fifth is validated on."""
    pairs = [
        {"prompt": f"{one} {other}", "chosen": " sea", "rejected": " tree"}
        for one in WORDS[:10]
        for other in WORDS[:5]
    ]
    path = write(tmp_path / "pairs.jsonl", *pairs)
    log_dir = train(1, **STEPS, model__data__data_prefix__train=path, model__data__validation_fraction=0.2)
    found = read_series(log_dir)
    assert len(found["train/loss"]) == len(found["val/loss"]) == 4  # a tenth of an epoch is one step
    assert found["val/loss"][0] != found["train/loss"][0]


def test_tokens_are_shared_between_runs(
    root: Path, train: Callable[..., Path], plain: dict[str, dict[int, float]], tmp_path: Path
) -> None:
    first = train(1, **STEPS, model__data__cache_dir=str(tmp_path / "tokens"))
    (made,) = tmp_path.glob("tokens/*/tokens.bin")
    changed = made.stat().st_mtime_ns
    # two ranks at once, another length: what is dropped is not a matter of the tokens
    second = train(2, **STEPS, model__data__cache_dir=str(tmp_path / "tokens"), model__data__seq_length=32)
    assert list(tmp_path.glob("tokens/*/tokens.bin")) == [made] and made.stat().st_mtime_ns == changed
    assert read_series(first)["train/loss"] == plain["train/loss"]
    assert read_series(second)["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-5)
    assert not (first / "tokens").exists()
