"""Twenty steps against TRL's KTOTrainer: the series that tests/goldens/make_trl_series.py kept.

Both sides read the same model and records, take the records in order, and count every sample equally. Two rules
differ, on purpose, and are made the same here:

* TRL joins each prompt with the response of the sample before it, we with that of the sample after it. Without
  accumulation our run therefore reads the records of each batch backwards; no rule of ours is replaced.
* Under accumulation TRL exchanges the responses within each micro-batch, we within the global batch, also where each
  micro-batch has a baseline of its own. There, and only there, the pairing rule is replaced by TRL's; the rest of
  `kl_scope: micro_batch` is ours.

That the tokens and pairs of all steps are TRL's is part of the comparison.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from tests.distributed_harness import free_port
from tests.integration.assets import GLOBAL_BATCH_SIZE, read_series, settings, train_on_rank

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
TRL = json.loads((GOLDENS / "trl_series.json").read_text())
STEPS = TRL["settings"]["steps"]
Document = tuple[list[int], list[int]]
Batch = tuple[list[Document], list[Document]]
Series = dict[str, dict[int, float]]


def previous_in_group(group: int, prompt_keys: Sequence[int]) -> list[int]:
    """Return TRL's pairs: the sample before, and for the first of a group its last."""
    return [start + (i - 1) % group for start in range(0, len(prompt_keys), group) for i in range(group)]


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


def train_and_keep(
    port: int, overrides: dict[str, Any], pair_group: int | None
) -> tuple[list[Batch], dict[str, list[list[float]]]]:
    """Train with our pairs, or TRL's in groups of `pair_group`; return batches and metric -> step -> sample -> value.

    Those of the rewards of one class are the rewards of all samples: which count is in the weights beside them.
    """
    from nemo_kto.algorithms.metrics import MetricSums
    from nemo_kto.data.batches import sampling

    keeper, add = KeepsBatches(), MetricSums.add
    per_sample: dict[str, list[list[float]]] = {}

    def add_and_keep(self: MetricSums, name: str, values: Any, weights: Any) -> None:
        per_sample.setdefault(name, []).append(values.tolist())
        add(self, name, values, weights)

    MetricSums.add = add_and_keep  # type: ignore[method-assign]
    if pair_group is not None:
        sampling.mismatch_permutation = partial(previous_in_group, pair_group)
    train_on_rank(port, overrides, callbacks=[keeper])
    return keeper.batches, {
        name: [in_order(*step) for step in zip(values, keeper.places, strict=True)]
        for name, values in per_sample.items()
    }


