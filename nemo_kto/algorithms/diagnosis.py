"""What the metrics of a run say about its health, in plain words; docs/troubleshooting.md explains each warning.

Most thresholds are about rewards, beta times the log-ratio to the reference. The losses take the sigmoid of
them, so the same numbers mean the same for every beta; the weights of classes and samples do not enter them; and they
are 0 as long as the policy is the reference.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Mapping

WARNINGS = {
    "kl": (
        "The KL estimate stays at zero: it was 0 in {steps} steps after the warm-up, and thumbs-up and thumbs-down "
        "answers get the same rewards, so the model hardly moves, or the reference moves with it. Raise "
        "model.optim.lr, raise model.kto.reference.sync_every_n_steps if it is set, and have a "
        "model.global_batch_size of at least 8."
    ),
    "loss": (
        "The loss is stuck at its start: over {steps} steps after the warm-up it was {loss:.4f} on average, with all "
        "rewards near 0. Most likely the model learns too slowly: raise model.optim.lr, with LoRA to ten times what "
        "the whole model needs, or give more projections adapters with model.peft.lora_tuning.target_modules."
    ),
    "rewards": (
        "The rewards of both classes are falling: from {old_chosen:.2f} to {chosen:.2f} for thumbs-up answers, from "
        "{old_rejected:.2f} to {rejected:.2f} for thumbs-down ones, so the model unlearns good answers too. Lower "
        "model.optim.lr, raise model.kto.desirable_loss_weight, or set model.kto.sft_loss_weight above 0."
    ),
    "gradient": (
        "The gradient is zero: its norm was 0 in {steps} steps in a row, so nothing is learned. If rewards are far "
        "from 0, the model has left the range in which the loss has a slope: lower model.optim.lr. Else see that "
        "model.kto.desirable_loss_weight and model.kto.undesirable_loss_weight are above 0, and that "
        "trainer.precision is not 16-mixed."
    ),
    "margins": (
        "The margins are exploding: the rewards of thumbs-up and thumbs-down answers were more than {limit:.0f} apart "
        "in {steps} steps in a row ({margin:.0f} in this one), so the model is very far from the reference and may "
        "answer nonsense. Lower model.optim.lr, raise model.kto.ref_policy_kl_penalty, and see that "
        "trainer.kto.gradient_clip_val is not 0."
    ),
    "class": (
        "A class is missing from the batches: the last {steps} held no {label} answers. If the data is sorted, set "
        "model.data.shuffle=true; if such answers are rare, raise model.global_batch_size and set "
        "model.kto.{weight}_loss_weight=auto."
    ),
}
"""Kind -> the warning's text, with fields for what was measured."""

_CHOSEN, _REJECTED = "rewards/chosen", "rewards/rejected"
_CLASSES = ((_CHOSEN, "thumbs-up", "desirable"), (_REJECTED, "thumbs-down", "undesirable"))

_ZERO_KL = 5e-4
"""Nats up to which a KL estimate is shown as 0.000."""

_UNMOVED = 0.01
"""Rewards nearer to 0 change a loss of 0.5 by at most half a percent, as the sigmoid's slope there is a quarter."""

_ZERO_GRADIENT = 1e-8
"""Norms below are what rounding leaves, or sigmoids of 20 and more."""

_FALL = 0.3
"""A class has fallen when its mean reward is lower by so much: more than the means of two windows differ by chance."""

_HUGE_MARGIN = 20.0
"""Half of it for each class makes the sigmoids 0 or 1 up to 5e-5: classes so far apart have nothing left to learn."""


