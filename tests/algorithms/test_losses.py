"""The losses, KTO's baseline and the weighting of samples against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_kto.algorithms.losses import (
    apo_zero_unpaired_loss,
    bco_loss,
    clamped_log_ratios,
    kl_baseline,
    kto_loss,
    sample_coefficients,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_losses_worked_by_hand() -> None:
    """With beta = 0.5, z = 1, w_d = 2, w_u = 3.

    desirable,   r = 3:  2 * (1 - sigmoid(0.5 * (3 - 1)))  = 2 * (1 - sigmoid(1))  = 2 * 0.268941 = 0.537883
    undesirable, r = 3:  3 * (1 - sigmoid(0.5 * (1 - 3)))  = 3 * (1 - sigmoid(-1)) = 3 * 0.731059 = 2.193176
    desirable,   r = -1: 2 * (1 - sigmoid(0.5 * (-1 - 1))) = 2 * 0.731059 = 1.462117
    undesirable, r = -1: 3 * (1 - sigmoid(0.5 * (1 + 1)))  = 3 * 0.268941 = 0.806824
    rewards are beta * r, without the weights and without z.
    """
    output = kto_loss(
        torch.tensor([3.0, 3.0, -1.0, -1.0]),
        torch.tensor([True, False, True, False]),
        torch.tensor(1.0),
        beta=0.5,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    torch.testing.assert_close(output.losses, torch.tensor([0.537883, 2.193176, 1.462117, 0.806824]))
    assert output.rewards.tolist() == [1.5, 1.5, -0.5, -0.5]


def test_apo_zero_worked_by_hand() -> None:
    """With beta = 0.5, w_d = 2, w_u = 3, whatever the baseline.

    desirable,   r = 2:  2 * (1 - sigmoid(1))  = 2 * 0.268941 = 0.537883
    undesirable, r = 2:  3 * sigmoid(1)        = 3 * 0.731059 = 2.193176
    desirable,   r = -4: 2 * (1 - sigmoid(-2)) = 2 * 0.880797 = 1.761594
    undesirable, r = -4: 3 * sigmoid(-2)       = 3 * 0.119203 = 0.357609
    """
    output = apo_zero_unpaired_loss(
        torch.tensor([2.0, 2.0, -4.0, -4.0]),
        torch.tensor([True, False, True, False]),
        torch.tensor(7.0),
        beta=0.5,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    torch.testing.assert_close(output.losses, torch.tensor([0.537883, 2.193176, 1.761594, 0.357609]))
    assert output.rewards.tolist() == [1.0, 1.0, -2.0, -2.0]


def test_bco_worked_by_hand() -> None:
    """With beta = 0.5, a mean log-ratio of 2 (delta = 1), w_d = 2, w_u = 3; softplus(x) = log(1 + exp(x)).

    desirable,   r = 4:  2 * softplus(-(2 - 1))  = 2 * 0.313262 = 0.626523
    undesirable, r = 4:  3 * softplus(2 - 1)     = 3 * 1.313262 = 3.939785
    desirable,   r = -2: 2 * softplus(-(-1 - 1)) = 2 * 2.126928 = 4.253856
    undesirable, r = -2: 3 * softplus(-1 - 1)    = 3 * 0.126928 = 0.380784
    """
    output = bco_loss(
        torch.tensor([4.0, 4.0, -2.0, -2.0]),
        torch.tensor([True, False, True, False]),
        torch.tensor(2.0),
        beta=0.5,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    torch.testing.assert_close(output.losses, torch.tensor([0.626523, 3.939785, 4.253856, 0.380784]))
    assert output.rewards.tolist() == [2.0, 2.0, -1.0, -1.0]


def test_bco_does_not_saturate() -> None:
    """The cross-entropy of a hopeless sample grows with its reward, and its gradient stays beta * w."""
    ratios = torch.tensor([-1e4], requires_grad=True)
    output = bco_loss(ratios, torch.tensor([True]), torch.tensor(0.0), beta=0.1)
    output.losses.sum().backward()
    assert output.losses.item() == pytest.approx(1000.0) and ratios.grad is not None
    assert ratios.grad.item() == pytest.approx(-0.1)


def test_token_log_ratios_are_clamped_one_by_one() -> None:
    """Log-ratios -3, 0.5 and 4 within [-1, 1.5]: -1 + 0.5 + 1.5 = 1, where the sum of all, 1.5, were inside.

    Tokens outside have no gradient.
    """
    policy = torch.tensor([-4.0, -0.5, -1.0], requires_grad=True)
    ratios = clamped_log_ratios(policy, torch.tensor([-1.0, -1.0, -5.0]), (-1.0, 1.5))
    assert ratios.tolist() == [-1.0, 0.5, 1.5]
    ratios.sum().backward()
    assert policy.grad is not None and policy.grad.tolist() == [0.0, 1.0, 0.0]


def test_gradient_worked_by_hand() -> None:
    """d/dr of w_d * (1 - sigmoid(beta (r - z))) is -w_d beta s (1 - s); undesirable the same with the other sign.

    No gradient reaches the baseline, and none leaves by the rewards.
    """
    ratios = torch.tensor([3.0, 3.0], requires_grad=True)
    baseline = torch.tensor(1.0, requires_grad=True)
    output = kto_loss(
        ratios, torch.tensor([True, False]), baseline, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0
    )
    output.losses.sum().backward()
    slope = 0.5 * sigmoid(1) * (1 - sigmoid(1))
    torch.testing.assert_close(ratios.grad, torch.tensor([-2 * slope, 3 * slope]))
    assert baseline.grad is None and not output.rewards.requires_grad


def test_one_half_where_policy_equals_reference() -> None:
    output = kto_loss(torch.zeros(2), torch.tensor([True, False]), torch.zeros(2), beta=0.1)
    assert output.losses.tolist() == [0.5, 0.5]


def test_a_baseline_for_each_sample() -> None:
    """Each sample's own z: r - z = 2 and 0 for two desirable samples."""
    output = kto_loss(torch.tensor([3.0, 3.0]), torch.tensor([True, True]), torch.tensor([1.0, 3.0]), beta=1.0)
    torch.testing.assert_close(output.losses, torch.tensor([1 - sigmoid(2), 0.5]))


