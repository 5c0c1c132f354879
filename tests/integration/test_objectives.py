"""Every loss, humanline, the SFT term and samples' own weights against transformers, autograd, AdamW and the formulas.

Each on another layout: the objective must not know of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kto.data.batches.packed_rows import Document
from tests.distributed_harness import free_port
from tests.integration.assets import (
    assert_alike,
    make_model_folder,
    read_series,
    settings,
    train_on_rank,
    write_feedback,
)
from tests.integration.oracle import (
    BETA,
    BETAS,
    CLIP,
    DESIRABLE_WEIGHT,
    EPS,
    LEARNING_RATE,
    MIN_LEARNING_RATE,
    PLAIN,
    UNDESIRABLE_WEIGHT,
    WEIGHT_DECAY,
    assert_equal,
    batches,
)

STEPS = 10
WEIGHTS = (0.5, 1.0, 3.0, 0.0)
"""The records' own weights, over and over."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    make_model_folder(folder / "hf")
    write_feedback(folder / "train.jsonl", number=40, seed=5)
    write_feedback(folder / "validation.jsonl", number=11, seed=6)
    (folder / "weighted").mkdir()
    weigh(folder / "train.jsonl", folder / "weighted" / "train.jsonl")
    write_feedback(folder / "weighted" / "validation.jsonl", number=11, seed=6)
    return folder


