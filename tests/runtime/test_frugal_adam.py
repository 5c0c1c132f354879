"""Adam that takes less: beside torch's own, with moments rounded by hand, in pieces, on the host or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nemo_kto.runtime import frugal_adam
from nemo_kto.runtime.frugal_adam import FrugalAdam

SIZES = (5, 300, 17, 1)
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-5, "weight_decay": 0.1}
STEPS = 6


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]


def gradients() -> Iterator[list[torch.Tensor]]:
    """Yield those of each step, of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield [torch.randn(size, generator=generator) * 10.0**-index for index, size in enumerate(SIZES)]


def frugal(owned: list[torch.Tensor], *, moments: torch.dtype = torch.float32, fraction: float = 0.0) -> FrugalAdam:
    return FrugalAdam(owned, moments_dtype=moments, offload_fraction=fraction, **SETTINGS)


def step(adam: FrugalAdam, given: list[torch.Tensor]) -> None:
    owned = [parameter for group in adam.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(owned, given, strict=True):
        parameter.decoupled_grad = gradient.clone()
    adam.step()


def trained(adam: FrugalAdam) -> list[torch.Tensor]:
    for given in gradients():
        step(adam, given)
    return [parameter.detach() for group in adam.param_groups for parameter in group["params"]]


def by_torch(moments: torch.dtype) -> list[torch.Tensor]:
    """Return what torch's Adam makes of the parameters, whose moments are rounded after each step."""
    owned = parameters()
    adam = torch.optim.AdamW(owned, fused=True, **SETTINGS)
    for given in gradients():
        for parameter, gradient in zip(owned, given, strict=True):
            parameter.grad = gradient.clone()
        adam.step()
        for state in adam.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].copy_(state[name].to(moments))
    return [parameter.detach() for parameter in owned]


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("at_once", [64, 135, 2**23])
def test_an_update_is_torchs(
    monkeypatch: pytest.MonkeyPatch, moments: torch.dtype, fraction: float, at_once: int
) -> None:
    """Wherever the state lies, and in pieces that divide parameters or not."""
    monkeypatch.setattr(frugal_adam, "AT_ONCE", at_once)
    actual = trained(frugal(parameters(), moments=moments, fraction=fraction))
    for one, other in zip(actual, by_torch(moments), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_parameters_in_bfloat16_are_rounded_float32_ones(fraction: float) -> None:
    """Which it keeps itself: what it begins with are the bfloat16 numbers."""
    exact = [torch.nn.Parameter(parameter.detach().float()) for parameter in parameters(torch.bfloat16)]
    actual = trained(frugal(parameters(torch.bfloat16), fraction=fraction))
    for one, other in zip(actual, trained(frugal(exact)), strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, other.to(torch.bfloat16))


@pytest.mark.parametrize(("fraction", "on_host"), [(0.0, 0), (0.05, 5 + 1), (0.5, 17 + 5 + 1), (0.95, 300 + 5 + 1)])
def test_what_lies_on_the_host_is_at_most_the_share(fraction: float, on_host: int) -> None:
    """Of 323 numbers the largest shards that fit, and smaller ones for what is left."""
    adam = frugal(parameters(), fraction=fraction)
    adam.allocate()
    assert sum(shard.numel() for shard in adam._on_host) == on_host <= fraction * sum(SIZES)


def test_a_mean_that_moves_too_little_stands_still_in_bfloat16() -> None:
    """Which is why `model.optim.betas` are refused that come too near to 1."""
    for beta, moves in ((0.999, False), (0.98, True)):
        (one,) = [torch.nn.Parameter(torch.ones(1))]
        adam = FrugalAdam([one], moments_dtype=torch.bfloat16, offload_fraction=0.0, lr=0.0, betas=(0.9, beta))
        adam.allocate()
        adam.set_scaled_state(one, "exp_avg_sq", torch.ones(1))
        for _ in range(100):
            step(adam, [torch.full((1,), 0.5)])
        assert (adam.get_unscaled_state(one, "exp_avg_sq").item() < 0.5) == moves


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_state_is_handed_over_in_float32(moments: torch.dtype) -> None:
    """To one with other settings, as by a checkpoint: it goes on as the first one does."""
    first = frugal(parameters(torch.bfloat16), moments=moments, fraction=0.5)
    trained(first)
    taken = [parameter.detach().clone() for group in first.param_groups for parameter in group["params"]]
    second = frugal([torch.nn.Parameter(each) for each in taken], moments=moments)
    second.allocate()
    second.load_state_dict(first.state_dict())
    for mine, theirs in zip(second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
        for name in ("exp_avg", "exp_avg_sq", "master_param"):
            value = first.get_unscaled_state(theirs, name)
            assert value.dtype == torch.float32
            second.set_scaled_state(mine, name, value)
    assert {second.get_unscaled_state(each, "step").item() for each in second.state} == {STEPS}
    for one, other in zip(trained(second), trained(first), strict=True):
        assert torch.equal(one, other)


def test_what_has_no_gradient_stays_as_it_is() -> None:
    owned = parameters()
    adam = frugal(owned, fraction=0.5)
    for given in gradients():
        step(adam, given)
        owned[1].decoupled_grad = None  # type: ignore[attr-defined]
        before = owned[1].detach().clone()
        adam.step()
        assert torch.equal(owned[1], before)
