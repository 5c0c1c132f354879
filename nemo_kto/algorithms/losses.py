"""The KTO loss as a pure function of log-ratios and a given baseline.

Tensor legend: `b` samples; log-probs are natural logarithms, summed (or averaged) over response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class KTOLossOutput(NamedTuple):
    """What a loss returns for each sample.

    Attributes:
        losses: `[b]` float32, unreduced.
        rewards: `[b]` float32, detached, beta times the log-ratio.
    """

    losses: Tensor
    rewards: Tensor


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    kl_estimate: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLossOutput:
    """Return each sample's KTO loss, `w - v(x, y)` of arXiv 2402.01306, equations 7 and 8.

    With the log-ratio `r = logp_policy - logp_ref` and the baseline `z`:

        desirable:   w_d * (1 - sigmoid(beta * (r - z)))
        undesirable: w_u * (1 - sigmoid(beta * (z - r)))

    Args:
        log_ratios: `[b]` float32, r.
        desirable: `[b]` bool, the label.
        kl_estimate: Scalar or `[b]` float32, z: already clamped at zero, no gradient flows through it.
        beta: Risk aversion; larger keeps the policy closer to the reference.
        desirable_weight: w_d.
        undesirable_weight: w_u.
    """
    advantage = torch.where(desirable, log_ratios - kl_estimate.detach(), kl_estimate.detach() - log_ratios)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    losses = weights * (1.0 - torch.sigmoid(beta * advantage))
    return KTOLossOutput(losses=losses, rewards=beta * log_ratios.detach())


LOSSES: dict[str, Callable[..., KTOLossOutput]] = {"kto": kto_loss}
"""Values of `model.kto.loss` -> functions with the signature of `kto_loss`."""


def kl_baseline(log_ratio_sum: Tensor, count: Tensor) -> Tensor:
    """Return z, the mean log-ratio of the KL set clamped at zero (arXiv 2402.01306, section 4.1).

    The clamp comes after sum and count have been added up over all ranks: clamping each rank's mean first would bias
    z upwards and make it depend on the layout.

    Args:
        log_ratio_sum: Scalar, sum of logp_policy - logp_ref over the KL set.
        count: Scalar, size of the KL set; 0 gives z = 0.
    """
    return (log_ratio_sum / count.clamp(min=1)).clamp(min=0)


def sample_coefficients(
    desirable: Tensor, weights: Tensor, *, reduction: str, num_desirable: Tensor, num_undesirable: Tensor
) -> Tensor:
    """Return what to multiply each loss with so that the sum over the global batch is the reduced loss.

    Args:
        desirable: `[b]` bool.
        weights: `[b]` float32, 1 for a sample, 0 for one that only fills a place.
        reduction: `sample_mean`, each sample counts 1/G; or `class_mean`, the mean over the desirable samples plus
            the mean over the undesirable ones, a class that is absent counting 0.
        num_desirable: Scalar, desirable samples in the global batch.
        num_undesirable: Scalar, undesirable samples in the global batch.

    Returns:
        `[b]` float32.

    Raises:
        ValueError: `reduction` is neither of the two.
    """
    if reduction == "sample_mean":
        return weights / (num_desirable + num_undesirable).clamp(min=1).to(weights.dtype)
    if reduction == "class_mean":
        size = torch.where(desirable, num_desirable, num_undesirable)
        return weights / size.clamp(min=1).to(weights.dtype)
    raise ValueError(f"reduction must be sample_mean or class_mean, not {reduction!r}")
