"""No file that is read can run code: payloads in every file of every kind of folder, and every command over them."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed_harness import free_port
from tests.integration.assets import settings, train_on_rank

RUN = {
    "exp_manager__create_checkpoint_callback": True,
    "trainer__kto__save_interval": 2,
    "trainer__kto__max_steps": 2,
    "model__kto__reference__mode": "cached",
}
ADAPTERS = {**RUN, "model__peft__peft_scheme": "lora", "export__enabled": True}
MODULE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast): pass
class OwnConfig(LlamaConfig): pass
"""


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def as_pickle(file: Path, marker: Path) -> None:
    file.write_bytes(pickle.dumps(Payload(marker)))


def as_torch(file: Path, marker: Path) -> None:
    torch.save({"state_dict": Payload(marker), "global_step": Payload(marker)}, file)


def in_index(file: Path, marker: Path) -> None:
    index = pickle.loads(file.read_bytes())
    index.planner_data = Payload(marker)
    file.write_bytes(pickle.dumps(index))


def as_code(file: Path, marker: Path, **names: Any) -> None:
    """Have a configuration name a class in a file beside it, which makes the marker when it is imported."""
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **names}))
    (file.parent / "own.py").write_text(MODULE.format(marker=str(marker)))


def as_tokenizer_class(file: Path, marker: Path) -> None:
    as_code(file, marker, tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})


def as_config_class(file: Path, marker: Path) -> None:
    as_code(file, marker, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})


def as_unknown_model(file: Path, marker: Path) -> None:
    as_code(file, marker, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})


def as_template(file: Path, marker: Path) -> None:
    """Reach for Python from within a chat template."""
    globals_ = "cycler.__init__.__globals__"
    file.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ " + f"{globals_}.os.mknod('{marker}')" + " }}")


def with_huge_header(file: Path, marker: Path) -> None:
    """A file of safetensors whose header would be longer than any memory."""
    file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def as_link(file: Path, marker: Path) -> None:
    """A link to a file that is none of the folder's."""
    file.unlink(missing_ok=True)
    file.symlink_to("/etc/hostname")


Plant = Callable[[Path, Path], None]
WRITTEN: tuple[tuple[str, str, Plant], ...] = (
    ("model", "model.safetensors", as_pickle),
    ("model", "model.safetensors", as_torch),
    ("model", "model.safetensors", with_huge_header),
    ("model", "other.safetensors", with_huge_header),
    ("model", "model.safetensors", as_link),
    ("model", "tokenizer.json", as_link),
    ("model", "pytorch_model.bin", as_torch),
    ("model", "config.json", as_config_class),
    ("model", "config.json", as_unknown_model),
    ("model", "config.json", as_pickle),
    ("model", "generation_config.json", as_pickle),
    ("model", "tokenizer.json", as_pickle),
    ("model", "tokenizer.model", as_pickle),
    ("model", "tokenizer_config.json", as_tokenizer_class),
    ("model", "tokenizer_config.json", as_pickle),
    ("model", "special_tokens_map.json", as_pickle),
    ("model", "chat_template.jinja", as_template),
    ("adapter", "adapter_model.safetensors", as_torch),
    ("adapter", "adapter_model.bin", as_torch),
    ("adapter", "adapter_config.json", as_pickle),
    ("adapter", "adapter_model.safetensors", with_huge_header),
    ("adapter", "adapter_model.safetensors", as_link),
    ("checkpoint", "__0_0.distcp", as_link),
    ("checkpoint", "hf/config.json", as_link),
    ("reference_cache", "part-*.safetensors", with_huge_header),
    ("checkpoint", ".metadata", as_pickle),
    ("checkpoint", ".metadata", in_index),
    ("checkpoint", "common.pt", as_torch),
    ("checkpoint", "common.pt", as_pickle),
    ("checkpoint", "__0_0.distcp", as_torch),
    ("checkpoint", "metadata.json", as_pickle),
    ("checkpoint", "manifest.json", as_pickle),
    ("checkpoint", "hf/tokenizer_config.json", as_tokenizer_class),
    ("checkpoint", "hf/config.json", as_config_class),
    ("checkpoint", "hf/identity.json", as_pickle),
    ("checkpoint", "hf/run.json", as_pickle),
    ("tokens", "tokens.bin", as_pickle),
    ("tokens", "samples.bin", as_pickle),
    ("tokens", "counts.json", as_pickle),
    ("reference_cache", "part-*.safetensors", as_torch),
    ("reference_cache", "key.json", as_pickle),
    ("log", "events.out.tfevents.*", as_pickle),
    ("log", "run.json", as_pickle),
    ("data", "train.parquet", as_pickle),
    ("data", "train.json", as_pickle),
    ("data", "state.json", as_pickle),
)  # fmt: skip
"""(kind of folder, file in it, how a payload is put there)."""

QUICK = (in_index, as_tokenizer_class, as_template)
"""Those for which there is time in every run of the tests; they were executed once, or could be."""


