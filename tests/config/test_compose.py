"""How Hydra composes a configuration, on the command line and from Python."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from nemo_kto.config.compose import _forced, load_config, run_configured
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
    assert _forced(argument) == forced


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
        (["model.optim.lr"], "cannot be read"),
        ("model.optim.lr=1", "Write ['model.optim.lr=1']"),
        ({3: 4}, "Unknown configuration key 3"),
        ({"model.seed": object()}, "It takes an integer"),
        (["model.data.format=a=b(c"], "cannot be read"),
    ],
)
def test_what_python_is_told_is_checked(overrides: object, said: str) -> None:
    with pytest.raises(ConfigError, match="") as caught:
        load_config(overrides)  # type: ignore[arg-type]
    assert said in str(caught.value)
