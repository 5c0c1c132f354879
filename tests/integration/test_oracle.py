"""Ten steps against an oracle that shares no code with us: transformers' model, autograd, AdamW, and the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kto.data.batching import Document, KTOBatch
from nemo_kto.data.datamodule import KTODataModule
from tests.distributed_harness import free_port
from tests.integration.assets import (
    GLOBAL_BATCH_SIZE,
    make_model_folder,
    make_tokenizer,
    read_series,
    settings,
    train_in_pool,
    write_feedback,
)

STEPS = 10
BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT = 0.5, 1.0, 1.33
LEARNING_RATE, MIN_LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS = 1e-3, 1e-4, 0.1, (0.9, 0.98), 1e-5
CLIP = 0.5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle")
    make_model_folder(folder / "hf")
    write_feedback(folder / "train.jsonl", number=40, seed=5)
    return folder


def log_prob(model: torch.nn.Module, document: Document, *, average: bool) -> torch.Tensor:
    """Return log p(response | prompt) from the full logits of one document, unpacked and unpadded."""
    prompt, response = document
    logits = model(torch.cat([prompt, response])[None]).logits[0]
    logps = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, response[:, None]).squeeze(1)
    return logps.mean() if average else logps.sum()


def batches(root: Path) -> list[KTOBatch]:
    """Return the run's global batches; what is in them is tested in tests/data."""
    data = KTODataModule(
        train_files=[root / "train.jsonl"],
        format="auto",
        tokenizer=make_tokenizer(),
        max_length=64,
        append_eod=True,
        global_batch_size=GLOBAL_BATCH_SIZE,
        shuffle=True,
        seed=1234,
        num_workers=0,
    )
    data.prepare()
    data.set_position(dp_rank=0, dp_size=1, num_steps=STEPS, steps_per_epoch=5, start_step=int)
    return list(data.train_dataloader())


def oracle(root: Path, *, average: bool, class_mean: bool) -> dict[str, list[float]]:
    """Train as the paper says, in the most direct way."""
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float32, attn_implementation="eager")
        for _ in range(2)
    )
    matrices = [p for p in policy.parameters() if p.dim() > 1]
    vectors = [p for p in policy.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=BETAS,
        eps=EPS,
    )
    series: dict[str, list[float]] = {
        "loss": [],
        "kl": [],
        "rewards/chosen": [],
        "rewards/rejected": [],
        "grad_norm": [],
    }
    for step, batch in enumerate(batches(root)):
        with torch.no_grad():
            ratios = [
                log_prob(policy, document, average=average) - log_prob(reference, document, average=average)
                for document in batch.kl_samples
            ]
            z = torch.stack(ratios).mean().clamp(min=0)
            ref = torch.stack([log_prob(reference, document, average=average) for document in batch.samples])
        r = torch.stack([log_prob(policy, document, average=average) for document in batch.samples]) - ref
        good = batch.desirable
        losses = torch.where(
            good,
            DESIRABLE_WEIGHT * (1 - torch.sigmoid(BETA * (r - z))),
            UNDESIRABLE_WEIGHT * (1 - torch.sigmoid(BETA * (z - r))),
        )
        loss = losses[good].mean() + losses[~good].mean() if class_mean else losses.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        rate = MIN_LEARNING_RATE + (LEARNING_RATE - MIN_LEARNING_RATE) * (1 + math.cos(math.pi * step / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        values = (loss, z, BETA * r[good].mean(), BETA * r[~good].mean(), norm)
        for name, value in zip(series, values, strict=True):
            series[name].append(value.item())
    return series


@pytest.mark.parametrize(("average", "class_mean"), [(False, False), (True, True)])
def test_ten_steps_equal_the_oracle(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], average: bool, class_mean: bool
) -> None:
    changes = {
        "model__micro_batch_size": 4,
        "model__kto__desirable_loss_weight": DESIRABLE_WEIGHT,
        "model__kto__undesirable_loss_weight": UNDESIRABLE_WEIGHT,
        "model__kto__preference_average_log_probs": average,
        "model__kto__loss_reduction": "class_mean" if class_mean else "sample_mean",
        "model__optim__weight_decay": WEIGHT_DECAY,
        "trainer__kto__gradient_clip_val": CLIP,
    }
    run_ranks(train_in_pool, 1, free_port(), settings(root, tmp_path, **changes))
    actual, expected = read_series(tmp_path), oracle(root, average=average, class_mean=class_mean)
    for name, values in expected.items():
        series = [actual[f"train/{name}"][step] for step in range(STEPS)]
        # kl and rewards are differences of log-probs of about -30: rounding leaves them an absolute error
        tolerance = 2e-5 if name in ("kl", "rewards/chosen", "rewards/rejected") else 0.0
        assert series == pytest.approx(values, rel=1e-4, abs=tolerance), name
    assert max(expected["kl"]) > 0 and min(expected["grad_norm"]) > CLIP / 10
