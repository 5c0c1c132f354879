"""Loss weights that balance unequal numbers of desirable and undesirable samples.

The KTO paper (arXiv 2402.01306, section 4.2, on hyperparameters) asks for w_d * n_d / (w_u * n_u) in [1, 4/3].
"""

LOWEST_RATIO, HIGHEST_RATIO = 1.0, 4.0 / 3.0


def weighted_ratio(num_desirable: float, num_undesirable: float, desirable: float, undesirable: float) -> float:
    """Returns w_d * n_d / (w_u * n_u); infinite where the undesirable side is zero."""
    below = undesirable * num_undesirable
    return desirable * num_desirable / below if below else float("inf")


_TOLERANCE = 0.05


def is_balanced(ratio: float) -> bool:
    """Whether a weighted ratio is in the paper's range, up to 5 %: data meant to be even is never quite so."""
    return LOWEST_RATIO * (1 - _TOLERANCE) <= ratio <= HIGHEST_RATIO * (1 + _TOLERANCE)


def balanced_weights(
    num_desirable: float, num_undesirable: float, desirable: float | None = None, undesirable: float | None = None
) -> tuple[float, float]:
    """Returns (w_d, w_u) whose weighted ratio is in the paper's range.

    Args:
        num_desirable: Samples with thumbs up, or the sum of their own weights; above 0.
        num_undesirable: The same of thumbs down.
        desirable: w_d, if it is given; above 0.
        undesirable: w_u, if it is given; above 0.

    Returns:
        What was given, and for the rest the nearest to 1 that is in the range. Where neither is given, the weight of
        the class of which there are more samples is 1.

    Example:
        1000 desirable and 100 undesirable samples: (1, 7.5), a ratio of 4/3. 100 and 1000: (10, 1), a ratio of 1.
    """
    if desirable is None and undesirable is None:
        if num_desirable >= num_undesirable:
            desirable = 1.0
        else:
            undesirable = 1.0
    if undesirable is None:
        assert desirable is not None
        weighted = desirable * num_desirable / num_undesirable
        undesirable = _nearest_to_one(weighted / HIGHEST_RATIO, weighted / LOWEST_RATIO)
    elif desirable is None:
        weighted = undesirable * num_undesirable / num_desirable
        desirable = _nearest_to_one(weighted * LOWEST_RATIO, weighted * HIGHEST_RATIO)
    return desirable, undesirable


def _nearest_to_one(lowest: float, highest: float) -> float:
    return min(max(1.0, lowest), highest)
