"""The page that a real run leaves behind, and the warnings it has been given."""

from __future__ import annotations

import html
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.distributed_harness import free_port, heard
from tests.integration.assets import make_model_folder, read_series, settings, train_on_rank, write_feedback

QUICKSTART = Path(__file__).parents[2] / "examples" / "nlp" / "kto" / "quickstart"
REPORTED = {
    "report__enabled": True,
    "generation__num_prompts": 2,
    "generation__max_new_tokens": 4,
    "trainer__kto__max_steps": 4,
    "trainer__kto__val_check_interval": 2,
    "exp_manager__create_checkpoint_callback": True,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_model_folder(tmp_path / "hf")
    write_feedback(tmp_path / "train.jsonl", number=40, seed=5)
    write_feedback(tmp_path / "validation.jsonl", number=11, seed=6)
    return tmp_path


def page_of(log_dir: Path) -> str:
    return (log_dir / "report" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(
            {"model__kto__humanline_clamp": [-1.0, 1.5], "model__kto__sft_loss_weight": 0.1}, marks=pytest.mark.slow
        ),
        pytest.param({"model__kto__loss": "bco"}, marks=pytest.mark.slow),
    ],
)
def test_every_series_of_a_resumed_run_is_on_its_page(
    root: Path, run_ranks: Callable[..., Any], objective: dict[str, Any]
) -> None:
    """Two ranks, four steps, then two more."""
    log_dir = root / "log"
    changes = {
        **REPORTED,
        **objective,
        "model__data__data_prefix__validation": str(root / "validation.jsonl"),
        "model__tensor_model_parallel_size": 2,
    }
    for steps in (4, 6):
        values = settings(root, log_dir, **{**changes, "trainer__kto__max_steps": steps})
        run_ranks(train_on_rank, 2, free_port(), values)
    page, series = page_of(log_dir), read_series(log_dir)
    expected = "delta" if "model__kto__loss" in objective else "unclamped"
    assert {f"train/{expected}", f"val/{expected}", "train/lr", "val/rewards/margins"} <= set(series)
    for name, values in series.items():
        assert html.escape(name) in page, name
        assert set(values) == set(range(6)) if name.startswith("train/") else {1, 3, 5} <= set(values), name
    answers = [json.loads(line) for line in (log_dir / "generations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in answers][-2:] == [6, 6]
    for line in answers[-2:]:
        assert all(html.escape(line[who]) in page for who in ("prompt", "policy", "reference"))
    for fact in ("train.jsonl", "validation.jsonl", "model.optim.eps", "megatron-core"):
        assert fact in page, fact


def test_the_page_of_the_quickstart(tmp_path: Path, run_ranks: Callable[..., Any], monkeypatch: Any) -> None:
    """Four steps of it, by its own command line."""
    monkeypatch.syspath_prepend(str(QUICKSTART))
    spec = importlib.util.spec_from_file_location("quickstart_run", QUICKSTART / "run.py")
    assert spec is not None and spec.loader is not None
    quickstart = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart_run", quickstart)
    spec.loader.exec_module(quickstart)
    monkeypatch.chdir(QUICKSTART.parents[3])
    command = quickstart.command_of(tmp_path, "model.tensor_model_parallel_size=2")
    overrides = {key: value for key, _, value in (word.partition("=") for word in command[2:])}
    overrides |= {"trainer.kto.max_steps": "4", "trainer.kto.val_check_interval": "2"}
    parsed = {key: OmegaConf.create(f"value: {value}").value for key, value in overrides.items()}
    run_ranks(train_on_rank, 2, free_port(), parsed)
    page, series = page_of(tmp_path), read_series(tmp_path)
    assert len(series) > 20
    for name in series:
        assert html.escape(name) in page, name
    for part in ("After 4 steps", "capital of Uganda", "2,400", "train.jsonl"):
        assert part in page, part


def test_a_report_that_cannot_be_written_does_not_fail_a_run(root: Path, run_ranks: Callable[..., Any]) -> None:
    (root / "log").mkdir()
    (root / "log" / "report").write_text("in the way")
    run_ranks(train_on_rank, 1, free_port(), settings(root, root / "log", **{**REPORTED, "export__enabled": True}))
    assert (root / "log" / "hf" / "model.safetensors").is_file()


def warnings_of(port: int, overrides: dict[str, Any]) -> list[str]:
    """Return what the run's model warns of on this rank."""
    found = heard(logger="nemo_kto.kto.megatron_gpt_kto_model")
    train_on_rank(port, overrides)
    return found


def test_a_run_that_learns_nothing_is_told_so_once(root: Path, run_ranks: Callable[..., Any]) -> None:
    changes = {
        "trainer__kto__max_steps": 60,
        "model__optim__lr": 1e-9,
        "model__optim__sched__min_lr": 0.0,
        "model__optim__sched__name": "Constant",
    }
    found = run_ranks(warnings_of, 2, free_port(), settings(root, root / "log", **changes))
    assert len(found[0]) == 2 and found[1] == []  # rank 0 speaks
    assert any("KL estimate stays at zero" in text for text in found[0])
    assert any("loss is stuck at its start" in text and "model.optim.lr" in text for text in found[0])