def overrides_of(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return our settings for what TRL was given."""
    given = TRL["settings"]
    accumulates_kl = run["loss_type"] == "kto" and run["micro_batch_size"] < GLOBAL_BATCH_SIZE
    return settings(
        folder,
        folder / "log",
        pretrained_checkpoint__restore_from_path=str(GOLDENS / "model"),
        trainer__kto__max_steps=STEPS,
        trainer__kto__gradient_clip_val=given["max_grad_norm"],
        model__micro_batch_size=run["micro_batch_size"],
        model__global_batch_size=given["global_batch_size"],
        model__data__shuffle=False,
        model__kto__loss=run["loss_type"],
        model__kto__ref_policy_kl_penalty=given["beta"],
        model__kto__desirable_loss_weight=run["desirable_weight"],
        model__kto__undesirable_loss_weight=given["undesirable_weight"],
        model__kto__kl_scope="micro_batch" if accumulates_kl else "global_batch",
        model__optim__lr=given["learning_rate"],
        model__optim__betas=given["betas"],
        model__optim__eps=given["eps"],
        model__optim__weight_decay=given["weight_decay"],
        model__optim__sched__name="Constant",
    )


def batches_of_trl(run: dict[str, Any]) -> list[Batch]:
    """Return samples and KL set of each step."""
    tokens, size = TRL["tokens"], GLOBAL_BATCH_SIZE
    samples = list(zip(tokens["prompt_ids"], tokens["completion_ids"], strict=True))
    pairs: list[Document] = []
    if run["loss_type"] == "kto":
        completions = tokens["kl_completion_ids"][str(run["micro_batch_size"])]
        pairs = list(zip(tokens["prompt_ids"], completions, strict=True))
    starts = [step * size % len(samples) for step in range(STEPS)]
    return [(samples[start : start + size], pairs[start : start + size]) for start in starts]


def slow_where_weights_are_one(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow if name.endswith("-1.0") and name != "kto-8-1.0" else ())


@pytest.mark.parametrize("name", map(slow_where_weights_are_one, TRL["runs"]))
def test_twenty_steps_equal_trls(name: str, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    run = TRL["runs"][name]
    accumulates = run["micro_batch_size"] < GLOBAL_BATCH_SIZE
    order = slice(None) if accumulates else slice(None, None, -1)
    lines = (GOLDENS / "feedback.jsonl").read_text().splitlines(keepends=True)
    groups = [lines[start : start + GLOBAL_BATCH_SIZE][order] for start in range(0, len(lines), GLOBAL_BATCH_SIZE)]
    (tmp_path / "train.jsonl").write_text("".join(line for group in groups for line in group))
    pair_group = run["micro_batch_size"] if accumulates else None
    ((batches, values),) = run_ranks(train_and_keep, 1, free_port(), overrides_of(run, tmp_path), pair_group)

    assert [(samples[order], pairs[order]) for samples, pairs in batches] == batches_of_trl(run)
    logged = read_series(tmp_path / "log")
    for metric in ("loss", "grad_norm"):
        expected = [step[metric] for step in run["steps"]]
        assert list(logged[f"train/{metric}"].values()) == pytest.approx(expected, rel=1e-5), metric
    compare_rewards(logged, [step[order] for step in values["rewards/chosen"]], run)
    if run["loss_type"] == "kto":
        compare_kl(logged, [step[order] for step in values["kl"]], run)


def compare_rewards(logged: Series, per_sample: list[list[float]], run: dict[str, Any]) -> None:
    """Compare each sample's reward, the means of the classes, and what else TRL logged as a mean over samples."""
    means: dict[str, list[float]] = {}
    for i, (actual, step) in enumerate(zip(per_sample, run["steps"], strict=True)):
        # differences of log-probs of about -30: their error is that of the log-probs, not of their own size
        assert actual == pytest.approx(step["rewards"], abs=2e-5), i
        first = i * GLOBAL_BATCH_SIZE % len(TRL["tokens"]["label"])
        labels = TRL["tokens"]["label"][first : first + GLOBAL_BATCH_SIZE]
        for name, label in (("rewards/chosen", True), ("rewards/rejected", False)):
            members = [reward for reward, other in zip(step["rewards"], labels, strict=True) if other == label]
            means.setdefault(name, []).append(sum(members) / len(members))
        for name, value in step["logged"].items():
            means.setdefault(f"logged {name}", []).append(value)
    for name, expected in means.items():
        actual = list(logged[f"train/{name.removeprefix('logged ')}"].values())
        assert actual == pytest.approx(expected, rel=1e-6, abs=2e-5), name


def compare_kl(logged: Series, per_sample: list[list[float]], run: dict[str, Any]) -> None:
    """Compare the baseline of each micro-batch, which is that of all its samples, and their mean."""
    size = run["micro_batch_size"]
    for i, (actual, step) in enumerate(zip(per_sample, run["steps"], strict=True)):
        expected = [kl for kl in step["kl"] for _ in range(size)]
        assert actual == pytest.approx(expected, abs=2e-5), i
    means = [sum(step["kl"]) / len(step["kl"]) for step in run["steps"]]
    assert list(logged["train/kl"].values()) == pytest.approx(means, abs=2e-5)
    assert sum(mean > 0.1 for mean in means) > STEPS // 3  # else the pairs would not matter


def test_what_was_kept_is_what_was_meant() -> None:
    """Settings under which a difference would show: gradients that are clipped and that are not, all eight runs."""
    assert len(TRL["runs"]) == 8
    for name, run in TRL["runs"].items():
        norms = [step["grad_norm"] for step in run["steps"]]
        assert len(norms) == STEPS and min(norms) < TRL["settings"]["max_grad_norm"] < max(norms), name
    for loss_type in ("kto", "apo_zero_unpaired"):
        losses = {size: [step["loss"] for step in TRL["runs"][f"{loss_type}-{size}-1.33"]["steps"]] for size in (8, 2)}
        # accumulation changes KTO's baseline, and nothing else
        assert (losses[8] == pytest.approx(losses[2], rel=1e-5)) == (loss_type == "apo_zero_unpaired")
