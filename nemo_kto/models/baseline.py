"""The baseline of a global batch: what its losses need to know of all data-parallel ranks.

Tensor legend: `n` samples of this rank in the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_kto.algorithms.losses import kl_baseline, sample_coefficients
from nemo_kto.data.batching import KTOBatch


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What one loss needs to know of the whole global batch.

    Attributes:
        ref_logps: `[n]` float32, the reference's log-probs of this rank's samples.
        kl_estimate: `[n]` float32, the clamped baseline z of each sample (one value under `kl_scope=global_batch`).
        coefficients: `[n]` float32, what each sample's loss is multiplied with before the global sum.
    """

    ref_logps: torch.Tensor
    kl_estimate: torch.Tensor
    coefficients: torch.Tensor


def form_baseline(
    batch: KTOBatch,
    *,
    policy_kl: torch.Tensor,
    ref_kl: torch.Tensor,
    ref_logps: torch.Tensor,
    kl_group_size: int | None,
    loss_reduction: str,
    dp_group: dist.ProcessGroup,
) -> Baseline:
    """Return the baseline: one all-reduce of three numbers over `dp_group`.

    Args:
        batch: This rank's share of the global batch.
        policy_kl: `[n]` float32, the policy's log-probs of the KL set.
        ref_kl: `[n]` float32, the reference's.
        ref_logps: `[n]` float32, the reference's log-probs of the samples.
        kl_group_size: Samples that share a z: so many consecutive ones; None for the whole global batch.
        loss_reduction: See `sample_coefficients`.
        dp_group: The data-parallel ranks.
    """
    kl_log_ratios = (policy_kl - ref_kl).double() * batch.weights
    totals = torch.stack(
        [
            kl_log_ratios.sum(),
            (batch.weights * batch.desirable).sum().double(),
            (batch.weights * ~batch.desirable).sum().double(),
        ]
    )
    dist.all_reduce(totals, group=dp_group)
    log_ratio_sum, num_desirable, num_undesirable = totals
    if kl_group_size is None:
        kl_estimate = kl_baseline(log_ratio_sum, num_desirable + num_undesirable).expand(len(ref_logps))
    else:
        groups = zip(kl_log_ratios.split(kl_group_size), batch.weights.split(kl_group_size), strict=True)
        kl_estimate = torch.cat(
            [kl_baseline(ratios.sum(), weights.sum()).expand(len(ratios)) for ratios, weights in groups]
        )
    return Baseline(
        ref_logps=ref_logps,
        kl_estimate=kl_estimate.float(),
        coefficients=sample_coefficients(
            batch.desirable,
            batch.weights,
            reduction=loss_reduction,
            num_desirable=num_desirable,
            num_undesirable=num_undesirable,
        ),
    )