def weigh(file: Path, weighted: Path) -> None:
    """Give every record a weight."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [json.dumps({**record, "weight": WEIGHTS[i % len(WEIGHTS)]}) for i, record in enumerate(records)]
    weighted.write_text("\n".join(lines) + "\n")


def token_logps(model: torch.nn.Module, document: Document) -> torch.Tensor:
    """Return log p of each response token from the full logits of one document."""
    prompt, response = document
    logits = model(torch.cat([prompt, response])[None]).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, response[:, None]).squeeze(1)


class Run:
    """Ten steps of one objective, in the most direct way.

    Args:
        root: Folder with model and data.
        loss: Formula of a sample's loss: (log-ratio, z or mean log-ratio so far, whether desirable) -> tensor.
        kl: Whether there is a KL set.
        interval: Bounds of a token's log-ratio.
        average: Means over tokens instead of sums.
        sft: Weight of the SFT term and whether it takes means over tokens.
        weighted: Whether the records have weights of their own.
    """

    def __init__(
        self,
        root: Path,
        loss: Callable[[torch.Tensor, float, bool], torch.Tensor],
        *,
        kl: bool = False,
        interval: tuple[float, float] | None = None,
        average: bool = False,
        sft: tuple[float, bool] = (0.0, False),
        weighted: bool = False,
    ) -> None:
        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float32, attn_implementation="eager")
            for _ in range(2)
        )
        self.loss, self.kl, self.interval, self.average, self.sft, self.weighted = (
            loss,
            kl,
            interval,
            average,
            sft,
            weighted,
        )
        self.seen: list[float] = []
        matrices = [p for p in self.policy.parameters() if p.dim() > 1]
        vectors = [p for p in self.policy.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
        self.series: dict[str, list[float]] = {
            "loss": [],
            "grad_norm": [],
            "rewards/chosen": [],
            "rewards/rejected": [],
        }

    def ratio(self, document: Document) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (log-ratio, the policy's log-probs of the tokens, which of them are inside of the interval)."""
        policy = token_logps(self.policy, document)
        ratios = policy - token_logps(self.reference, document).detach()
        inside = torch.ones_like(ratios, dtype=torch.bool)
        if self.interval is not None:
            low, high = self.interval
            inside = (ratios > low) & (ratios < high)
            ratios = torch.where(inside, ratios, torch.where(ratios <= low, low, high))
        return (ratios.mean() if self.average else ratios.sum()), policy, inside

    def step(self, number: int, batch: Any, *, sync: bool) -> None:
        z = sum(self.seen) / len(self.seen) if self.seen else 0.0
        if self.kl:
            with torch.no_grad():
                z = max(0.0, sum(self.ratio(document)[0].item() for document in batch.kl_samples) / 8)
            self.series.setdefault("kl", []).append(z)
        scored = [self.ratio(document) for document in batch.samples]
        good = batch.desirable.tolist()
        weights = [WEIGHTS[i % len(WEIGHTS)] if self.weighted else 1.0 for i in batch.pairs[:, 0].tolist()]
        losses = [w * self.loss(r, z, g) for w, (r, *_), g in zip(weights, scored, good, strict=True)]
        total = torch.stack(losses).mean()
        if self.sft[0]:
            likelihoods = [
                w * (policy.mean() if self.sft[1] else policy.sum())
                for w, (_, policy, _), g in zip(weights, scored, good, strict=True)
                if g
            ]
            term = -torch.stack(likelihoods).mean()
            self.series.setdefault("sft_loss", []).append(term.item())
            total = total + self.sft[0] * term
        self.optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), CLIP)
        if sync:  # before the step: the reference stays one behind
            self.reference.load_state_dict(self.policy.state_dict())
        rate = MIN_LEARNING_RATE + (LEARNING_RATE - MIN_LEARNING_RATE) * (1 + math.cos(math.pi * number / STEPS)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        ratios = [r.item() for r, *_ in scored]
        self.seen += ratios
        self.series["loss"].append(total.item())
        self.series["grad_norm"].append(norm.item())
        for name, label in (("chosen", True), ("rejected", False)):
            mine = [r for r, g in zip(ratios, good, strict=True) if g == label]
            self.series[f"rewards/{name}"].append(BETA * sum(mine) / len(mine))
        if self.interval is not None:
            inside = torch.cat([inside for *_, inside in scored]).float().mean().item()
            self.series.setdefault("unclamped", []).append(inside)

    def train(self, root: Path, *, sync: bool = False) -> dict[str, list[float]]:
        for number, batch in enumerate(batches(root)[0]):
            self.step(number, batch, sync=sync)
        return self.series


def weight(desirable: bool) -> float:
    return DESIRABLE_WEIGHT if desirable else UNDESIRABLE_WEIGHT


def kto(r: torch.Tensor, z: float, desirable: bool) -> torch.Tensor:
    return weight(desirable) * (1 - torch.sigmoid(BETA * ((r - z) if desirable else (z - r))))


def apo_zero(r: torch.Tensor, _: float, desirable: bool) -> torch.Tensor:
    return weight(desirable) * ((1 - torch.sigmoid(BETA * r)) if desirable else torch.sigmoid(BETA * r))


def bco(r: torch.Tensor, mean: float, desirable: bool) -> torch.Tensor:
    shifted = BETA * r - BETA * mean
    return weight(desirable) * torch.log1p(torch.exp(-shifted if desirable else shifted))


def run(root: Path, log_dir: Path, run_ranks: Callable[..., Any], ranks: int, **changes: Any) -> dict[str, Any]:
    run_ranks(train_on_rank, ranks, free_port(), settings(root, log_dir, **PLAIN, **changes))
    return read_series(log_dir)


def test_apo_zero(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    """Two data-parallel ranks; parameters arrive late, and no pass of the policy comes before the reference's."""
    changes = {"model__optim__overlap_param_sync": True, "model__kto__reference__mode": "cpu_swap"}
    actual = run(root, tmp_path, run_ranks, 2, model__kto__loss="apo_zero_unpaired", **changes)
    assert "train/kl" not in actual
    assert_equal(actual, Run(root, apo_zero).train(root))


def test_bco(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    """Two stages; the reward shift is the mean reward of all samples of the steps before."""
    changes = {"model__pipeline_model_parallel_size": 2, "model__micro_batch_size": 4}
    actual = run(root, tmp_path, run_ranks, 2, model__kto__loss="bco", **changes)
    oracle = Run(root, bco)
    assert_equal(actual, oracle.train(root))
    shifts = list(actual["train/delta"].values())
    assert shifts[0] == 0.0
    assert shifts[1:] == pytest.approx([BETA * sum(oracle.seen[: 8 * n]) / (8 * n) for n in range(1, STEPS)], abs=2e-5)
    assert max(map(abs, shifts)) > 0.01


@pytest.mark.parametrize(
    ("layout", "average"),
    [
        ({"model__context_parallel_size": 2}, True),
        ({"model__tensor_model_parallel_size": 2}, False),
        # parameters arrive late, and must be the new ones although the reference has moved before the step
        ({"model__optim__overlap_param_sync": True, "model__kto__reference__mode": "cpu_swap"}, False),
        pytest.param({"model__pipeline_model_parallel_size": 2}, True, marks=pytest.mark.slow),
    ],
    ids=["context", "tensor", "data", "pipeline"],
)
def test_humanline(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], layout: dict[str, Any], average: bool
) -> None:
    """Several rows on each of two ranks; the reference follows one step behind the policy."""
    interval = (-0.06, 0.04)
    changes = {
        "model__kto__humanline_clamp": list(interval),
        "model__kto__preference_average_log_probs": average,
        "model__kto__reference__sync_every_n_steps": 1,
        "model__kto__reference__sync_mixup_alpha": 1.0,
        "model__micro_batch_size": 2,
        "model__kto__log_prob_forward_micro_batch_size": 4,
        **layout,
    }
    actual = run(root, tmp_path, run_ranks, 2, **changes)
    expected = Run(root, kto, kl=True, interval=interval, average=average).train(root, sync=True)
    shares = expected.pop("unclamped")
    assert_equal(actual, expected)
    # a token at the edge may fall on either side: one of about forty
    assert list(actual["train/unclamped"].values()) == pytest.approx(shares, abs=0.06)
    assert shares[0] == 1.0 and 0.1 < min(shares) < 0.9  # some tokens are outside, some not


@pytest.mark.parametrize(("average", "sft_average"), [(False, True), (True, False), (True, True)])
def test_an_sft_term_and_weights(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], average: bool, sft_average: bool
) -> None:
    changes = {
        "model__data__data_prefix__train": str(root / "weighted" / "train.jsonl"),
        "model__kto__preference_average_log_probs": average,
        "model__kto__sft_loss_weight": 0.3,
        "model__kto__sft_average_log_probs": sft_average,
        "model__micro_batch_size": 2,
    }
    actual = run(root, tmp_path, run_ranks, 2, **changes)
    oracle = Run(root, kto, kl=True, average=average, sft=(0.3, sft_average), weighted=True)
    assert_equal(actual, oracle.train(root / "weighted"))


LAYOUTS = {
    "one": (1, {}),
    "data": (2, {}),
    "tensor": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2}),
    "chunks": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "context": (2, {"context_parallel_size": 2}),
}
OBJECTIVES = {
    "apo_sft": {"loss": "apo_zero_unpaired", "sft_loss_weight": 0.3, "loss_reduction": "class_mean"},
    "bco": {"loss": "bco", "preference_average_log_probs": True},
    "humanline": {
        "humanline_clamp": [-0.06, 0.04],
        "reference.sync_every_n_steps": 2,
        "reference.sync_mixup_alpha": 0.5,
        "sft_loss_weight": 0.1,
        "sft_average_log_probs": False,
        "loss_reduction": "class_mean",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_result_for_every_layout(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], objective: str
) -> None:
    """Weighted samples, several rows, eleven of validation in places for sixteen."""
    series = {}
    for name, (ranks, layout) in LAYOUTS.items():
        changes: dict[str, Any] = {f"model__{key}": value for key, value in layout.items()}
        changes |= {f"model__kto__{key.replace('.', '__')}": value for key, value in OBJECTIVES[objective].items()}
        changes |= {
            "model__data__data_prefix__train": str(root / "weighted" / "train.jsonl"),
            "model__data__data_prefix__validation": str(root / "validation.jsonl"),
            "trainer__kto__val_check_interval": STEPS,
            "model__micro_batch_size": 2,
        }
        series[name] = run(root, tmp_path / name, run_ranks, ranks, **changes)
    for name, found in series.items():
        assert_alike(found, series["one"])
        assert found["val/rewards/margins"] == pytest.approx(series["one"]["val/rewards/margins"], rel=1e-4), name
