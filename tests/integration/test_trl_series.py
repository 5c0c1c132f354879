"""Steps of TRL's KTOTrainer and ours: the series that tests/goldens/make_trl_series.py kept, and those with images.

Both sides read the same model and records, take the records in order, and count every sample equally. No rule of ours
is replaced. With `kl_scope: micro_batch` pairs and baselines are TRL's. With `global_batch`, each prompt is joined
with the response after it instead of the one before; without accumulation our run is TRL's when it reads the records
of each batch backwards.

That the tokens and pairs of all steps are TRL's is part of the comparison, and so are the steps at which a metric is
logged: TRL logs none of a class that has no sample in the batch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from PIL import Image

from tests.distributed_harness import free_port
from tests.integration.assets import read_series, settings, train_on_rank

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
FOLDERS = {"text": GOLDENS, "images": GOLDENS / "vision"}
"""What is in the records -> folder with the model, the records and what TRL made of them."""
KEPT = {data: json.loads((folder / "trl_series.json").read_text()) for data, folder in FOLDERS.items()}
TRL, OF_IMAGES = KEPT["text"], KEPT["images"]
Document = tuple[list[int], list[int]]
Batch = tuple[list[Document], list[Document]]
Series = dict[str, dict[int, float]]

REWARDS = 4e-5
"""Rewards and kl are differences of log-probs of about -30: their error is that of these, not of their own size. After
20 steps of Adam with a tiny eps, rounding has made it half as much."""


class KeepsBatches(Callback):
    """Keeps samples and KL set of each step, by their places in the global batch, and the samples' places."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.places: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        samples, pairs = (
            in_order([(prompt.tolist(), response.tolist()) for prompt, response in documents], places.tolist())
            for documents, places in ((batch.samples, batch.places), (batch.kl_samples, batch.kl_places))
        )
        self.batches.append((samples, pairs))
        self.places.append(batch.places.tolist())


