"""What is judged before torch is imported: the sentences of the checks that come later, and only what is certain."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_kto.commands.train import train
from nemo_kto.config.compose import parse_config
from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import CheckpointError, ConfigError, DataError, KTOError
from nemo_kto.runs.early import check_early

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "nlp" / "kto" / "quickstart"
SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def config(log_dir: Path, **changes: Any) -> KTOConfig:
    """Return a configuration with nothing wrong, but for `changes`, which use `__` for dots."""
    values: dict[str, Any] = {
        "pretrained_checkpoint.restore_from_path": str(QUICKSTART / "model"),
        "exp_manager.explicit_log_dir": str(log_dir),
        "model.data.data_prefix.train": str(QUICKSTART / "data" / "train.jsonl"),
    }
    return parse_config(values | {key.replace("__", "."): value for key, value in changes.items()})


def checkpoint(folder: Path, name: str = "megatron_gpt-step=3-last") -> Path:
    (folder / name).mkdir(parents=True)
    for part in ("metadata.json", ".metadata", "common.pt"):
        (folder / name / part).touch()
    return folder / name


@pytest.mark.parametrize("command", ["train", "cache_reference"])
def test_nothing_is_wrong(tmp_path: Path, command: str) -> None:
    check_early(config(tmp_path / "log"), command)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model__tensor_model_parallel_size": 3, "trainer__devices": 3}, ConfigError, "4 attention heads cannot be"),
        ({"trainer__devices": 2, "model__pipeline_model_parallel_size": 4}, ConfigError, "2 processes"),
        ({"trainer__devices": 5}, ConfigError, "model.global_batch_size=64 cannot be divided by 5"),
        ({"model__micro_batch_size": 3}, ConfigError, "model.micro_batch_size=3 does not divide"),
        ({"model__expert_model_parallel_size": 2}, ConfigError, "this model is dense"),
        ({"model__data__data_prefix__train": "none.jsonl"}, DataError, "train data: none.jsonl: no such file."),
        ({"model__data__data_prefix__validation": "*.none"}, DataError, r"validation data: \*.none: no file has"),
        ({"model__data__data_prefix__train": None}, ConfigError, "There is no training data."),
        ({"model__data__data_prefix__train": {"path": "x", "wait": 1}}, ConfigError, "'wait' is unknown"),
        ({"model__tokenizer__path": "nowhere"}, ConfigError, "nowhere: no such folder"),
        ({"model__tokenizer__path": str(QUICKSTART / "data")}, ConfigError, "the folder has no tokenizer"),
        ({"model__kto__reference__checkpoint": "nowhere"}, CheckpointError, "reference.checkpoint=nowhere is not a"),
        (
            {"model__peft__peft_scheme": "lora", "model__peft__lora_tuning__restore_from_path": "nowhere"},
            CheckpointError,
            "restore_from_path=nowhere is not a folder",
        ),
    ],
)
def test_what_is_wrong(tmp_path: Path, changes: dict[str, Any], kind: type[KTOError], message: str) -> None:
    with pytest.raises(kind, match=message):
        check_early(config(tmp_path / "log", **changes), "train")


def test_layout_of_a_model_with_random_weights(tmp_path: Path) -> None:
    changes = {f"model__{name}": value for name, value in SIZES.items()}
    changes |= {"pretrained_checkpoint__restore_from_path": None, "model__tokenizer__path": str(QUICKSTART / "model")}
    check_early(config(tmp_path / "log", **changes), "train")
    changes |= {"trainer__devices": 3, "model__pipeline_model_parallel_size": 3}
    with pytest.raises(ConfigError, match="4 layers cannot be divided evenly"):
        check_early(config(tmp_path / "log", **changes), "train")


def test_processes_that_only_the_devices_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"trainer__devices": "auto", "model__tensor_model_parallel_size": 3}
    check_early(config(tmp_path / "log", **changes), "train")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="4 attention heads"):
        check_early(config(tmp_path / "log", **changes), "train")


def test_folder_that_the_model_would_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    values = config(tmp_path / "log", export__folder=str(tmp_path / "export"))
    check_early(values, "train")
    (tmp_path / "export" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="which is not empty"):
        check_early(values, "train")
    check_early(values, "cache_reference")  # which writes no model
    checkpoint(tmp_path / "log" / "checkpoints")
    check_early(values, "train")  # the run may be over, and that its model


def test_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    needed = config(tmp_path / "log", exp_manager__resume_ignore_no_checkpoint=False)
    refused = config(tmp_path / "log", exp_manager__resume_if_exists=False)
    with pytest.raises(ConfigError, match="holds no finished checkpoint"):
        check_early(needed, "train")
    check_early(refused, "train")
    checkpoint(tmp_path / "log" / "checkpoints")
    check_early(needed, "train")
    with pytest.raises(ConfigError, match="holds the checkpoints of another run"):
        check_early(refused, "train")


def test_evaluation(tmp_path: Path) -> None:
    validation = {"model__data__data_prefix__validation": str(QUICKSTART / "data" / "validation.jsonl")}
    values = config(tmp_path / "log", **validation, model__data__data_prefix__train="none.jsonl")
    with pytest.raises(ConfigError, match="There is nothing to evaluate"):
        check_early(values, "evaluate")
    values.evaluation.checkpoint = str(tmp_path / "other" / "step=3-last")
    with pytest.raises(CheckpointError, match="is not a finished checkpoint"):
        check_early(values, "evaluate")
    checkpoint(tmp_path / "other", "step=3-last")
    check_early(values, "evaluate")  # nothing depends on training data, so it need not be there
    with pytest.raises(ConfigError, match="There is no held-out data"):
        without = config(tmp_path / "log", evaluation__checkpoint=values.evaluation.checkpoint)
        check_early(without, "evaluate")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that nothing can be written into, for root neither."""
    folder = tmp_path / "read only"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("root may write everywhere, and no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("command", "key", "below"),
    [
        ("train", "exp_manager.explicit_log_dir", "log"),
        ("cache_reference", "exp_manager.explicit_log_dir", "log"),
        ("train", "model.data.cache_dir", "tokens"),
        ("train", "export.folder", "hf"),
        ("evaluate", "evaluation.output", "found.json"),
    ],
)
def test_folders_are_tried_before_data_is_looked_for(
    read_only: Path, tmp_path: Path, command: str, key: str, below: str
) -> None:
    """There is no data either; and nothing is left behind of the others, which are tried as well."""
    missing = {
        "model__data__data_prefix__train": "none.jsonl",
        "model__data__data_prefix__validation": "none.jsonl",
        "model__kto__reference__checkpoint": str(QUICKSTART / "model"),
    }
    changes = {**missing, key.replace(".", "__"): str(read_only / below)}
    with pytest.raises(ConfigError) as caught:
        check_early(config(tmp_path / "log", **changes), command)
    text = str(caught.value)
    assert "cannot be written: " in text and text.endswith(f"Mend that, or name another place in {key}.")
    assert ("this user may not write there" if os.geteuid() else "its file system is read-only") in text
    assert [path.name for path in tmp_path.iterdir()] == ["read only"]


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="a part of its path is a file. Mend that, or name another place in exp_man"):
        check_early(config(tmp_path / "file" / "log"), "train")


def test_training_tries_them_too(tmp_path: Path) -> None:
    """It may be called from Python, without any command."""
    (tmp_path / "file").touch()
    missing = config(tmp_path / "file" / "log", model__data__data_prefix__train="none.jsonl")
    with pytest.raises(ConfigError, match="cannot be written: a part of its path is a file"):
        train(missing)