def test_extreme_ratios_stay_finite() -> None:
    ratios = torch.tensor([1e4, -1e4], requires_grad=True)
    output = kto_loss(ratios, torch.tensor([True, True]), torch.tensor(0.0), beta=1.0)
    output.losses.sum().backward()
    assert output.losses.tolist() == [0.0, 1.0]
    assert ratios.grad is not None and ratios.grad.isfinite().all()


def test_the_baseline_is_clamped_after_the_sum() -> None:
    """Two ranks with sums 6 and -2 over 2 pairs each: z = max(0, 4 / 4) = 1.

    Clamping each rank first, as NeMo-Aligner did, would give (3 + 0) / 2 = 1.5.
    """
    assert kl_baseline(torch.tensor(6.0) + torch.tensor(-2.0), torch.tensor(4)).item() == 1.0
    assert kl_baseline(torch.tensor(-3.0), torch.tensor(4)).item() == 0.0
    assert kl_baseline(torch.tensor(0.0), torch.tensor(0)).item() == 0.0


DESIRABLE = torch.tensor([True, False, False, False])
WEIGHTS = torch.tensor([1.0, 1.0, 1.0, 0.0])  # the last one only fills a place
COUNTS = {"num_desirable": torch.tensor(1), "num_undesirable": torch.tensor(2)}


def test_each_sample_counts_equally_in_a_sample_mean() -> None:
    coefficients = sample_coefficients(DESIRABLE, WEIGHTS, reduction="sample_mean", **COUNTS)
    torch.testing.assert_close(coefficients, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]))


def test_each_class_counts_equally_in_a_class_mean() -> None:
    coefficients = sample_coefficients(DESIRABLE, WEIGHTS, reduction="class_mean", **COUNTS)
    torch.testing.assert_close(coefficients, torch.tensor([1.0, 0.5, 0.5, 0.0]))


@pytest.mark.parametrize("reduction", ["sample_mean", "class_mean"])
def test_an_absent_class_is_no_division_by_zero(reduction: str) -> None:
    coefficients = sample_coefficients(
        torch.tensor([True, True]),
        torch.ones(2),
        reduction=reduction,
        num_desirable=torch.tensor(2),
        num_undesirable=torch.tensor(0),
    )
    assert coefficients.tolist() == [0.5, 0.5]


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="sample_mean or class_mean"):
        sample_coefficients(DESIRABLE, WEIGHTS, reduction="mean", **COUNTS)
