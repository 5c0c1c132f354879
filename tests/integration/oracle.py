"""An oracle that shares no code with us: transformers' model, autograd, AdamW, and the paper's formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nemo_kto.data.batches.datamodule import DataSettings, KTODataModule
from nemo_kto.data.batches.packed_rows import Document, KTOBatch
from nemo_kto.data.reading.sources import Source
from tests.integration.assets import EXPERTS, GLOBAL_BATCH_SIZE, make_tokenizer

STEPS = 10
BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT = 0.5, 1.0, 1.33
LEARNING_RATE, MIN_LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS = 1e-3, 1e-4, 0.1, (0.9, 0.98), 1e-5
CLIP = 0.5
MICRO_BATCH_SIZE = 4
NAMES = ("loss", "kl", "rewards/chosen", "rewards/rejected", "grad_norm")

PLAIN = {
    "model__kto__desirable_loss_weight": DESIRABLE_WEIGHT,
    "model__kto__undesirable_loss_weight": UNDESIRABLE_WEIGHT,
    "model__optim__weight_decay": WEIGHT_DECAY,
    "trainer__kto__gradient_clip_val": CLIP,
}


def log_prob(model: torch.nn.Module, document: Document, *, average: bool) -> torch.Tensor:
    """Return log p(response | prompt) from the full logits of one document, unpacked and unpadded."""
    prompt, response = document
    logits = model(torch.cat([prompt, response])[None]).logits[0]
    logps = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, response[:, None]).squeeze(1)
    return logps.mean() if average else logps.sum()


def batches(
    root: Path, *, kl_fraction: float = 1.0, kl_group_size: int | None = None
) -> tuple[list[KTOBatch], list[KTOBatch]]:
    """Return the run's training and validation batches; what is in them is tested in tests/data."""
    settings = DataSettings(
        train=[Source(str(root / "train.jsonl"))],
        validation=[Source(str(root / "validation.jsonl"))],
        max_length=64,
        cache_dir=root / "tokens",
        global_batch_size=GLOBAL_BATCH_SIZE,
        kl_fraction=kl_fraction,
        kl_group_size=kl_group_size,
        seed=1234,
    )
    data = KTODataModule(settings, make_tokenizer())
    data.prepare()
    data.set_position(dp_rank=0, dp_size=1, num_steps=STEPS, steps_per_epoch=5, start_step=int)
    return list(data.train_dataloader()), list(data.val_dataloader())


class Pair:
    """Policy and reference, and what the paper computes from them for one batch, in the most direct way.

    Args:
        folder: The policy's model.
        average: Mean instead of sum over the tokens.
        kl_group: Samples that share a baseline.
        reference: The reference's model; None for the policy's.
        adapter: PEFT adapter that the policy is given to train.
        reference_adapter: One that the reference has.
        auto: What reads a model's folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        average: bool,
        kl_group: int,
        reference: Path | None = None,
        adapter: Path | None = None,
        reference_adapter: Path | None = None,
        auto: Any = AutoModelForCausalLM,
    ) -> None:
        self.policy, self.reference = (
            auto.from_pretrained(place, dtype=torch.float32, attn_implementation="eager")
            for place in (folder, reference or folder)
        )
        if adapter is not None:
            self.policy = PeftModel.from_pretrained(self.policy, adapter, is_trainable=True)
        if reference_adapter is not None:
            self.reference = PeftModel.from_pretrained(self.reference, reference_adapter)
        self.average = average
        self.kl_group = kl_group

    def log_prob(self, model: torch.nn.Module, document: Any) -> torch.Tensor:
        return log_prob(model, document, average=self.average)

    def ratios(self, documents: list[Document]) -> torch.Tensor:
        return torch.stack(
            [
                self.log_prob(self.policy, document) - self.log_prob(self.reference, document).detach()
                for document in documents
            ]
        )

    def losses(self, batch: KTOBatch, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return losses, log-ratios and baselines of the first `number` samples of a batch."""
        with torch.no_grad():
            groups = self.ratios(batch.kl_samples[:number]).split(self.kl_group)
        # a part of the KL set is of the whole batch
        sizes = [number] if len(groups) == 1 else [len(group) for group in groups]
        z = torch.cat([group.mean().clamp(min=0).expand(size) for group, size in zip(groups, sizes, strict=True)])
        r = self.ratios(batch.samples[:number])
        losses = torch.where(
            batch.desirable[:number],
            DESIRABLE_WEIGHT * (1 - torch.sigmoid(BETA * (r - z))),
            UNDESIRABLE_WEIGHT * (1 - torch.sigmoid(BETA * (z - r))),
        )
        return losses, r, z