def in_order(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [value for _, value in sorted(zip(places, values, strict=True), key=lambda pair: pair[0])]


def train_and_keep(port: int, overrides: dict[str, Any]) -> tuple[list[Batch], dict[str, list[list[float]]]]:
    """Train; return batches and metric -> step -> sample -> value.

    Those of the rewards of one class are the rewards of all samples: which count is in the weights beside them.
    """
    from nemo_kto.algorithms.metrics import MetricSums

    keeper, add = KeepsBatches(), MetricSums.add
    per_sample: dict[str, list[list[float]]] = {}

    def add_and_keep(self: MetricSums, name: str, values: Any, weights: Any) -> None:
        per_sample.setdefault(name, []).append(values.tolist())
        add(self, name, values, weights)

    MetricSums.add = add_and_keep  # type: ignore[method-assign]
    train_on_rank(port, overrides, callbacks=[keeper])
    return keeper.batches, {
        name: [in_order(*step) for step in zip(values, keeper.places, strict=True)]
        for name, values in per_sample.items()
    }


def overrides_of(data: str, run: dict[str, Any], kl_scope: str, folder: Path) -> dict[str, Any]:
    """Return our settings for what TRL was given."""
    given = KEPT[data]["settings"]
    of_images = {"model__vision__train": run.get("trained"), "model__data__seq_length": 128}
    return settings(
        folder,
        folder / "log",
        pretrained_checkpoint__restore_from_path=str(FOLDERS[data] / "model"),
        trainer__kto__max_steps=given["steps"],
        trainer__kto__gradient_clip_val=given["max_grad_norm"],
        model__micro_batch_size=run["micro_batch_size"],
        model__global_batch_size=run["global_batch_size"],
        model__data__shuffle=False,
        model__kto__loss=run["loss_type"],
        model__kto__ref_policy_kl_penalty=given["beta"],
        model__kto__desirable_loss_weight=run["desirable_weight"],
        model__kto__undesirable_loss_weight=given["undesirable_weight"],
        model__kto__kl_scope=kl_scope,
        model__optim__lr=given["learning_rate"],
        model__optim__betas=given["betas"],
        model__optim__eps=given["eps"],
        model__optim__weight_decay=given["weight_decay"],
        model__optim__sched__name="Constant",
        **(of_images if data == "images" else {}),
    )


def batches_of_trl(data: str, run: dict[str, Any]) -> list[Batch]:
    """Return samples and KL set of each step."""
    tokens, size = KEPT[data]["tokens"], run["global_batch_size"]
    samples = list(zip(tokens["prompt_ids"], tokens["completion_ids"], strict=True))
    pairs: list[Document] = []
    if run["loss_type"] == "kto":
        completions = tokens["kl_completion_ids"][str(run["micro_batch_size"])]
        pairs = list(zip(tokens["prompt_ids"], completions, strict=True))
    starts = [step * size % len(samples) for step in range(len(run["steps"]))]
    return [(samples[start : start + size], pairs[start : start + size]) for start in starts]


def cases() -> list[Any]:
    """Return (data, run, kl_scope): TRL's rule for runs with a KL set, ours for those that do not accumulate."""
    found = []
    for data, kept in KEPT.items():
        for name, run in kept["runs"].items():
            slow = (name.endswith("-1.0") and name != "kto-8of8-1.0") or run.get("blank")
            scopes = {"micro_batch"} if run["loss_type"] == "kto" else {"global_batch"}
            if name in ("kto-8of8-1.33", "all-8of8"):
                scopes.add("global_batch")
            marks = pytest.mark.slow if slow else ()
            found += [pytest.param(data, name, scope, marks=marks) for scope in sorted(scopes)]
    return found


def write_records(data: str, run: dict[str, Any], order: slice, folder: Path) -> None:
    """Write the records as `train.jsonl`, each batch in some order, with the images beside it."""
    size = run["global_batch_size"]
    lines = (FOLDERS[data] / "feedback.jsonl").read_text().splitlines(keepends=True)
    groups = [lines[start : start + size][order] for start in range(0, len(lines), size)]
    (folder / "train.jsonl").write_text("".join(line for group in groups for line in group))
    if data == "images":
        shutil.copytree(FOLDERS[data] / "images", folder / "images")
        for file in (folder / "images").iterdir():
            if run["blank"]:
                blank = Image.new("RGB", Image.open(file).size)
                blank.save(file)


@pytest.mark.parametrize(("data", "name", "kl_scope"), cases())
def test_all_steps_equal_trls(
    data: str, name: str, kl_scope: str, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    run = KEPT[data]["runs"][name]
    backwards = run["loss_type"] == "kto" and kl_scope == "global_batch"
    order = slice(None, None, -1 if backwards else None)
    write_records(data, run, order, tmp_path)
    ((batches, values),) = run_ranks(train_and_keep, 1, free_port(), overrides_of(data, run, kl_scope, tmp_path))

    assert [(samples[order], pairs[order]) for samples, pairs in batches] == batches_of_trl(data, run)
    logged = read_series(tmp_path / "log")
    for metric, tolerance in (("loss", 1e-5), ("grad_norm", 3e-5)):
        compare(logged, metric, {i: step[metric] for i, step in enumerate(run["steps"])}, rel=tolerance)
    labels = KEPT[data]["tokens"]["label"]
    compare_rewards(logged, [step[order] for step in values["rewards/chosen"]], run, labels)
    if run["loss_type"] == "kto":
        compare_kl(logged, [step[order] for step in values["kl"]], run)


def compare(logged: Series, metric: str, expected: dict[int, float], **tolerance: float) -> None:
    """Compare step -> value of a metric: the same steps have it, no other."""
    assert logged[f"train/{metric}"] == pytest.approx(expected, **tolerance), metric


def compare_rewards(
    logged: Series, per_sample: list[list[float]], run: dict[str, Any], all_labels: list[bool]
) -> None:
    """Compare each sample's reward, the means of the classes, and what else TRL logged as a mean over samples."""
    size = run["global_batch_size"]
    means: Series = {}
    trls: Series = {}
    for i, (actual, step) in enumerate(zip(per_sample, run["steps"], strict=True)):
        assert actual == pytest.approx(step["rewards"], abs=REWARDS), i
        labels = all_labels[i * size % len(all_labels) :][:size]
        for name, label in (("rewards/chosen", True), ("rewards/rejected", False)):
            members = [reward for reward, other in zip(step["rewards"], labels, strict=True) if other == label]
            if members:
                means.setdefault(name, {})[i] = sum(members) / len(members)
        for name, value in step["logged"].items():
            trls.setdefault(name, {})[i] = value
    for name, expected in [*means.items(), *trls.items()]:
        compare(logged, name, expected, rel=1e-6, abs=REWARDS)


def compare_kl(logged: Series, per_sample: list[list[float]], run: dict[str, Any]) -> None:
    """Compare the baseline of each micro-batch, which is that of all its samples, and their mean."""
    size = run["micro_batch_size"]
    for i, (actual, step) in enumerate(zip(per_sample, run["steps"], strict=True)):
        expected = [kl for kl in step["kl"] for _ in range(size)]
        assert actual == pytest.approx(expected, abs=REWARDS), i
    means = [sum(step["kl"]) / len(step["kl"]) for step in run["steps"]]
    compare(logged, "kl", dict(enumerate(means)), abs=REWARDS)


def test_what_was_kept_is_what_was_meant() -> None:
    """Settings under which a difference would show: gradients that are clipped and that are not, absent classes."""
    assert len(TRL["runs"]) == 10
    for name, run in TRL["runs"].items():
        norms = [step["grad_norm"] for step in run["steps"]]
        assert len(norms) == 20 and TRL["settings"]["max_grad_norm"] < max(norms), name
        assert run["global_batch_size"] < 8 or min(norms) < TRL["settings"]["max_grad_norm"], name
        if run["loss_type"] == "kto":
            assert sum(sum(step["kl"]) / len(step["kl"]) > 0.1 for step in run["steps"]) > 6  # the pairs matter
    # labels 0 to 3 are True; of pairs of labels, those numbered 3, 5, 7, 13, 15 and 19 are False twice
    steps = TRL["runs"]["kto-4of4-1.33"]["steps"]
    assert [i for i, step in enumerate(steps) if "rewards/rejected" not in step["logged"]] == [0, 10]
    steps = TRL["runs"]["kto-2of2-1.33"]["steps"]
    assert [i for i, step in enumerate(steps) if "rewards/chosen" not in step["logged"]] == [3, 5, 7, 13, 15, 19]
    for loss_type in ("kto", "apo_zero_unpaired"):
        losses = {
            size: [step["loss"] for step in TRL["runs"][f"{loss_type}-{size}of8-1.33"]["steps"]] for size in (8, 2)
        }
        # accumulation changes KTO's baseline, and nothing else
        assert (losses[8] == pytest.approx(losses[2], rel=1e-5)) == (loss_type == "apo_zero_unpaired")


def test_images_and_the_tower_matter() -> None:
    """TRL's runs differ by much more than is tolerated of ours, so that each part of a run with images is compared."""
    runs = {name: run["steps"] for name, run in OF_IMAGES["runs"].items()}
    whole, frozen, blank = (runs[name] for name in ("all-8of8", "none-8of8", "all-blank-8of8"))
    assert whole[0]["loss"] == frozen[0]["loss"] == blank[0]["loss"]  # policy and reference are one
    for other in (frozen, blank):
        assert whole[0]["grad_norm"] > 1.1 * other[0]["grad_norm"]
        assert all(abs(one["loss"] - two["loss"]) > 1e-3 for one, two in zip(whole[1:], other[1:], strict=True))
    assert sum(sum(step["kl"]) / 4 > 0.1 for step in runs["all-2of8"]) > 5
    shown = [ids.count(2) for ids in OF_IMAGES["tokens"]["prompt_ids"]]
    assert set(shown) == {0, 16, 32}
    assert [0, 0] in [shown[start : start + 2] for start in range(0, 24, 2)]  # a micro-batch of texts
