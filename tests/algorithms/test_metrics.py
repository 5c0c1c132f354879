"""Metrics merged over ranks against means worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_kto.algorithms.metrics import MetricSums, add_kto_metrics


def add(sums: MetricSums, **changes: Any) -> None:
    """Add two samples: a desirable one of reward 2 and an undesirable one of reward 1."""
    values = {
        "losses": torch.tensor([0.25, 0.75]),
        "rewards": torch.tensor([2.0, 1.0]),
        "policy_logps": torch.tensor([-10.0, -20.0]),
        "desirable": torch.tensor([True, False]),
        "weights": torch.ones(2),
        "loss_weights": torch.ones(2),
    }
    add_kto_metrics(sums, **{**values, **changes})


def test_one_rank_by_hand() -> None:
    sums = MetricSums()
    add(sums)
    assert sums.means() == {
        "loss": 0.5,
        "loss/chosen": 0.25,
        "loss/rejected": 0.75,
        "rewards/chosen": 2.0,
        "rewards/rejected": 1.0,
        "rewards/margins": 1.0,
        "rewards/accuracies": 0.5,  # a positive reward is right for the desirable sample only
        "logps/chosen": -10.0,
        "logps/rejected": -20.0,
    }


def merge_ranks_of_opposite_labels() -> dict[str, float]:
    """Rank 0 has three desirable samples of rewards 1, 2, 3, rank 1 one undesirable sample of reward -4."""
    sums = MetricSums()
    if dist.get_rank() == 0:
        rewards, labels = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, True])
    else:
        rewards, labels = torch.tensor([-4.0]), torch.tensor([False])
    ones = torch.ones(len(rewards))
    add(
        sums,
        losses=rewards,
        rewards=rewards,
        policy_logps=-ones,
        desirable=labels,
        weights=ones,
        loss_weights=ones,
    )
    sums.reduce_()
    return sums.means()


def test_ranks_of_opposite_labels(run_ranks: Callable[..., Any]) -> None:
    """Chosen (1 + 2 + 3) / 3 = 2, rejected -4, margin 6; the mean of all losses (6 - 4) / 4 = 0.5.

    Means over each rank first would give a loss of (2 - 4) / 2 = -1; splitting all rewards by the local rank's labels,
    as NeMo-Aligner 0.7.0 does, gives each rank another wrong pair.
    """
    for means in run_ranks(merge_ranks_of_opposite_labels, 2):
        assert means["rewards/chosen"] == 2.0 and means["rewards/rejected"] == -4.0
        assert means["rewards/margins"] == 6.0 and means["loss"] == 0.5 and means["rewards/accuracies"] == 1.0


def test_an_absent_class_is_left_out() -> None:
    sums = MetricSums()
    add(sums, desirable=torch.tensor([True, True]))
    means = sums.means()
    assert means["rewards/chosen"] == 1.5
    assert not {"rewards/rejected", "rewards/margins", "logps/rejected", "loss/rejected"} & set(means)


def test_a_weight_of_zero_removes_even_infinities() -> None:
    sums = MetricSums()
    add(sums, losses=torch.tensor([0.25, float("inf")]), weights=torch.tensor([1.0, 0.0]))
    means = sums.means()
    assert means["loss"] == 0.25 and "loss/rejected" not in means


def test_a_sample_s_own_weight_scales_its_loss_only() -> None:
    """Losses 3 * 0.25 and 0.5 * 0.75, mean 0.5625; rewards, accuracies and log-probs count each sample once."""
    plain, weighted = MetricSums(), MetricSums()
    add(plain)
    add(weighted, loss_weights=torch.tensor([3.0, 0.5]))
    means = weighted.means()
    assert (means["loss"], means["loss/chosen"], means["loss/rejected"]) == (0.5625, 0.75, 0.375)
    assert {name: value for name, value in means.items() if "loss" not in name} == {
        name: value for name, value in plain.means().items() if "loss" not in name
    }


def test_a_reward_of_zero_is_not_accurate() -> None:
    sums = MetricSums()
    add(sums, rewards=torch.zeros(2))
    assert sums.means()["rewards/accuracies"] == 0.0


def test_tokens_are_a_sum() -> None:
    sums = MetricSums()
    sums.add("tokens", torch.tensor([5, 7]), torch.ones(2))
    sums.add("tokens", torch.tensor([9, 9]), torch.tensor([1.0, 0.0]))
    assert sums.means() == {"tokens": 21.0}


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="accuracy"):
        MetricSums().add("accuracy", torch.ones(1), torch.ones(1))
