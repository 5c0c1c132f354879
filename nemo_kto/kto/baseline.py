"""The baseline of a global batch: what its losses need to know of the reference and of all data-parallel ranks.

Tensor legend: `n` samples and `k` documents of the KL set of this rank in the global batch, `b` of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_kto.algorithms.losses import clamped_log_ratios, kl_baseline, sample_coefficients
from nemo_kto.data.batches.packed_rows import KTOBatch
from nemo_kto.kto.scoring import RowScores


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Compares the policy's scores of some rows with the reference's.

    Attributes:
        ref_logps: `[n]` float32, the reference's log-probs of all documents of the rows; None with an interval.
        ref_rows: The reference's scores of the same rows; None without an interval.
        interval: Bounds of each token's log-ratio, see `clamped_log_ratios`; None for no bounds.
    """

    ref_logps: torch.Tensor | None = None
    ref_rows: Sequence[RowScores] | None = None
    interval: tuple[float, float] | None = None

    def log_ratios(self, policy: RowScores, index: int) -> torch.Tensor:
        """Return the log-ratio `[b]` of each document of row `index`, float32, with gradients if `policy` has them."""
        if self.interval is None:
            assert self.ref_logps is not None
            return policy.logps - self.ref_logps[policy.documents]
        return policy.reduced(clamped_log_ratios(policy.token_logps, self._ref_tokens(index), self.interval))

    def unclamped(self, policy: RowScores, index: int) -> torch.Tensor:
        """Return how many tokens `[b]` of each document of row `index` have a log-ratio inside of the interval."""
        assert self.interval is not None
        low, high = self.interval
        log_ratios = policy.token_logps.detach() - self._ref_tokens(index)
        return policy.total(((log_ratios > low) & (log_ratios < high)).float())

    def _ref_tokens(self, index: int) -> torch.Tensor:
        assert self.ref_rows is not None
        return self.ref_rows[index].token_logps


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What one loss needs to know of the whole global batch.

    Attributes:
        comparison: Of this rank's samples with the reference.
        value: `[n]` float32, the baseline that each sample's log-ratio is compared with.
        coefficients: `[n]` float32, what each sample's loss is multiplied with before the global sum.
        sft_coefficients: `[n]` float32, the same of its negative log-likelihood: the mean over desirable samples.
    """

    comparison: Comparison
    value: torch.Tensor
    coefficients: torch.Tensor
    sft_coefficients: torch.Tensor


def form_baseline(
    batch: KTOBatch,
    comparison: Comparison,
    *,
    kl_log_ratios: torch.Tensor | None,
    fixed: float = 0.0,
    kl_group_size: int | None = None,
    loss_reduction: str,
    dp_group: dist.ProcessGroup,
) -> Baseline:
    """Return the baseline: one all-reduce of four numbers over `dp_group`.

    Args:
        batch: This rank's share of the global batch.
        comparison: See `Baseline`.
        kl_log_ratios: `[k]` float32, log-ratios of the KL set; None if there is none.
        fixed: The baseline where there is no KL set, in the unit of log-ratios.
        kl_group_size: Samples that share a z: so many consecutive ones, the i-th sample with the i-th document of the
            KL set; None for the whole global batch.
        loss_reduction: See `sample_coefficients`.
        dp_group: The data-parallel ranks.
    """
    weights, kl_weights = batch.weights, batch.kl_weights
    weighted = (torch.zeros_like(kl_weights) if kl_log_ratios is None else kl_log_ratios).double() * kl_weights
    mine = weighted, kl_weights, weights * batch.desirable, weights * ~batch.desirable
    totals = torch.stack([part.double().sum() for part in mine])
    dist.all_reduce(totals, group=dp_group)
    log_ratio_sum, num_pairs, num_desirable, num_undesirable = totals
    if kl_log_ratios is None:
        value = torch.full_like(weights, fixed)
    elif kl_group_size is None:
        value = kl_baseline(log_ratio_sum, num_pairs).expand(len(weights))
    else:
        groups = zip(weighted.split(kl_group_size), kl_weights.split(kl_group_size), strict=True)
        value = torch.cat([kl_baseline(ratios.sum(), part.sum()).expand(len(ratios)) for ratios, part in groups])
    return Baseline(
        comparison=comparison,
        value=value.float(),
        coefficients=sample_coefficients(
            batch.desirable,
            batch.loss_weights,
            reduction=loss_reduction,
            num_desirable=num_desirable,
            num_undesirable=num_undesirable,
        ),
        sft_coefficients=batch.loss_weights * batch.desirable / num_desirable.clamp(min=1).float(),
    )
