"""How Hydra composes a configuration, on the command line and from Python."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from nemo_kto.config.compose import load_config, run_configured
from nemo_kto.config.overrides import readable
from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError


@pytest.mark.parametrize(
    ("argument", "forced"),
    [
        ("model.seed=1", "++model.seed=1"),
        ("+model.seed=1", "++model.seed=1"),
        ("++model.micro_batch_size=2", "++model.micro_batch_size=2"),
        ("~model.optim", "~model.optim"),
        ("hydra.job.name=x", "hydra.job.name=x"),
        ("--help", "--help"),
    ],
)
def test_overrides_are_forced_past_hydra(argument: str, forced: str) -> None:
    assert readable(argument) == forced


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Hydra gives the process's root logger a level and a handler, which other tests are not to have."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), {}
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger):
            disabled[name] = logger.disabled
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    for name, was in disabled.items():
        logging.getLogger(name).disabled = was


@pytest.mark.usefixtures("own_logging")
def test_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's own options are there, nothing is written into the current folder, and the command stays as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["somewhere/it's (1)=mine.py", "untouched"])
    (tmp_path / "mine.yaml").write_text("model:\n  seed: ${multiply:2,${sum:1,2}}\n  global_batch_size: 8\n")
    found: list[tuple[KTOConfig, str]] = []

    def note(config: KTOConfig) -> None:
        assert sys.argv == ["somewhere/it's (1)=mine.py", "untouched"]
        found.append((config, HydraConfig.get().job.name))

    run_configured(note, ["model.optim.lr=1e-5", "model.global_batch_size=32"])
    run_configured(note, [f"--config-path={tmp_path}", "--config-name=mine", "hydra.job.name=other"])
    (first, name), (second, other) = found
    assert (first.model.optim.lr, first.model.global_batch_size, name) == (1e-5, 32, "it's (1)=mine")
    assert (second.model.seed, second.model.global_batch_size, other) == (6, 8, "other")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_values_from_python_need_no_quotes() -> None:
    files = ["data/a=b, c(1) #2.jsonl", "it's {mine}", "${HOME}"]
    given = {"model.data.data_prefix.train": (Path(files[0]), *files[1:]), "export.folder": Path("x")}
    assert load_config(given).export.folder == "x"
    config = load_config({**given, "trainer.callbacks": [{"_target_": "a.B", "n": 1}]})
    assert config.model.data.data_prefix.train == files
    assert config.trainer.callbacks == [{"_target_": "a.B", "n": 1}]
    assert load_config({"model.peft": {"peft_scheme": "none"}}).model.peft.lora_tuning.adapter_dim == 32
    assert load_config().model == KTOConfig().model


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.micro_batch_sise": 4}, "Did you mean model.micro_batch_size?"),
        ({"model.optim": 3}, "model.optim is a section"),
        ({"model.optim.lr": "fast"}, "It takes a number"),
        (["model.optim.lr"], "is no override"),
        ("model.optim.lr=1", "Write ['model.optim.lr=1']"),
        ({3: 4}, "Unknown configuration key 3"),
        ({"model.seed": object()}, "It takes an integer"),
        (["model.optim.lr=a=b(c"], "cannot be read"),
        ({"exp_manager.name": "a/{b}"}, "braces, slashes"),
    ],
)
def test_what_python_is_told_is_checked(overrides: object, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(overrides)  # type: ignore[arg-type]


BROKEN = {
    "indent.yaml": (b"model:\n  seed: 1\n bad: 2\n", 3, 2),
    "tab.yaml": (b"model:\n\tseed: 1\n", 2, 1),
    "twice.yaml": (b"model:\n  seed: 1\n  seed: 2\n", 3, 3),
    "open.yaml": (b"model:\n  seed: [1, 2\n", 3, 1),
    "alias.yaml": (b"model:\n  seed: *x\n", 2, 9),
    "code.yaml": (b"model:\n  seed: !!python/object/apply:os.getpid []\n", 2, 9),
    "latin.yaml": ("model:\n  # grün\n".encode("latin-1"), 2, 7),
    "binary.yaml": ("model:\n  # ü \0\n".encode(), 2, 7),
}
"""File -> what is in it, and the line and column where it breaks."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_yaml(tmp_path: Path, name: str) -> None:
    """It is named by another one, every second time."""
    content, line, column = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "mine.yaml").write_text(f"defaults:\n  - {Path(name).stem}\n")
    program = "import sys; from nemo_kto.config.compose import run_configured; run_configured(print, sys.argv[1:])"
    config = "mine" if len(name) % 2 else Path(name).stem
    arguments = [f"--config-path={tmp_path}", f"--config-name={config}"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"error: {tmp_path / name}, line {line}, column {column}: this cannot be read as YAML: ")
