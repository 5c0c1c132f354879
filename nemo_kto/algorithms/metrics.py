"""Metrics as sums and counts: one collective merges all ranks, means are taken at the end.

A mean of means over ranks or micro-batches would weigh samples unequally, and averaging a class over ranks that do not
have it would dilute it; sums and counts have neither problem.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_NAMES = (
    "loss",
    "loss/chosen",
    "loss/rejected",
    "sft_loss",
    "kl",
    "unclamped",
    "log_ratios",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "tokens",
    "flops",
)
"""Every rank holds the same slots in the same order, whatever its part of the batch contains."""

_TOTALS = ("tokens", "flops")
"""Those of which the sum is wanted."""


class MetricSums:
    """Sums and counts of the metrics of one global batch, or of a whole validation.

    Args:
        device: Where the sums live; the device of the process group's backend.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._slots = torch.zeros(len(_NAMES), 2, dtype=torch.float64, device=device)

    def add(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Add `values` `[b]` to a metric; `weights` `[b]` (bool or number) says how much each counts.

        Raises:
            ValueError: There is no metric of this name.
        """
        if name not in _NAMES:
            raise ValueError(f"unknown metric {name!r}; there are {', '.join(_NAMES)}")
        values, weights = values.detach().double(), weights.double()
        slot = self._slots[_NAMES.index(name)]
        # a weight of zero must remove a value for good, an infinite one included
        slot[0] += torch.where(weights > 0, values * weights, 0.0).sum()
        slot[1] += weights.sum()

    def reduce_(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up over all ranks of `group` (default: the world) in place: one all-reduce of 28 float64."""
        dist.all_reduce(self._slots, group=group)

    def means(self) -> dict[str, float]:
        """Return the mean of every metric that was counted; `tokens` and `flops` are sums.

        A class that is absent has no means, rather than zeros. `rewards/margins` is the difference of the two classes'
        mean rewards and needs both.
        """
        sums, counts = self._slots.T.tolist()
        means = {name: total / count for name, total, count in zip(_NAMES, sums, counts, strict=True) if count > 0}
        means |= {name: sums[_NAMES.index(name)] for name in _TOTALS if name in means}
        if "rewards/chosen" in means and "rewards/rejected" in means:
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means


def add_kto_metrics(
    sums: MetricSums,
    *,
    losses: Tensor,
    rewards: Tensor,
    policy_logps: Tensor,
    desirable: Tensor,
    weights: Tensor,
    loss_weights: Tensor,
) -> None:
    """Add one batch's samples to `sums`, with the names of TRL's KTOTrainer where it has one.

    `rewards/accuracies` is the share of samples whose reward has the sign of their label: positive for desirable,
    negative for undesirable. A reward of exactly zero counts as wrong.

    Args:
        sums: Where to add.
        losses: `[b]` float32.
        rewards: `[b]` float32, beta times the log-ratio.
        policy_logps: `[b]` float32, natural log.
        desirable: `[b]` bool.
        weights: `[b]` float32, 1 for a sample, 0 for one that only fills a place.
        loss_weights: `[b]` float32, what each loss is multiplied with.
    """
    chosen, rejected = weights * desirable, weights * ~desirable
    losses = losses * loss_weights
    sums.add("loss", losses, weights)
    sums.add("rewards/accuracies", torch.where(desirable, rewards > 0, rewards < 0), weights)
    for name, values in (("loss", losses), ("rewards", rewards), ("logps", policy_logps)):
        sums.add(f"{name}/chosen", values, chosen)
        sums.add(f"{name}/rejected", values, rejected)