@pytest.fixture(scope="module")
def clean(root: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]) -> Path:
    """Return a folder with a model, an adapter, and a run with checkpoints and caches of its own."""
    folder = tmp_path_factory.mktemp("clean")
    shutil.copytree(root / "hf", folder / "model")
    for name in ("train", "validation"):
        shutil.copy(root / f"{name}.jsonl", folder)
    values = _settings(folder, folder / "adapters", **ADAPTERS)
    run_ranks(train_on_rank, 1, free_port(), values)
    (folder / "adapters" / "hf").rename(folder / "adapter")
    shutil.rmtree(folder / "adapters")
    run_ranks(train_on_rank, 1, free_port(), _settings(folder, folder / "log", **RUN))
    (folder / "data").mkdir()
    return folder


def _settings(folder: Path, log: Path, **changes: Any) -> dict[str, Any]:
    cache = {
        "model__kto__reference__cache_dir": str(folder / "reference_cache"),
        "model__data__cache_dir": str(folder / "tokens"),
    }
    values = settings(folder, log, **{**changes, **cache})
    return {**values, "pretrained_checkpoint.restore_from_path": str(folder / "model")}


def every_command(port: int, folder: Path, marker: Path) -> list[str]:
    """Run every command over the folders, on a rank; return how each ended."""
    import torch.distributed as dist
    from omegaconf import OmegaConf

    from nemo_kto import cli
    from nemo_kto.commands.evaluate import evaluate
    from nemo_kto.commands.train import train as train_run
    from nemo_kto.config.compose import parse_config
    from nemo_kto.errors import KTOError

    def asked(*_: Any) -> str:
        marker.touch()  # nobody is asked whether code may run
        return "y"

    builtins.input = asked
    dist.destroy_process_group()
    os.environ.update(LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def of_run(function: Callable[..., Any], overrides: dict[str, Any]) -> Callable[[], Any]:
        raw = OmegaConf.create({})
        for key, value in {**overrides, "trainer.devices": 1}.items():
            OmegaConf.update(raw, key, value)
        return lambda: function(parse_config(raw))

    (checkpoint,) = (folder / "log" / "checkpoints").glob("*-last")
    model, train = str(folder / "model"), str(folder / "train.jsonl")
    values = _settings(folder, folder / "log", **{**RUN, "trainer__kto__max_steps": 3})
    from_adapter = {**ADAPTERS, "model__peft__lora_tuning__restore_from_path": str(folder / "adapter")}

    def command(*arguments: str) -> Callable[[], None]:
        options = cli._parser().parse_args(arguments)
        options.own_process = False
        return lambda: options.run(options)

    held_out = {**values, "model.data.data_prefix.validation": str(folder / "validation.jsonl")}
    elsewhere = _settings(folder, folder / "other", **RUN) | {"model.data.data_prefix.train": str(folder / "data")}
    actions: dict[str, Callable[[], Any]] = {
        "evaluate": of_run(evaluate, held_out),
        "train": of_run(train_run, values),
        "train adapters": of_run(train_run, _settings(folder, folder / "again", **from_adapter)),
        "train on other data": of_run(train_run, elsewhere),
        "data check": command("data", "check", train, "--tokenizer", model),
        "data check of data": command("data", "check", str(folder / "data"), "--tokenizer", model),
        "data show": command("data", "show", "1", train, "--tokenizer", model),
        "report": command("report", str(folder / "log")),
        "checkpoint verify": command("checkpoint", "verify", str(folder / "log")),
        "export-hf": command("export-hf", str(checkpoint), str(folder / "exported")),
        "generate": command("generate", str(checkpoint), "red"),
    }
    ends = []
    for name, action in actions.items():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                action()
                ends.append("")
            except KTOError as error:
                ends.append(f"{name}: {type(error).__name__}: {error}")
            except SystemExit as end:
                ends.append(f"{name}: exit {end.code}" if end.code else "")
    return ends


@pytest.mark.parametrize(
    ("kind", "name", "plant"),
    [
        pytest.param(
            *case, id=f"{case[0]}/{case[1]} {case[2].__name__}", marks=() if case[2] in QUICK else pytest.mark.slow
        )
        for case in WRITTEN
    ],
)
def test_nothing_in_a_file_is_run(
    clean: Path, tmp_path: Path, run_ranks: Callable[..., Any], kind: str, name: str, plant: Plant
) -> None:
    folder, marker = Path(shutil.copytree(clean, tmp_path / "folder")), tmp_path / "executed"
    where = next(folder.glob("log/checkpoints/*-last")) if kind == "checkpoint" else folder / kind
    for file in [*where.rglob(name)] or [where / name]:
        plant(file, marker)
    if kind == "data" and name == "state.json":
        (folder / "data" / "dataset_info.json").write_text("{}")
    (ends,) = run_ranks(every_command, 1, free_port(), folder, marker)
    assert not marker.exists(), ends


def test_the_commands_work_on_what_is_honest(clean: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    """Otherwise the other tests would show nothing."""
    folder = Path(shutil.copytree(clean, tmp_path / "folder"))
    shutil.copy(folder / "train.jsonl", folder / "data")
    (ends,) = run_ranks(every_command, 1, free_port(), folder, tmp_path / "executed")
    assert not any(ends), ends
