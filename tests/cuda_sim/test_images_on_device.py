"""Training on images on the simulated GPUs gives the series that CPUs give, and the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_sim.test_same_series import BF16, TP2_SP, assert_same
from tests.distributed_harness import free_port
from tests.integration import vision_assets
from tests.integration.assets import read_series, train_on_rank

PP2 = {"model__pipeline_model_parallel_size": 2}
SWAPPED = {"model__kto__reference__mode": "cpu_swap"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    vision_assets.write_images(folder / "images")
    vision_assets.write_feedback(folder / "train.jsonl", number=16, seed=1)
    vision_assets.write_feedback(folder / "validation.jsonl", number=5, seed=2)
    for kind in ("llava_clip", "qwen2_5_vl", "gemma3"):
        vision_assets.make_model_folder(folder / kind, kind)
    return folder


@pytest.mark.parametrize(
    ("ranks", "kind", "changes"),
    [
        pytest.param(2, "llava_clip", {**TP2_SP, "model__vision__train": "projector", **SWAPPED}, id="LLaVA TP2 SP"),
        pytest.param(1, "qwen2_5_vl", {"model__vision__train": "projector"}, id="Qwen2.5-VL"),
        pytest.param(1, "llava_clip", {"model__vision__train": "all"}, id="LLaVA"),
        pytest.param(2, "gemma3", {**PP2, **SWAPPED}, id="Gemma 3 PP2"),
        pytest.param(1, "qwen2_5_vl", BF16, id="Qwen2.5-VL bf16", marks=pytest.mark.slow),
    ],
)
def test_images_are_seen_as_on_cpus(
    shown: Path, tmp_path: Path, run_ranks: Any, gpu_ranks: Any, ranks: int, kind: str, changes: dict[str, Any]
) -> None:
    found = {}
    for accelerator, runs in (("gpu", gpu_ranks), ("cpu", run_ranks)):
        folder = tmp_path / accelerator
        values = vision_assets.vision_settings(
            shown,
            folder,
            kind,
            trainer__accelerator=accelerator,
            trainer__kto__max_steps=2,
            trainer__kto__val_check_interval=2,
            model__data__data_prefix__validation=str(shown / "validation.jsonl"),
            model__data__num_workers=1,
            generation__num_prompts=3,
            generation__max_new_tokens=4,
            **changes,
        )
        runs(train_on_rank, ranks, free_port(), values)
        lines = (folder / "generations.jsonl").read_text().splitlines()
        found[accelerator] = read_series(folder), [json.loads(line) for line in lines]
    (ours, answers), (theirs, expected) = found["gpu"], found["cpu"]
    in_bf16 = changes is BF16
    # as there: in bfloat16 norms round in other places
    assert_same(ours, theirs, error=3e-2 if in_bf16 else 1e-5)
    assert any(row.get("images") for row in expected), "no prompt that is answered shows an image"
    assert len(answers) == len(expected) == 3
    if not in_bf16:
        assert answers == expected
