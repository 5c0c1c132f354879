"""Ten steps against an oracle that shares no code with us: transformers' model, autograd, AdamW, and the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from nemo_kto.data.batches.datamodule import DataSettings, KTODataModule
from nemo_kto.data.batches.packed_rows import Document, KTOBatch
from nemo_kto.data.reading.sources import Source
from tests.distributed_harness import free_port
from tests.integration.assets import (
    EXPERTS,
    GLOBAL_BATCH_SIZE,
    make_model_folder,
    make_tokenizer,
    read_series,
    settings,
    train_on_rank,
    write_feedback,
)

STEPS = 10
BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT = 0.5, 1.0, 1.33
LEARNING_RATE, MIN_LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS = 1e-3, 1e-4, 0.1, (0.9, 0.98), 1e-5
CLIP = 0.5
MICRO_BATCH_SIZE = 4
NAMES = ("loss", "kl", "rewards/chosen", "rewards/rejected", "grad_norm")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle")
    make_model_folder(folder / "hf")
    make_model_folder(folder / "experts", kind="experts")
    write_feedback(folder / "train.jsonl", number=40, seed=5)
    write_feedback(folder / "validation.jsonl", number=11, seed=6)
    return folder


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
    ) -> None:
        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager")
            for place in (folder, reference or folder)
        )
        if adapter is not None:
            self.policy = PeftModel.from_pretrained(self.policy, adapter, is_trainable=True)
        if reference_adapter is not None:
            self.reference = PeftModel.from_pretrained(self.reference, reference_adapter)
        self.average = average
        self.kl_group = kl_group

    def ratios(self, documents: list[Document]) -> torch.Tensor:
        return torch.stack(
            [
                log_prob(self.policy, document, average=self.average)
                - log_prob(self.reference, document, average=self.average).detach()
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
    **folders: Path | None,
) -> dict[str, list[float]]:
    """Train, then validate, and return the series; `sync` is after how many steps the reference moves how far."""
    pair = Pair(root / model, average=average, kl_group=kl_group, **folders)
    policy = pair.policy
    balance = LoadBalance(policy) if aux_coeff else None
    group_size = kl_group if kl_group < GLOBAL_BATCH_SIZE else None
    training, validation = batches(root, kl_fraction=kl_fraction, kl_group_size=group_size)
    matrices = [p for p in policy.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in policy.parameters() if p.requires_grad and p.dim() == 1]
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
        rate = MIN_LEARNING_RATE + (LEARNING_RATE - MIN_LEARNING_RATE) * (1 + math.cos(math.pi * step / STEPS)) / 2
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
    return series | validate(pair, validation, class_mean=class_mean)


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


@pytest.mark.parametrize(
    ("average", "class_mean", "kl_scope"),
    [(False, False, "global_batch"), (True, True, "global_batch"), (False, True, "micro_batch")],
)
def test_ten_steps_equal_the_oracle(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], average: bool, class_mean: bool, kl_scope: str
) -> None:
    changes = {
        "model__micro_batch_size": MICRO_BATCH_SIZE,
        "model__kto__desirable_loss_weight": DESIRABLE_WEIGHT,
        "model__kto__undesirable_loss_weight": UNDESIRABLE_WEIGHT,
        "model__kto__preference_average_log_probs": average,
        "model__kto__loss_reduction": "class_mean" if class_mean else "sample_mean",
        "model__kto__kl_scope": kl_scope,
        "model__optim__weight_decay": WEIGHT_DECAY,
        "model__data__data_prefix__validation": str(root / "validation.jsonl"),
        "trainer__kto__val_check_interval": STEPS,
        "trainer__kto__gradient_clip_val": CLIP,
    }
    run_ranks(train_on_rank, 1, free_port(), settings(root, tmp_path, **changes))
    kl_group = GLOBAL_BATCH_SIZE if kl_scope == "global_batch" else MICRO_BATCH_SIZE
    actual = read_series(tmp_path)
    expected = oracle(root, average=average, class_mean=class_mean, kl_group=kl_group)
    for name, values in expected.items():
        series = list(actual[name if name.startswith("val/") else f"train/{name}"].values())
        # kl and rewards are differences of log-probs of about -30: rounding leaves them an absolute error
        tolerance = 2e-5 if "kl" in name or "rewards" in name else 0.0
        assert series == pytest.approx(values, rel=1e-4, abs=tolerance), name
    assert (
        max(expected["kl"]) > 0 and (average or expected["val/kl"][0] > 0) and min(expected["grad_norm"]) > CLIP / 10
    )


@pytest.mark.parametrize("mode", ["resident", "cached"])
def test_part_of_the_kl_set_and_rows_of_so_many_tokens(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], mode: str
) -> None:
    """Of each training batch half of the prompts have a KL response, of a validation batch all."""
    changes = {
        **PLAIN,
        "model__micro_batch_tokens": 24,
        "model__kto__kl_fraction": 0.5,
        "model__kto__reference__mode": mode,
        "model__data__data_prefix__validation": str(root / "validation.jsonl"),
        "trainer__kto__val_check_interval": STEPS,
    }
    run_ranks(train_on_rank, 2, free_port(), settings(root, tmp_path, **changes))
    actual, expected = read_series(tmp_path), oracle(root, kl_fraction=0.5)
    assert_equal(actual, expected)
    assert list(actual["val/kl"].values()) == pytest.approx(expected["val/kl"], rel=1e-4)
    assert max(expected["kl"]) > 0
    assert expected["kl"] != pytest.approx(oracle(root)["kl"], rel=1e-2)


def test_experts_and_their_balance_equal_the_oracle(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    coeff = 0.1
    changes = {
        "pretrained_checkpoint__restore_from_path": str(root / "experts"),
        "model__micro_batch_size": MICRO_BATCH_SIZE,
        "model__moe_aux_loss_coeff": coeff,
        "model__kto__desirable_loss_weight": DESIRABLE_WEIGHT,
        "model__kto__undesirable_loss_weight": UNDESIRABLE_WEIGHT,
        "model__optim__weight_decay": WEIGHT_DECAY,
        "trainer__kto__gradient_clip_val": CLIP,
    }
    run_ranks(train_on_rank, 2, free_port(), settings(root, tmp_path, **changes, model__expert_model_parallel_size=2))
    actual = read_series(tmp_path)
    assert_equal(actual, oracle(root, model="experts", aux_coeff=coeff))


def assert_equal(actual: dict[str, dict[int, float]], expected: dict[str, list[float]]) -> None:
    for name, values in expected.items():
        if not name.startswith("val/"):
            # kl and rewards are differences of log-probs of about -30: rounding leaves them an absolute error
            tolerance = 2e-5 if "kl" in name or "rewards" in name else 0.0
            assert list(actual[f"train/{name}"].values()) == pytest.approx(values, rel=1e-4, abs=tolerance), name


PLAIN = {
    "model__kto__desirable_loss_weight": DESIRABLE_WEIGHT,
    "model__kto__undesirable_loss_weight": UNDESIRABLE_WEIGHT,
    "model__optim__weight_decay": WEIGHT_DECAY,
    "trainer__kto__gradient_clip_val": CLIP,
}


def make_adapter(folder: Path, base: Path, *, seed: int) -> Path:
    """Save an adapter with random A and B, made by PEFT, on some projections of some layers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=2,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
        layers_to_transform=[0, 1, 3],
    )
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("reference", ["base", "start", "other"])
def test_ten_steps_of_an_adapter_equal_pefts(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], reference: str
) -> None:
    """The reference is the base, the starting adapter, or another model."""
    adapter = make_adapter(tmp_path / "adapter", root / "hf", seed=3)
    checkpoint = {"base": None, "start": adapter, "other": make_model_folder(tmp_path / "other", seed=9)}[reference]
    prefix = "model__peft__lora_tuning__"
    changes = {
        "model__peft__peft_scheme": "lora",
        f"{prefix}target_modules": ["q_proj", "v_proj", "attention_dense", "gate_proj", "mlp_fc2"],
        f"{prefix}adapter_dim": 4,
        f"{prefix}alpha": 2,
        f"{prefix}rslora": True,
        f"{prefix}layer_selection": [1, 2, 4],
        f"{prefix}restore_from_path": str(adapter),
        "model__kto__reference__checkpoint": None if checkpoint is None else str(checkpoint),
    }
    run_ranks(train_on_rank, 1, free_port(), settings(root, tmp_path / "log", **PLAIN, **changes))
    actual = read_series(tmp_path / "log")
    folders = {"reference": checkpoint} if reference == "other" else {"reference_adapter": checkpoint}
    expected = oracle(root, adapter=adapter, **folders)
    assert_equal(actual, expected)
    assert (actual["train/rewards/chosen"][0] == actual["train/kl"][0] == 0) == (reference == "start")
    assert expected["kl"][0] > 0 or reference != "other"


@pytest.mark.parametrize("mode", ["cpu_swap", "resident"])
def test_another_reference_that_moves_equals_the_oracle(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], mode: str
) -> None:
    """Every three steps it becomes 0.6 policy + 0.4 reference (TR-DPO's soft update, arXiv 2404.09656)."""
    other = make_model_folder(tmp_path / "other", seed=9)
    changes = {
        "model__kto__reference__mode": mode,
        "model__kto__reference__checkpoint": str(other),
        "model__kto__reference__sync_every_n_steps": 3,
        "model__kto__reference__sync_mixup_alpha": 0.6,
        "model__optim__overlap_param_sync": True,
    }
    run_ranks(train_on_rank, 2, free_port(), settings(root, tmp_path / "log", **PLAIN, **changes))
    expected = oracle(root, reference=other, sync=(3, 0.6))
    assert_equal(read_series(tmp_path / "log"), expected)
    assert expected["kl"][0] > 2 * max(expected["kl"][9], 1)  # it has come nearer