class LoadBalance:
    """The load-balancing loss of a policy's routers (Switch Transformer, arXiv 2101.03961, eq. 4 to 6).

    Attributes:
        logits: For each router, the logits of each document that was scored with gradients.
    """

    def __init__(self, policy: torch.nn.Module) -> None:
        routers = [module for name, module in policy.named_modules() if name.endswith("mlp.gate")]
        self.logits: list[list[torch.Tensor]] = [[] for _ in routers]
        for documents, router in zip(self.logits, routers, strict=True):
            router.register_forward_hook(partial(self.keep, documents))

    @staticmethod
    def keep(documents: list[torch.Tensor], router: torch.nn.Module, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            documents.append(output[0])

    def take(self) -> torch.Tensor:
        """Return the loss `[layers, micro-batches]` and forget the logits."""
        losses = [
            self.of_micro_batch(torch.cat(documents[start : start + MICRO_BATCH_SIZE]))
            for documents in self.logits
            for start in range(0, len(documents), MICRO_BATCH_SIZE)
        ]
        number = len(self.logits)
        for documents in self.logits:
            documents.clear()
        return torch.stack(losses).reshape(number, -1)

    @staticmethod
    def of_micro_batch(logits: torch.Tensor) -> torch.Tensor:
        """Return the loss of `[T, experts]`: experts x sum of (share of the choices x mean probability)."""
        probabilities = logits.softmax(-1)
        number, chosen = logits.shape[1], EXPERTS["num_experts_per_tok"]
        choices = torch.bincount(logits.topk(chosen).indices.flatten(), minlength=number)
        return number * (choices / choices.sum() * probabilities.mean(0)).sum()


def oracle(
    root: Path,
    *,
    model: str = "hf",
    average: bool = False,
    class_mean: bool = False,
    kl_group: int = GLOBAL_BATCH_SIZE,
    aux_coeff: float = 0.0,
    kl_fraction: float = 1.0,
    sync: tuple[int, float] | None = None,
    steps: int = STEPS,
    **folders: Path | None,
) -> dict[str, list[float]]:
    """Train, then validate, and return the series; `sync` is after how many steps the reference moves how far.

    A run of fewer `steps` than usual is not validated.
    """
    pair = Pair(root / model, average=average, kl_group=kl_group, **folders)
    group_size = kl_group if kl_group < GLOBAL_BATCH_SIZE else None
    training, validation = batches(root, kl_fraction=kl_fraction, kl_group_size=group_size)
    series = train(pair, training[:steps], class_mean=class_mean, aux_coeff=aux_coeff, sync=sync)
    return series if steps < STEPS else series | validate(pair, validation, class_mean=class_mean)


def train(
    pair: Pair,
    training: Sequence[Any],
    *,
    class_mean: bool = False,
    aux_coeff: float = 0.0,
    sync: tuple[int, float] | None = None,
) -> dict[str, list[float]]:
    """Take a step for each batch, and return the series; of the policy what wants gradients is trained."""
    policy, steps = pair.policy, len(training)
    balance = LoadBalance(policy) if aux_coeff else None
    trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    # biases of several experts are vectors that one tensor holds
    vectors = [p for name, p in trained if p.dim() == 1 or name.endswith("_bias")]
    matrices = [p for name, p in trained if p.dim() > 1 and not name.endswith("_bias")]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=BETAS,
        eps=EPS,
    )
    series: dict[str, list[float]] = {name: [] for name in NAMES}
    for step, batch in enumerate(training):
        losses, r, z = pair.losses(batch, len(batch.samples))
        good = batch.desirable
        loss = losses[good].mean() + losses[~good].mean() if class_mean else losses.mean()
        optimizer.zero_grad()
        objective = loss
        if balance is not None:
            aux_losses = balance.take()
            objective = loss + aux_coeff * aux_losses.sum(0).mean()
            series.setdefault("moe_aux_loss", []).append(aux_losses.mean().item())
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        rate = MIN_LEARNING_RATE + (LEARNING_RATE - MIN_LEARNING_RATE) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if sync is not None and (step + 1) % sync[0] == 0:
            with torch.no_grad():
                for reference, trained in zip(pair.reference.parameters(), policy.parameters(), strict=True):
                    reference.copy_(sync[1] * trained + (1 - sync[1]) * reference)
        values = (loss, z.mean(), BETA * r[good].mean(), BETA * r[~good].mean(), norm)
        for name, value in zip(NAMES, values, strict=True):
            series[name].append(value.item())
    return series


def validate(pair: Pair, validation: list[KTOBatch], *, class_mean: bool) -> dict[str, list[float]]:
    """Return means over the real samples: 11 in batches of 5 and 6, or with groups of 8 and 3, filled up to 8."""
    numbers = (5, 6) if pair.kl_group == GLOBAL_BATCH_SIZE else (8, 3)
    with torch.no_grad():
        parts = [pair.losses(batch, number) for batch, number in zip(validation, numbers, strict=True)]
    losses, r, z = (torch.cat(column) for column in zip(*parts, strict=True))
    good = torch.cat([batch.desirable[:number] for batch, number in zip(validation, numbers, strict=True)])
    loss = losses[good].mean() + losses[~good].mean() if class_mean else losses.mean()
    values = (loss, z.mean(), BETA * r[good].mean(), BETA * r[~good].mean())
    return {f"val/{name}": [value.item()] for name, value in zip(NAMES, values, strict=False)}


def assert_equal(actual: dict[str, dict[int, float]], expected: dict[str, list[float]]) -> None:
    for name, values in expected.items():
        if not name.startswith("val/"):
            # kl and rewards are differences of log-probs of about -30: rounding leaves them an absolute error
            tolerance = 2e-5 if "kl" in name or "rewards" in name else 0.0
            assert list(actual[f"train/{name}"].values()) == pytest.approx(values, rel=1e-4, abs=tolerance), name