class Diagnosis:
    """Watches the metrics of a run and says, once for each kind of `WARNINGS`, what looks wrong and what to change.

    The kinds `kl`, `loss` and `rewards` are judged over windows of `patience` steps, the first two over the first
    window only. Only steps count that changed the weights at a learning rate that did not rise: neither the warm-up
    nor a step that the loss scaler skipped shows whether a run learns.

    Args:
        patience: Steps of a window, and batches in a row without a class before it counts as missing. A zero gradient
            and huge margins have to last a fifth of it.
        has_kl: Whether the loss has a KL estimate; without one there is nothing to say about it.
        near_reference: Whether the reference is meant to follow the policy closely, as with humanline; then it says
            nothing that the KL estimate and the rewards are small.

    Raises:
        ValueError: `patience` is below 1.
    """

    def __init__(self, *, patience: int = 50, has_kl: bool = True, near_reference: bool = False) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, not {patience}")
        self._patience = patience
        self._short = max(1, patience // 5)
        self._has_kl = has_kl
        self._near_reference = near_reference
        self._said: set[str] = set()
        self._streaks: Counter[str] = Counter()
        self._last_lr = -math.inf  # so that the first step counts as warm-up: its metrics are those of the reference
        self._window = _Window()
        self._windows = 0
        self._levels: dict[str, float] = {}

    def update(self, metrics: Mapping[str, float]) -> list[str]:
        """Returns the warnings that a training step gives rise to, most often none; each kind at most once.

        Args:
            metrics: The step's metrics without a stage in their names: `loss`, `kl`, `rewards/chosen`,
                `rewards/rejected`, `rewards/margins`, `grad_norm`, `lr`; others are not read. A class that is absent
                from the batch has no entries, and a step that the loss scaler skipped has no `grad_norm`.
        """
        if self._last_lr == -math.inf:
            # a policy that starts at the reference: its rewards fall from 0, however soon they do
            self._levels = {name: 0.0 for name in (_CHOSEN, _REJECTED) if metrics.get(name) == 0.0}
        found = self._lasting(metrics)
        if self._changes_weights(metrics):
            self._window.add(metrics)
            if self._window.steps == self._patience:
                found |= self._of_window()
        new = {kind: text for kind, text in found.items() if kind not in self._said}
        self._said |= new.keys()
        return list(new.values())

    def _changes_weights(self, metrics: Mapping[str, float]) -> bool:
        """Whether the step was an update at a learning rate that is not rising."""
        lr, last = metrics.get("lr", 0.0), self._last_lr
        self._last_lr = lr
        return "grad_norm" in metrics and 0.0 < lr <= last

    def _lasting(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Returns what has now been seen in enough steps in a row: kind -> text."""
        found: dict[str, str] = {}
        for name, label, weight in _CLASSES:
            if self._lasts(name, name not in metrics, self._patience):
                found["class"] = WARNINGS["class"].format(steps=self._patience, label=label, weight=weight)
        # a batch of nothing but samples of weight 0 has neither a loss nor a gradient, and rightly so
        if "grad_norm" in metrics and metrics.get("loss") != 0.0:
            if self._lasts("gradient", metrics["grad_norm"] < _ZERO_GRADIENT, self._short):
                found["gradient"] = WARNINGS["gradient"].format(steps=self._short)
        if "rewards/margins" in metrics:
            margin = metrics["rewards/margins"]
            if self._lasts("margins", abs(margin) > _HUGE_MARGIN, self._short):
                found["margins"] = WARNINGS["margins"].format(limit=_HUGE_MARGIN, steps=self._short, margin=margin)
        return found

    def _lasts(self, what: str, seen: bool, steps: int) -> bool:
        """Whether `what` was seen in this step and the ones before, `steps` in a row."""
        self._streaks[what] = self._streaks[what] + 1 if seen else 0
        return self._streaks[what] >= steps

    def _of_window(self) -> dict[str, str]:
        """Returns what the full window shows, and begins another: kind -> text."""
        window, self._window = self._window, _Window()
        self._windows += 1
        found: dict[str, str] = {}
        rewards = window.means(_CHOSEN, _REJECTED)
        if self._windows == 1 and rewards and not self._near_reference:
            if self._has_kl and window.zero_kl and not _moved_apart(list(rewards.values())):
                found["kl"] = WARNINGS["kl"].format(steps=window.steps)
            if all(abs(reward) < _UNMOVED for reward in rewards.values()):
                loss = window.means("loss").get("loss", math.nan)
                found["loss"] = WARNINGS["loss"].format(steps=window.steps, loss=loss)
        old = {name: self._levels.setdefault(name, reward) for name, reward in rewards.items()}
        if len(rewards) == 2 and all(rewards[name] < min(0.0, old[name] - _FALL) for name in rewards):
            found["rewards"] = WARNINGS["rewards"].format(
                old_chosen=old[_CHOSEN],
                chosen=rewards[_CHOSEN],
                old_rejected=old[_REJECTED],
                rejected=rewards[_REJECTED],
            )
        return found


class GradientSpikes:
    """Says when a gradient is far larger than those before, once for each spike, and in the end no more.

    It looks at the steps that this process has taken: after a resume it has to see some before it judges again.

    Args:
        factor: Times the median of the norms before that a spike is above.
        window: So many norms before count; half of them have to be there.
        most: Spikes that are said.
    """

    def __init__(self, *, factor: float = 10.0, window: int = 50, most: int = 10) -> None:
        self._factor = factor
        self._window = window
        self._norms: deque[float] = deque(maxlen=window)
        self._most = most
        self._said = 0
        self._above = False

    def update(self, norm: float, *, step: int) -> str | None:
        """Return what to say of a step; most often None.

        Args:
            norm: The gradient's norm before it was clipped, finite.
            step: Number of the step, from 1.
        """
        before, known = self._above, len(self._norms)
        median = statistics.median(self._norms) if 2 * known >= self._window else 0.0
        self._above = norm > self._factor * median > 0.0
        self._norms.append(norm)
        if not self._above or before or self._said == self._most:
            return None
        self._said += 1
        last = " Further ones are not said." if self._said == self._most else ""
        return (
            f"The gradient of step {step} is a spike: its norm is {norm:.3g}, and the median of the {known} steps "
            f"before {median:.3g}. If more follow, lower model.optim.lr, and see that "
            f"trainer.kto.gradient_clip_val is not 0.{last}"
        )


def _moved_apart(rewards: list[float]) -> bool:
    """Whether the mean rewards of the classes differ; of a single class, whether its reward differs from 0."""
    if len(rewards) == 1:
        return abs(rewards[0]) >= _UNMOVED
    return abs(rewards[0] - rewards[1]) >= 2 * _UNMOVED


class _Window:
    """Means of metrics over some steps.

    Attributes:
        steps: How many were added.
        zero_kl: Whether the KL estimate was zero in all of them.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.zero_kl = True
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()

    def add(self, metrics: Mapping[str, float]) -> None:
        self.steps += 1
        self.zero_kl = self.zero_kl and metrics.get("kl", math.inf) <= _ZERO_KL
        for name in (_CHOSEN, _REJECTED, "loss"):
            if name in metrics:
                self._sums[name] += metrics[name]
                self._counts[name] += 1

    def means(self, *names: str) -> dict[str, float]:
        """Returns the mean of each metric over the steps that had it, without those that no step had."""
        return {name: self._sums[name] / self._counts[name] for name in names if self._counts[name]}
