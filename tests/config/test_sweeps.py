"""Several runs from one command: which folder each has, and what is written where."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nemo_kto.config.compose import run_configured
from nemo_kto.config.sweeps import keys_of_all
from tests.config.test_compose import own_logging

__all__ = ["own_logging"]

pytestmark = pytest.mark.usefixtures("own_logging")

SWEEP = Path(__file__).resolve().parents[2] / "examples" / "nlp" / "kto" / "slurm"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, float, str]]]:
    """Run a command line in an empty folder; return (log folder within it, lr, current folder) of each run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("PYTHONPATH", "")

    def run(*arguments: str) -> list[tuple[str, float, str]]:
        found: list[tuple[str, float, str]] = []

        def note(config: object) -> None:
            manager, optim = config.exp_manager, config.model.optim  # type: ignore[attr-defined]
            folder = manager.explicit_log_dir or f"{manager.exp_dir}/{manager.name}"
            found.append((os.path.relpath(folder, tmp_path), optim.lr, os.path.relpath(os.getcwd(), tmp_path)))

        run_configured(note, ["model.optim.sched.min_lr=0", *arguments])
        return found

    return run


def test_each_has_a_folder_named_after_what_is_its_own(folders: Callable[..., list], tmp_path: Path) -> None:
    found = folders("-m", "model.optim.lr=1e-6,2e-6", "model.seed=1,2", "exp_manager.explicit_log_dir=mine")
    assert found == [
        ("mine/lr=1e-06,seed=1", 1e-6, "."),
        ("mine/lr=1e-06,seed=2", 1e-6, "."),
        ("mine/lr=2e-06,seed=1", 2e-6, "."),
        ("mine/lr=2e-06,seed=2", 2e-6, "."),
    ]
    # what Hydra notes of them is where they are, and nowhere else
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [
        "mine/multirun.yaml"
    ]


def test_keys_with_the_same_end(folders: Callable[..., list]) -> None:
    found = folders(
        "-m", "model.optim.lr=1e-6", "model.data.shuffle=batches,false", "model.kto.reference.cache_dir=null"
    )
    assert [folder for folder, _, _ in found] == [
        "results/megatron_gpt/shuffle=batches",
        "results/megatron_gpt/shuffle=false",
    ]


def test_folders_of_ones_own_are_kept(folders: Callable[..., list]) -> None:
    found = folders("-m", "exp_manager.explicit_log_dir=a,b", "model.seed=3")
    assert [folder for folder, _, _ in found] == ["a", "b"]
    found = folders("-m", "exp_manager.name=a,b", "exp_manager.exp_dir=of_both")
    assert [folder for folder, _, _ in found] == ["of_both/a", "of_both/b"]


def test_values_that_are_no_names(folders: Callable[..., list]) -> None:
    """Different ones stay different, whatever becomes of their letters."""
    files = ["/data/a b.jsonl", "/data/a_b.jsonl", "/data/" + 300 * "x", "/data/" + 300 * "x" + "y"]
    found = folders("-m", f"model.data.data_prefix.train={','.join(map(repr, files))}")
    names = [Path(folder).name for folder, _, _ in found]
    assert len(set(names)) == 4 and all(len(name) < 150 and "/" not in name for name in names)


def test_one_run_is_no_sweep(folders: Callable[..., list]) -> None:
    assert folders("model.optim.lr=2e-6", "exp_manager.explicit_log_dir=mine") == [("mine", 2e-6, ".")]


def test_which_keys_are_of_all() -> None:
    found = keys_of_all(["-m", "++model.seed=1,2", "++model.optim.lr=1e-6", "--config-name=x", "++a.b='c,d'"])
    assert found == {"model.optim.lr", "a.b"}


def test_the_example(folders: Callable[..., list], tmp_path: Path) -> None:
    """Hydra's own launcher takes the place of submitit's, which may not be installed."""
    local = yaml.safe_load((SWEEP / "sweep.yaml").read_text().replace("submitit_slurm", "basic"))
    del local["hydra"]["launcher"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(local))
    found = folders("-m", f"--config-dir={tmp_path}", "--config-name=sweep", "exp_manager.explicit_log_dir=mine")
    assert sorted(found) == sorted(
        (f"mine/lr={lr},ref_policy_kl_penalty={beta}", float(lr), ".")
        for lr in ("5e-07", "1e-06")
        for beta in ("0.05", "0.1")
    )
