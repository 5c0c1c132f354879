"""Recipes: each is a configuration, its layout fits its model, and the planner says that it fits the GPUs it names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_kto.config.compose import load_config
from nemo_kto.config.folders import config_dir
from nemo_kto.errors import ConfigError
from nemo_kto.planning.search import Planner
from nemo_kto.runtime.devices import DEVICES
from tests.planning import shapes

MODELS = {
    "llama3_8b": shapes.LLAMA_8B,
    "llama3_70b": shapes.LLAMA_70B,
    "qwen2_5_0_5b": shapes.QWEN25_05B,
    "qwen3_32b": shapes.QWEN3_32B,
    "qwen3_30b_a3b": shapes.QWEN3_30B,
    "qwen3_235b_a22b": shapes.QWEN3_235B,
}
RECIPES = sorted(file.stem for file in (config_dir() / "recipe").glob("*.yaml"))
PAGE = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
GIB = 2**30


def composed(name: str, *overrides: str) -> Any:
    folder = config_dir()  # any folder: no weights are looked for
    return load_config([f"recipe={name}", f"pretrained_checkpoint.restore_from_path={folder}", *overrides])


def model_of(name: str) -> Any:
    return MODELS[re.sub("_(q?lora|laptop)$", "", name)]


def peaks() -> dict[str, tuple[int, int, int]]:
    """Return recipe -> bytes of the fullest rank, bytes that it may take, and ranks."""
    torch.distributed.destroy_process_group()  # the harness's
    found = {}
    for name in RECIPES:
        config = composed(name)
        gpus = config.trainer.devices * config.trainer.num_nodes
        planner = Planner(
            config,
            model_of(name),
            gpus=gpus,
            node_size=config.trainer.devices,
            device=replace(DEVICES["h100"], memory_gib=79.1),
            length=config.model.data.seq_length,
        )
        found[name] = (planner.plan({}).memory.peak, planner.room, gpus)
    return found


def test_each_fits_what_it_names(run_ranks: Callable[..., list[Any]]) -> None:
    (found,) = run_ranks(peaks, 1)
    assert set(found) == set(RECIPES) and len(RECIPES) >= 10
    for name, (peak, room, ranks) in found.items():
        title = (config_dir() / "recipe" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1]
        row = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |"))
        assert f" {peak / GIB:.1f} GiB" in row, row
        if name.endswith("laptop"):
            assert "16 GB of memory" in title and ranks * (peak + 1.5 * GIB) < 12 * GIB, peak / GIB
        else:
            gpus = "1 GPU" if ranks == 1 else f"{ranks} GPUs"
            assert title.endswith(f": {gpus} of 80 GB") and peak < room, f"{name}: {peak / GIB:.1f}"


@pytest.mark.parametrize("name", RECIPES)
def test_each_is_a_configuration(name: str) -> None:
    """Adapters, beside four bits, where the name says so, and a live reference that needs no memory of the GPU."""
    config = composed(name)
    assert config.model.peft.quantize_base == ("nf4" if name.endswith("qlora") else None)
    assert (config.model.peft.peft_scheme == "lora") == name.endswith(("lora", "laptop"))
    expected = "adapter_off" if config.model.peft.peft_scheme == "lora" else "cpu_swap"
    assert config.model.kto.reference.mode == expected


def test_other_keys_win() -> None:
    config = composed("llama3_8b", "trainer.num_nodes=2", "model.optim.lr=3e-7")
    assert (config.trainer.num_nodes, config.model.optim.lr, config.trainer.devices) == (2, 3e-7, 8)
    assert load_config(["+recipe=llama3_8b"]) == load_config(["recipe=llama3_8b"])
    of_mapping = load_config({"model.optim.lr": 3e-7, "recipe": "llama3_8b"})
    assert of_mapping == load_config(["recipe=llama3_8b", "model.optim.lr=3e-7"])
    with pytest.raises(ConfigError, match=r"recipe/llama4.*llama3_70b"):
        composed("llama4")


def test_the_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_kto.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    main(["recipes"])
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()[: len(RECIPES)]] == RECIPES
    main(["recipes", "llama3_8b"])
    assert capsys.readouterr().out == (Path(config_dir()) / "recipe" / "llama3_8b.yaml").read_text(encoding="utf-8")
