"""Steps of models that see images against transformers' whole models, its processors and autograd.

Of ours the oracle takes only which records a batch joins, and asserts that their tokens are transformers'.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from nemo_kto.data.batches.packed_rows import KTOBatch
from tests.distributed_harness import free_port
from tests.integration.assets import GLOBAL_BATCH_SIZE, read_series, train_on_rank
from tests.integration.oracle import PLAIN, Pair, assert_equal, train
from tests.integration.test_matrix import CP2, PP2, SP2, TP2
from tests.integration.vision_assets import Readings, make_model_folder, vision_settings, write_feedback, write_images
from tests.network.tiny_vision import Shown, whole_logps

STEPS = 5
CASES = [
    ("qwen2_5_vl", "none"),
    ("qwen2_5_vl", "projector"),
    ("qwen2_5_vl", "all"),
    ("llava_clip", "none"),
    ("llava_siglip", "projector"),
    ("llava_clip", "all"),
    ("gemma3", "none"),
    ("gemma3", "all"),
]
QUICK = [*CASES[:3], ("llava_clip", "all"), ("gemma3", "all")]
LAYOUTS = {"tp2": TP2, "tp2sp": SP2, "pp2": PP2, "cp2": CP2, "dp2": {}}
OF_FOUR = {"tp2sp_pp2": {**SP2, **PP2}, "tp2sp_cp2": {**SP2, **CP2}, "pp2_cp2": {**PP2, **CP2}, "tp2sp_dp2": SP2}
"""Layouts of four ranks."""
QUICK_LAYOUTS = [
    *(("qwen2_5_vl", layout) for layout in ("tp2sp", "cp2", "tp2sp_pp2")),
    ("llava_clip", "dp2"),
    ("gemma3", "pp2"),
]
PROJECTORS = ("multi_modal_projector.", "visual.merger.")
TOWERS = ("vision_tower.", "visual.")

Series = dict[str, list[float]]


def marked(cases: list[tuple[str, str]], quick: list[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


class VisionPair(Pair):
    """Policy and reference that see; of the policy's vision the part that `trained` names is trained."""

    def __init__(self, folder: Path, *, trained: str, reference: Path | None = None) -> None:
        auto = AutoModelForImageTextToText
        super().__init__(folder, average=False, kl_group=GLOBAL_BATCH_SIZE, reference=reference, auto=auto)
        for name, parameter in self.policy.named_parameters():
            if any(part in name for part in PROJECTORS):
                parameter.requires_grad_(trained != "none")
            elif any(part in name for part in TOWERS):
                parameter.requires_grad_(trained == "all")

    def log_prob(self, model: torch.nn.Module, document: Shown) -> torch.Tensor:
        return whole_logps(model, document)


class KeepsBatches(Callback):
    def __init__(self) -> None:
        self.batches: list[KTOBatch] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: KTOBatch, batch_idx: int) -> None:
        self.batches.append(batch)


def train_and_keep_batches(port: int, overrides: dict[str, Any]) -> list[KTOBatch]:
    """Train on one rank; return the batches."""
    keeper = KeepsBatches()
    train_on_rank(port, overrides, callbacks=[keeper])
    return keeper.batches


def as_transformers_reads(batch: KTOBatch, readings: Readings) -> SimpleNamespace:
    """Return what `Pair` takes of a batch, made of the file; their tokens are the batch's."""
    found = []
    for documents, pairs in ((batch.samples, batch.pairs), (batch.kl_samples, batch.kl_pairs)):
        shown = [readings.document(*numbers) for numbers in pairs.tolist()]
        for (prompt, response), one in zip(documents, shown, strict=True):
            assert prompt.tolist() == one.prompt.tolist() and response.tolist() == one.response.tolist()
        found.append(shown)
    labels = torch.tensor([readings.rows[number]["label"] for number in batch.pairs[:, 0].tolist()])
    assert labels.tolist() == batch.desirable.tolist()
    return SimpleNamespace(samples=found[0], kl_samples=found[1], desirable=labels)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    write_images(folder / "images")
    write_feedback(folder / "train.jsonl", number=40, seed=5)
    for kind in {kind for kind, _ in CASES}:
        make_model_folder(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def compared(
    root: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]
) -> Callable[..., tuple[dict[str, dict[int, float]], Series]]:
    """Return `compared(kind, trained)`: the series of a run on one rank, and the oracle's of the same batches."""
    known: dict[tuple[str, str], tuple[dict[str, dict[int, float]], Series]] = {}

    def get(kind: str, trained: str) -> tuple[dict[str, dict[int, float]], Series]:
        if (kind, trained) not in known:
            log_dir = tmp_path_factory.mktemp("run")
            batches = run_and_read(root, run_ranks, overrides(root, log_dir, kind, trained), kind)
            known[kind, trained] = read_series(log_dir), train(VisionPair(root / kind, trained=trained), batches)
        return known[kind, trained]

    return get


