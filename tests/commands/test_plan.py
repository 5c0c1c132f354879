"""`nemo-kto plan` as people call it: what it prints, what can be pasted, what it refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

import nemo_kto.errors
from nemo_kto.cli import main
from nemo_kto.config.compose import load_config
from nemo_kto.network.families import dimensions_of
from nemo_kto.runs.layout import check_divided, requested_layout

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two models, of which there are configurations only."""
    folder = tmp_path_factory.mktemp("models")
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(folder / "llama")
    MixtralConfig(**SIZES, num_local_experts=4).save_pretrained(folder / "mixtral")
    (folder / "llama" / "config.json").rename(folder / "dense.json")
    return folder


def plan(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_kto.cli", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


SMALL = ("--gpus", 16, "--seq-length", 64, "--global-batch-size", 32)


def test_the_best_can_be_pasted(folder: Path) -> None:
    found = plan("--model", folder / "dense.json", *SMALL, "--lora", "--json", "model.micro_batch_size=2")
    assert found.returncode == 0, found.stderr
    plans = json.loads(found.stdout)
    assert 1 < len(plans) <= 5
    assert [each["memory"]["traced"] for each in plans] == [True] + [False] * (len(plans) - 1)
    hf_config = LlamaConfig(**SIZES)
    for each in plans:
        config = load_config(each["overrides"])
        assert (config.trainer.devices, config.trainer.num_nodes, config.model.micro_batch_size) == (8, 2, 2)
        assert config.model.data.seq_length == 64 and config.model.peft.peft_scheme == "lora"
        check_divided(config, requested_layout(config, 16), dimensions_of(hf_config).divided)
        assert each["fits"] and each["memory"]["peak"] <= each["room"]
        assert each["seconds"]["total"] == pytest.approx(
            sum(value for name, value in each["seconds"].items() if name != "total")
        )
    assert plans[0]["trained_parameters"] < plans[0]["parameters"]


def test_a_page(folder: Path) -> None:
    """A mixture, one layout of one's own: by formula, with the assumption that experts are loaded equally."""
    layout = "tp=2,pp=2,ep=2,etp=1,recompute=full"
    found = plan("--model", folder / "mixtral", *SMALL, "--mean-length", 32, "--layout", layout, "--gpu", "b200")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0].startswith("mixtral: ") and "16 GPUs (B200" in lines[1] and "32 tokens on average" in lines[2]
    assert any("TP2+SP PP2 EP2 DP4 micro-batch 1 recompute full" in line and "iB ~ " in line for line in lines)
    for text in (
        "experts get equally many tokens",
        "exchange of experts' tokens, within its node",
        "A checkpoint takes",
    ):
        assert text in found.stdout


def test_a_recipe_with_another_layout(folder: Path) -> None:
    """What is said of it replaces the recipe's, also where it is a default; the rest of the recipe stays."""
    found = plan(
        "--model", folder / "dense.json", "recipe=qwen3_32b", "--layout", "tp=1,vpp=1,recompute=none", "--json"
    )
    assert found.returncode == 0, found.stderr
    (only,) = json.loads(found.stdout)
    model = load_config(only["overrides"]).model
    assert (model.tensor_model_parallel_size, model.sequence_parallel) == (1, False)
    assert (model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size) == (4, 1)
    kept = plan("--model", folder / "dense.json", "recipe=qwen3_32b", "--layout", "pp=2,vpp=2,tp=2", "--gpus", 16)
    assert "TP2+SP PP2 VPP2 DP4" in kept.stdout, kept.stderr


def test_what_is_given_is_not_searched_for(folder: Path) -> None:
    """Two documents of the longest kind in a row; attention alone is computed again, which no search would choose."""
    given = ("model.activations_checkpoint_granularity=selective", "model.micro_batch_tokens=128")
    found = plan("--model", folder / "mixtral", *SMALL, *given, "--gpu-memory", 3.2)
    assert found.returncode == 0, found.stderr
    shown = [line for line in found.stdout.splitlines() if line[:4].strip().isdecimal() and " DP" in line]
    assert 1 < len(shown) <= 5
    assert all(" micro-batch of 128 tokens recompute selective" in line for line in shown)


def test_a_layout_that_does_not_fit_says_so(folder: Path) -> None:
    found = plan("--model", folder / "mixtral", *SMALL, "--layout", "tp=1", "--gpu-memory", 3.15789)
    assert found.returncode == 1 and " that may be used. It does not fit: " in found.stdout


def test_nothing_fits(folder: Path) -> None:
    found = plan("--model", folder / "mixtral", *SMALL, "--gpu-memory", 3)
    assert found.returncode == 1
    assert "No layout fits." in found.stdout and "Too large: " in found.stdout


REFUSED: list[tuple[list[Any], str]] = [
    (["--layout", "tp=3"], "16 processes (trainer.devices x trainer.num_nodes) cannot be divided"),
    (["--layout", "tp=two"], "'tp=two' cannot be read. Write tp=N"),
    (["--nodes", 3], "--gpus 16 cannot be divided by --nodes 3"),
    (["--mean-length", 65], "--mean-length 65 is above the longest document, model.data.seq_length=64"),
    (["model.micro_batch_sise=2"], "model.micro_batch_size"),
    (["model.micro_batch_size"], "'model.micro_batch_size' is no KEY=VALUE"),
    (["--reference", "somewhere"], "model.kto.reference.mode"),
    (["--reference", "adapter_off"], "adapter_off"),
]


def errors(calls: list[list[str]]) -> list[str]:
    """Return what each call prints before it ends with 1; in one process, as starting one takes seconds."""
    torch.distributed.destroy_process_group()  # the harness's
    found = []
    for arguments in calls:
        stream = io.StringIO()
        with redirect_stderr(stream), patch.object(nemo_kto.errors, "_leave", sys.exit):
            with pytest.raises(SystemExit) as ended:
                main(["plan", *arguments])
        assert ended.value.code == 1
        found.append(stream.getvalue())
    return found


def test_refusals(folder: Path, run_ranks: Callable[..., list[Any]]) -> None:
    wrong = folder / "wrong.json"
    wrong.write_text('{"model_type": "bert"}')
    calls = [["--model", folder / "dense.json", *SMALL, *arguments] for arguments, _ in REFUSED]
    calls += [["--model", wrong, *SMALL], ["--model", folder / "nothing", *SMALL]]
    texts = [text for _, text in REFUSED]
    texts += [f"{wrong}: the architecture 'bert' is not supported", "nothing has no config.json"]
    (found,) = run_ranks(errors, 1, [list(map(str, call)) for call in calls])
    for error, text in zip(found, texts, strict=True):
        assert text in error and error.startswith("error: ") and error.count("\n") == 1, error
