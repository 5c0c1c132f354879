"""Losses for binary feedback as pure functions of log-ratios and a given baseline.

Tensor legend: `b` samples, `R` response tokens; log-probs are natural logarithms, summed (or averaged) over response
tokens; a log-ratio is r = logp_policy - logp_ref.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class KTOLossOutput(NamedTuple):
    """What a loss returns for each sample.

    Attributes:
        losses: `[b]` float32, unreduced.
        rewards: `[b]` float32, detached, beta times the log-ratio.
    """

    losses: Tensor
    rewards: Tensor


LossFunction = Callable[..., KTOLossOutput]
"""A loss: each sample's value from its log-ratio, its label and a baseline; `kto_loss` has the arguments."""


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLossOutput:
    """Return each sample's KTO loss, `w - v(x, y)` of arXiv 2402.01306, equations 7 and 8.

    With the baseline z, an estimate of the KL divergence from the reference, already clamped at zero:

        desirable:   w_d * (1 - sigmoid(beta * (r - z)))
        undesirable: w_u * (1 - sigmoid(beta * (z - r)))

    Args:
        log_ratios: `[b]` float32, r.
        desirable: `[b]` bool, the label.
        baseline: Scalar or `[b]` float32, what r is compared with, in the unit of r; no gradient flows through it.
        beta: Scale of the rewards; larger keeps the policy closer to the reference.
        desirable_weight: w_d.
        undesirable_weight: w_u.
    """
    advantages = _advantages(log_ratios, desirable, baseline)
    weights = _class_weights(desirable, desirable_weight, undesirable_weight)
    return KTOLossOutput(losses=weights * (1.0 - torch.sigmoid(beta * advantages)), rewards=beta * log_ratios.detach())


def apo_zero_unpaired_loss(
    log_ratios: Tensor, desirable: Tensor, baseline: Tensor, **settings: float
) -> KTOLossOutput:
    """Return each sample's part of APO-zero, arXiv 2408.06266, equation 7, taken apart for samples without a pair.

        desirable:   w_d * (1 - sigmoid(beta * r))
        undesirable: w_u * sigmoid(beta * r)

    That is KTO whose baseline is zero: it pulls the log-probs of desirable responses up and those of undesirable ones
    down, whatever the policy does elsewhere. As in TRL's `KTOTrainer` (1.16.0, `loss_type="apo_zero_unpaired"`).

    Arguments are those of `kto_loss`; `baseline` is not used.
    """
    return kto_loss(log_ratios, desirable, torch.zeros_like(baseline), **settings)


def bco_loss(
    log_ratios: Tensor, desirable: Tensor, baseline: Tensor, *, beta: float, **weights: float
) -> KTOLossOutput:
    """Return each sample's cross-entropy of a binary classifier whose logit is the shifted reward, arXiv 2404.04656.

    With the reward shift delta = beta * baseline, the mean reward of the samples seen before:

        desirable:   -w_d * log(sigmoid(beta * r - delta))
        undesirable: -w_u * log(sigmoid(delta - beta * r))

    As in TRL's `BCOTrainer` (f2cd57710a), which however counts the batch itself among the samples seen.

    Arguments are those of `kto_loss`.
    """
    advantages = _advantages(log_ratios, desirable, baseline)
    losses = -_class_weights(desirable, **weights) * F.logsigmoid(beta * advantages)
    return KTOLossOutput(losses=losses, rewards=beta * log_ratios.detach())


class Loss(NamedTuple):
    """A value of `model.kto.loss`.

    Attributes:
        function: The loss.
        baseline: Where its baseline comes from. "kl": from the KL set; only then is there one. "zero": there is none.
            "running_mean": the mean log-ratio of all samples of the steps before.
    """

    function: LossFunction
    baseline: Literal["kl", "zero", "running_mean"]


LOSSES = {
    "kto": Loss(kto_loss, "kl"),
    "apo_zero_unpaired": Loss(apo_zero_unpaired_loss, "zero"),
    "bco": Loss(bco_loss, "running_mean"),
}
"""Values of `model.kto.loss`."""


def _advantages(log_ratios: Tensor, desirable: Tensor, baseline: Tensor) -> Tensor:
    baseline = baseline.detach()
    return torch.where(desirable, log_ratios - baseline, baseline - log_ratios)


def _class_weights(desirable: Tensor, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    return torch.where(desirable, desirable_weight, undesirable_weight)


def clamped_log_ratios(policy_token_logps: Tensor, ref_token_logps: Tensor, interval: tuple[float, float]) -> Tensor:
    """Return each token's log-ratio within bounds, the humanline variant of arXiv 2509.24207 (section 4).

    A token outside of the interval has no gradient: the policy is neither pushed further away from the reference nor
    back. As in HALOs (train/trainers.py `get_sequence_rewards`, 4831988636).

    Args:
        policy_token_logps: `[R]` float32, natural log.
        ref_token_logps: `[R]` float32.
        interval: log(epsilon_P) < 0 and log(epsilon_R) > 0; HALOs' are -1.0 and 1.5.

    Returns:
        `[R]` float32.
    """
    return (policy_token_logps - ref_token_logps).clamp(*interval)


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
        weights: `[b]` float32, a sample's own weight, 1 if it has none; 0 for one that only fills a place.
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
