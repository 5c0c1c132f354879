"""What a command has imported when it gives its answer: an error costs no heavy package, a look at data no torch."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from nemo_kto import cli
from nemo_kto.commands import data as data_commands
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import parse_source
from nemo_kto.data.tokens.cache import TokenCache
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.tokenization import Encoder
from nemo_kto.data.tokens.tokenizer import import_without_torch, load_tokenizer
from nemo_kto.runs.records import image_tokens
from tests.data.tiny_processors import picture_record, png, write_folder
from tests.waiting import HANG

KTO = Path(__file__).resolve().parents[2] / "examples" / "nlp" / "kto"
MODEL = KTO / "quickstart" / "model"
DATA = KTO / "quickstart" / "data" / "train.jsonl"
COMMAND = Path(sys.executable).with_name("nemo-kto")

TRAINING = {"torch", "megatron", "nemo", "lightning"}
HEAVY = TRAINING | {"transformers", "datasets", "tensorboard", "matplotlib", "pandas"}

LOADED_MODULES = Path(__file__).with_name("loaded_modules.py")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, str, str, set[str]]]:
    """Run a script in a process of its own; return its exit code, stdout, stderr and the packages it has loaded."""

    def run(*arguments: str | Path) -> tuple[int, str, str, set[str]]:
        loaded = tmp_path / "loaded.txt"
        launched = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
        environment = {name: value for name, value in os.environ.items() if name not in launched}
        done = subprocess.run(
            [sys.executable, LOADED_MODULES, *map(str, arguments)],
            env=environment | {"LOADED": str(loaded)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG,
        )
        return (
            done.returncode,
            done.stdout,
            done.stderr,
            {name.partition(".")[0] for name in loaded.read_text().split()},
        )

    return run


GOOD = {
    "pretrained_checkpoint.restore_from_path": MODEL,
    "model.data.data_prefix.train": DATA,
    "exp_manager.explicit_log_dir": "log",
}


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        (
            "train_gpt_kto.py",
            {"model.micro_batch_sise": 4},
            "Unknown configuration key model.micro_batch_sise. Did you mean model.micro_batch_size?",
        ),
        (
            "train_gpt_kto.py",
            {"trainer.devices": 3, "model.tensor_model_parallel_size": 3},
            "The model's 4 attention heads cannot be divided by model.tensor_model_parallel_size=3. "
            "Choose a tensor-parallel size that divides 4.",
        ),
        (
            "train_gpt_kto.py",
            {"model.data.data_prefix.train": "none.jsonl"},
            "train data: none.jsonl: no such file.",
        ),
        (
            "train_gpt_kto.py",
            {"pretrained_checkpoint.restore_from_path": "nowhere"},
            "pretrained_checkpoint.restore_from_path=nowhere is not a folder.",
        ),
        (
            "train_gpt_kto.py",
            {"export.folder": MODEL},
            f"The aligned model would be written to {MODEL}, which is not empty. Name another folder with "
            "export.folder or exp_manager.explicit_log_dir, or remove it.",
        ),
        (
            "eval_gpt_kto.py",
            {"evaluation.checkpoint": "/nowhere/checkpoint"},
            "evaluation.checkpoint=/nowhere/checkpoint is not a finished checkpoint. Name one of the folders in "
            "<log dir>/checkpoints.",
        ),
    ],
)
def test_error_of_a_script(run: Any, script: str, changes: dict[str, Any], message: str) -> None:
    overrides = [f"{key}={value}" for key, value in {**GOOD, **changes}.items()]
    code, output, errors, loaded = run(KTO / script, *overrides)
    assert (code, output, errors) == (1, "", f"error: {message}\n")
    assert "hydra" in loaded and not loaded & HEAVY


def test_train_says_what_its_script_says(run: Any) -> None:
    overrides = [f"{key}={value}" for key, value in {**GOOD, "model.data.data_prefix.train": "none.jsonl"}.items()]
    code, output, errors, loaded = run(COMMAND, "train", *overrides)
    assert (code, output, errors) == (1, "", "error: train data: none.jsonl: no such file.\n")
    assert "hydra" in loaded and not loaded & HEAVY


def test_error_of_the_command(run: Any) -> None:
    overrides = [f"{key}={value}" for key, value in {**GOOD, "model.data.data_prefix.train": "none.jsonl"}.items()]
    code, _, errors, loaded = run(COMMAND, "cache-reference", *overrides)
    assert (code, errors) == (1, "error: train data: none.jsonl: no such file.\n")
    assert not loaded & HEAVY


def test_help(run: Any) -> None:
    code, output, _, loaded = run(COMMAND, "--help")
    assert code == 0 and "export-hf" in output
    assert not loaded & (HEAVY | {"hydra", "omegaconf", "numpy", "pyarrow", "rich"})


def test_what_explains_keys_and_completes_them(run: Any) -> None:
    code, output, errors, loaded = run(COMMAND, "config", "model.kto")
    assert (code, errors) == (0, "") and "model.kto.reference.mode" in output
    code, output, errors, more = run(COMMAND, "completion", "bash")
    assert (code, errors) == (0, "") and "complete -o bashdefault" in output
    assert not (loaded | more) & (HEAVY | {"hydra", "omegaconf", "numpy", "pyarrow", "rich"})


def test_look_at_data(run: Any, tmp_path: Path) -> None:
    tokenizer = ("--tokenizer", MODEL)
    code, output, errors, loaded = run(COMMAND, "data", "check", DATA, *tokenizer)
    assert (code, errors) == (0, "") and "2,400" in output
    assert "transformers" in loaded and not loaded & (TRAINING | {"datasets", "pandas"})
    code, output, errors, loaded = run(COMMAND, "data", "show", "1", DATA, *tokenizer)
    assert (code, errors) == (0, "") and "<|user|>" in output
    assert not loaded & TRAINING
    code, _, errors, loaded = run(COMMAND, "data", "convert", DATA, "--output", tmp_path / "out.jsonl")
    assert (code, errors) == (0, "")
    assert not loaded & HEAVY


def test_look_at_images(run: Any, tmp_path: Path) -> None:
    """Their processor works without torch, and counts the tokens that training counts."""
    folder = write_folder("qwen2_5_vl", tmp_path / "model")
    image = f"data:image/png;base64,{base64.b64encode(png(30, 20)).decode()}"
    row = {"prompt": "what is the answer", "completion": "yes", "label": True, "images": [image]}
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(row) + "\n")
    arguments = (file, "--tokenizer", folder, "--prompt-template", "chat", "--json")
    code, output, errors, loaded = run(COMMAND, "data", "check", *arguments)
    assert (code, errors) == (0, "") and not loaded & TRAINING
    encoder = Encoder(load_tokenizer(folder), TokenizationSettings(), image_tokens(folder))
    (wanted,) = encoder.encode([picture_record([png(30, 20)])])
    assert json.loads(output)["statistics"]["prompt_tokens"]["max"] == len(wanted.prompt)


def test_report(run: Any, tmp_path: Path) -> None:
    writer = EventFileWriter(str(tmp_path / "log"))
    for step in range(3):
        summary = Summary(value=[Summary.Value(tag="train/loss", simple_value=0.5)])
        writer.add_event(Event(wall_time=step, step=step, summary=summary))
    writer.close()
    code, output, errors, loaded = run(COMMAND, "report", tmp_path / "log")
    assert (code, output, errors) == (0, f"Wrote {tmp_path / 'log' / 'report' / 'report.html'}\n", "")
    assert "matplotlib" in loaded and not loaded & (TRAINING | {"transformers", "datasets", "pandas", "tensorflow"})


def test_tokens_are_those_of_training(run: Any, tmp_path: Path) -> None:
    """transformers renders and tokenises the same where it was told that there is no torch."""
    messages = [{"role": "user", "content": "Hi <|end|>"}, {"role": "assistant", "content": "Yes."}]
    files = [tmp_path / "messages.jsonl", DATA]
    files[0].write_text(json.dumps({"messages": messages, "label": True}) + "\n")
    tokens = tmp_path / "tokens"
    code, _, errors, _ = run(COMMAND, "data", "check", *files, "--tokenizer", MODEL, "--cache-dir", tokens)
    assert (code, errors) == (0, "")
    encoder = Encoder(load_tokenizer(MODEL), TokenizationSettings())
    for file in files:
        source = parse_source(file, RowReader())
        anew = TokenCache(tmp_path / "anew", encoder, workers=1).tokens_of(source, skip_bad=True)
        found = tokens / anew.folder.name  # the name is made of contents, tokenizer and settings
        assert len(anew) and not anew.num_bad
        for part in ("tokens.bin", "samples.bin"):
            assert (found / part).read_bytes() == (anew.folder / part).read_bytes()


@pytest.mark.parametrize("own_process", [True, False])
def test_only_a_process_of_its_own_leaves_torch_out(monkeypatch: pytest.MonkeyPatch, own_process: bool) -> None:
    """A program that calls `main` with arguments may train afterwards."""
    given: list[bool] = []

    def check(options: Namespace) -> None:
        given.append(options.own_process)

    monkeypatch.setattr(data_commands, "check", check)
    arguments = ["data", "check", "x.jsonl", "--tokenizer", "x"]
    monkeypatch.setattr(sys, "argv", ["nemo-kto", *arguments])
    cli.main(None if own_process else arguments)
    assert given == [own_process]


def test_torch_that_is_loaded_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = ModuleType("torch")
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    import_without_torch()
    assert sys.modules["torch"] is torch and "transformers" not in sys.modules


def test_training_leaves_out_what_no_run_uses(tmp_path: Path) -> None:
    """Before anything is read: each process of a run pays for its imports."""
    program = "import sys; from nemo_kto import cli; cli._imported('train', 'train'); print(*sys.modules)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=HANG
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"torch", "megatron.core", "lightning.pytorch", "nemo.utils.exp_manager"} <= loaded
    assert not loaded & {"datasets", "mlflow", "wandb", "nemo_kto.reporting.report"}
