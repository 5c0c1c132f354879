"""The objective of a run: its loss, what is added to it, and the metrics that describe it.

Tensor legend: `n` samples of this rank in the global batch, `b` samples of one micro-batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from nemo_kto.algorithms.losses import LOSSES, Loss
from nemo_kto.algorithms.metrics import MetricSums, add_kto_metrics
from nemo_kto.config.plugins import load_loss
from nemo_kto.config.schema import KTOLossConfig
from nemo_kto.data.batches.packed_rows import KTOBatch
from nemo_kto.errors import ConfigError
from nemo_kto.kto.baseline import Baseline
from nemo_kto.kto.scoring import RowScores


class Objective:
    """What is minimised: (1/G) * sum of w_i * loss_i over the global batch, plus the weighted SFT term.

    With `loss_reduction: class_mean` the first part is the mean over each class instead. The SFT term is the mean
    negative log-likelihood of the batch's desirable samples, times `sft_loss_weight`.

    Args:
        kto: `model.kto`, its class weights settled.

    Attributes:
        interval: Bounds of each token's log-ratio (humanline); None for none.
        kl_set: Whether the baseline is formed from a KL set.
    """

    def __init__(self, kto: KTOLossConfig) -> None:
        self.kto = kto
        self.interval: tuple[float, float] | None = None
        if kto.humanline_clamp is not None:
            low, high = kto.humanline_clamp
            self.interval = (low, high)
        self._loss = LOSSES.get(kto.loss) or Loss(load_loss(kto), "kl")
        self.kl_set = self._loss.baseline == "kl"
        self._mean, self._steps = 0.0, 0

    @property
    def fixed_baseline(self) -> float:
        """The baseline of a loss without KL set, in the unit of log-ratios."""
        return self._mean

    def micro_batch_loss(
        self, batch: KTOBatch, baseline: Baseline, scores: RowScores, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a micro-batch's share of the loss, and what `observe` returns; last stage only.

        Args:
            batch: This rank's share of the global batch.
            baseline: Its baseline.
            scores: The policy's scores of the micro-batch.
            index: Number of the micro-batch.
        """
        part = scores.documents
        log_ratios = baseline.comparison.log_ratios(scores, index)
        losses, _ = self._losses(log_ratios, batch.desirable[part], baseline.value[part])
        loss = (losses * baseline.coefficients[part]).sum()
        if self.kto.sft_loss_weight:
            likelihoods = self._negative_log_likelihoods(scores.logps, scores.lengths)
            loss = loss + self.kto.sft_loss_weight * (likelihoods * baseline.sft_coefficients[part]).sum()
        return loss, self._observed(scores, baseline, index, log_ratios)

    @torch.no_grad()
    def observe(self, scores: RowScores, baseline: Baseline, index: int) -> torch.Tensor:
        """Return what metrics need of a micro-batch, `[2, b]` or `[3, b]` float32.

        The rows are log-probs, log-ratios and, with an interval, the number of tokens inside of it.
        """
        return self._observed(scores, baseline, index, baseline.comparison.log_ratios(scores, index))

    def _observed(self, scores: RowScores, baseline: Baseline, index: int, log_ratios: torch.Tensor) -> torch.Tensor:
        rows = [scores.logps.detach(), log_ratios.detach()]
        if self.interval is not None:
            rows.append(baseline.comparison.unclamped(scores, index))
        return torch.stack(rows)

    def _losses(
        self, log_ratios: torch.Tensor, desirable: torch.Tensor, baseline: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._loss.function(
            log_ratios,
            desirable,
            baseline,
            beta=self.kto.ref_policy_kl_penalty,
            desirable_weight=self._number(self.kto.desirable_loss_weight),
            undesirable_weight=self._number(self.kto.undesirable_loss_weight),
        )
        shapes = [list(part.shape) for part in found] if isinstance(found, tuple | list) else [list(found.shape)]
        if shapes != [list(log_ratios.shape)] * 2:
            # a mean, say, would be taken for the loss of every sample without a word
            raise ConfigError(
                f"model.kto.loss={self.kto.loss} returned shapes {shapes} for {len(log_ratios)} samples. It has to "
                "return (losses, rewards), with a number for each sample."
            )
        losses, rewards = found
        return losses, rewards

    @staticmethod
    def _number(weight: float | str) -> float:
        assert not isinstance(weight, str), "settle_loss_weights has made a number of auto"
        return weight

    def _negative_log_likelihoods(self, logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return `-logps` as `sft_average_log_probs` wants it, sum or mean over a response's tokens."""
        if self.kto.sft_average_log_probs == self.kto.preference_average_log_probs:
            return -logps
        return -logps / lengths if self.kto.sft_average_log_probs else -logps * lengths

    def add_metrics(self, sums: MetricSums, batch: KTOBatch, baseline: Baseline, observed: torch.Tensor) -> None:
        """Add this rank's samples to `sums`.

        Args:
            sums: Where to add.
            batch: This rank's share of the global batch.
            baseline: Its baseline.
            observed: What `observe` returns, of all micro-batches: `[2, n]` or `[3, n]`.
        """
        logps, log_ratios = observed[:2]
        lengths = torch.tensor([response.numel() for _, response in batch.samples], device=logps.device)
        losses, rewards = self._losses(log_ratios, batch.desirable, baseline.value)
        add_kto_metrics(
            sums,
            losses=losses,
            rewards=rewards,
            policy_logps=logps,
            desirable=batch.desirable,
            weights=batch.weights,
            loss_weights=batch.loss_weights,
        )
        sums.add("log_ratios", log_ratios, batch.weights)
        if self.kl_set:
            sums.add("kl", baseline.value, batch.weights)
        if self.interval is not None:
            sums.add("unclamped", observed[2] / lengths, batch.weights * lengths)
        if self.kto.sft_loss_weight:
            likelihoods = self._negative_log_likelihoods(logps, lengths)
            sums.add("sft_loss", likelihoods * batch.loss_weights, batch.weights * batch.desirable)

    def finish_metrics(self, metrics: dict[str, float], *, learn: bool) -> None:
        """Complete the metrics of a whole global batch, or of a validation, in place.

        Args:
            metrics: Means over all ranks.
            learn: Whether the batch was trained on, so that a running baseline takes it in.
        """
        mean = metrics.pop("log_ratios", 0.0)
        if self.kto.loss_reduction == "class_mean":
            metrics["loss"] = metrics.get("loss/chosen", 0.0) + metrics.get("loss/rejected", 0.0)
        metrics["loss"] += self.kto.sft_loss_weight * metrics.get("sft_loss", 0.0)
        if self._loss.baseline == "running_mean":
            metrics["delta"] = self.kto.ref_policy_kl_penalty * self._mean
            if learn and math.isfinite(mean):  # a batch that float16 could not hold teaches nothing
                self._steps += 1  # all batches have the same number of samples
                self._mean += (mean - self._mean) / self._steps

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: plain numbers, the same on every rank."""
        return {"mean_log_ratio": self._mean, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._mean, self._steps = state["mean_log_ratio"], state["steps"]
