"""The reference in the live model: in by a context manager, out exactly, also when the pass fails."""

from __future__ import annotations

import pytest
import torch

from nemo_kto.errors import ConfigError
from nemo_kto.models.reference import CpuSwapReference, ResidentReference, make_reference

MODES = ["cpu_swap", "resident"]


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))


def train_a_step(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_the_reference_inside_and_the_policy_outside(mode: str) -> None:
    model = make_model()
    start = weights(model)
    reference = make_reference(mode, model)
    for _ in range(3):  # the exchange must lose nothing, however often
        train_a_step(model)
        policy = weights(model)
        assert not same(policy, start)
        with reference.activated():
            assert same(weights(model), start)
        assert same(weights(model), policy)


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_comes_back_when_the_pass_raises(mode: str) -> None:
    model = make_model()
    reference = make_reference(mode, model)
    train_a_step(model)
    policy = weights(model)
    with pytest.raises(RuntimeError, match="out of memory"), reference.activated():
        raise RuntimeError("out of memory")
    assert same(weights(model), policy)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_and_the_optimizer_follow_the_policy(mode: str) -> None:
    """One step with a reference pass before and after the backward pass equals a step without any."""
    inputs = torch.ones(2, 4)

    def step(with_reference: bool) -> list[torch.Tensor]:
        model = make_model()
        reference = make_reference(mode, model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            for stage in ("before", "after"):
                if with_reference:
                    with torch.no_grad(), reference.activated():
                        model(inputs)
                if stage == "before":
                    model(inputs).square().sum().backward()
            optimizer.step()
        return weights(model)

    assert same(step(True), step(False))


def test_swapping_keeps_the_storage_and_residence_exchanges_it() -> None:
    model = make_model()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    with CpuSwapReference(model).activated():
        assert [parameter.data_ptr() for parameter in model.parameters()] == before
    with ResidentReference(model).activated():
        assert not set(before) & {parameter.data_ptr() for parameter in model.parameters()}
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_auto_keeps_it_resident_on_a_cpu() -> None:
    assert isinstance(make_reference("auto", make_model()), ResidentReference)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="cpu_swap or resident"):
        make_reference("second_model", make_model())


def test_the_copy_is_in_cpu_memory_whatever_the_default_device() -> None:
    """Lightning makes the GPU the default device while a model is built."""
    model = make_model()
    with torch.device("meta"):
        reference = CpuSwapReference(model)
    assert {stored.device.type for stored in reference._stored} == {"cpu"}
