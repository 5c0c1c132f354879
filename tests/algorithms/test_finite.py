"""NaN and infinity are found in every dtype and place, and nothing else is taken for them."""

from __future__ import annotations

import pytest
import torch

from nemo_kto.algorithms.finite import first_not_finite, is_finite

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    for place in (0, 500, 1000):
        tensor = torch.zeros(7, 143, dtype=dtype)
        tensor.view(-1)[place] = value
        assert not is_finite(tensor)
        assert not is_finite(tensor.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_numbers_are_finite(dtype: torch.dtype) -> None:
    """Also where their sum is not."""
    largest = torch.finfo(dtype).max
    assert is_finite(torch.full((100,), largest, dtype=dtype))
    assert is_finite(torch.full((), -largest, dtype=dtype))


def test_what_has_no_infinity_is_finite() -> None:
    assert is_finite(torch.empty(0))
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.zeros(4).to(torch.float8_e4m3fn))


def test_the_first_is_named() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan")])
    assert first_not_finite([("a", good), ("b", bad), ("c", bad)]) == "b"
    assert first_not_finite([("a", torch.nn.Parameter(good))]) is None