def run_and_read(
    root: Path, run_ranks: Callable[..., Any], values: dict[str, Any], kind: str
) -> list[SimpleNamespace]:
    """Train on one rank; return the batches as transformers reads them."""
    (batches,) = run_ranks(train_and_keep_batches, 1, free_port(), values)
    readings = Readings(root / "train.jsonl", kind)
    return [as_transformers_reads(batch, readings) for batch in batches]


def overrides(root: Path, log_dir: Path, kind: str, trained: str, **changes: Any) -> dict[str, Any]:
    changes = {**PLAIN, "model__vision__train": trained, "trainer__kto__max_steps": STEPS, **changes}
    return vision_settings(root, log_dir, kind, **changes)


@pytest.mark.parametrize(("kind", "trained"), marked(CASES, QUICK))
def test_five_steps_equal_the_oracle(
    compared: Callable[..., tuple[dict[str, dict[int, float]], Series]], kind: str, trained: str
) -> None:
    actual, expected = compared(kind, trained)
    assert actual["train/kl"][0] == actual["train/rewards/chosen"][0] == actual["train/rewards/rejected"][0] == 0
    assert_equal(actual, expected)
    assert max(expected["kl"]) > 0 and len(expected["loss"]) == STEPS


@pytest.mark.parametrize(
    ("kind", "layout"),
    marked(
        [(kind, layout) for kind in ("qwen2_5_vl", "llava_clip", "gemma3") for layout in [*LAYOUTS, *OF_FOUR]],
        QUICK_LAYOUTS,
    ),
)
def test_the_first_steps_under_other_layouts(
    root: Path,
    tmp_path: Path,
    run_ranks: Callable[..., Any],
    compared: Callable[..., tuple[dict[str, dict[int, float]], Series]],
    kind: str,
    layout: str,
) -> None:
    """Of the whole model; rewards and gradients of the second step tell what the first one did."""
    ranks = 4 if layout in OF_FOUR else 2
    short = {"trainer__kto__max_steps": 2, **(LAYOUTS | OF_FOUR)[layout]}
    run_ranks(train_on_rank, ranks, free_port(), overrides(root, tmp_path, kind, "all", **short))
    _, expected = compared(kind, "all")
    assert_equal(read_series(tmp_path), {name: values[:2] for name, values in expected.items()})


def test_the_first_loss_is_a_half(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    """To the last bit, of unit weights: policy and reference see the same."""
    unit = {"model__kto__undesirable_loss_weight": 1.0, "trainer__kto__max_steps": 1}
    run_ranks(train_on_rank, 2, free_port(), overrides(root, tmp_path, "qwen2_5_vl", "all", **{**unit, **TP2}))
    assert read_series(tmp_path)["train/loss"] == {0: 0.5}


def test_the_parts_differ(compared: Callable[..., tuple[dict[str, dict[int, float]], Series]]) -> None:
    """What is trained shows in the oracle's gradients, so that a part that is forgotten would be seen."""
    norms = [compared("qwen2_5_vl", trained)[1]["grad_norm"][0] for trained in ("none", "projector", "all")]
    assert norms[0] * 1.001 < norms[1] < norms[1] * 1.001 < norms[2]


@pytest.mark.parametrize(
    ("mode", "trained"),
    [
        ("cpu_swap", "none"),
        pytest.param("resident", "projector", marks=pytest.mark.slow),
        pytest.param("resident", "all", marks=pytest.mark.slow),
        ("cached", "none"),
    ],
)
def test_another_reference_has_eyes_of_its_own(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], mode: str, trained: str
) -> None:
    """Its tower, its projector and its language model are other ones, whatever is trained of the policy's."""
    other = tmp_path / "other"
    shutil.copytree(root / "llava_clip", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: 0.8 * weight for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    reference = {"model__kto__reference__checkpoint": str(other), "model__kto__reference__mode": mode}
    values = overrides(root, tmp_path / "log", "llava_clip", trained, **reference)
    batches = run_and_read(root, run_ranks, values, "llava_clip")
    expected = train(VisionPair(root / "llava_clip", trained=trained, reference=other), batches)
    assert_equal(read_series(tmp_path / "log"), expected)
    assert abs(expected["rewards/chosen"][0]) > 0.1


@pytest.mark.parametrize("mode", ["cpu_swap", pytest.param("resident", marks=pytest.mark.slow)])
def test_a_reference_that_moves_takes_the_tower_along(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], mode: str
) -> None:
    moving = {
        "model__kto__reference__mode": mode,
        "model__kto__reference__sync_every_n_steps": 2,
        "model__kto__reference__sync_mixup_alpha": 0.6,
    }
    values = overrides(root, tmp_path, "llava_clip", "all", **moving)
    batches = run_and_read(root, run_ranks, values, "llava_clip")
    expected = train(VisionPair(root / "llava_clip", trained="all"), batches, sync=(2, 0.6))
    assert_equal(read_series(tmp_path), expected)
