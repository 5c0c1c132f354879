"""Norm, gated activation and rotary embedding against the expressions they stand for, in float64, by autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from nemo_kto.runtime.pointwise import rms_norm, rotate, swiglu

TOKENS, CHANNELS, HEADS = 7, 12, 3

Function = Callable[..., torch.Tensor]


def norm_expression(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return values / (values.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight


def swiglu_expression(projected: torch.Tensor, weights: torch.Tensor | float = 1.0) -> torch.Tensor:
    gate, up = projected[..., :CHANNELS], projected[..., CHANNELS:]
    return gate * torch.sigmoid(gate) * up * weights


def rotation_expression(values: torch.Tensor) -> torch.Tensor:
    """Each pair of channels (i, i + d/2) is a complex number, multiplied by e^(i angle)."""
    real, imaginary = values.chunk(2, dim=-1)
    rotated = torch.complex(real, imaginary) * torch.polar(torch.ones(()).double(), half_angles())
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def half_angles() -> torch.Tensor:
    return torch.arange(TOKENS)[:, None, None, None] * torch.logspace(0, -2, CHANNELS // 2, dtype=torch.float64)


ANGLES = torch.cat([half_angles()] * 2, dim=-1).float()

# name -> (function, expression, shapes of what both take)
CASES: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "norm": (
        lambda values, weight: rms_norm(values, weight, 1e-3),
        norm_expression,
        [(TOKENS, 1, CHANNELS), (CHANNELS,)],
    ),
    "norm of heads": (
        lambda values, weight: rms_norm(values, weight, 1e-3),
        norm_expression,
        [(TOKENS, 1, HEADS, CHANNELS), (CHANNELS,)],
    ),
    "swiglu": (swiglu, swiglu_expression, [(TOKENS, 1, 2 * CHANNELS)]),
    "swiglu of an expert": (swiglu, swiglu_expression, [(TOKENS, 2 * CHANNELS), (TOKENS, 1)]),
    "swiglu of an expert without tokens": (swiglu, swiglu_expression, [(0, 2 * CHANNELS), (0, 1)]),
    "rotation": (lambda values: rotate(values, ANGLES), rotation_expression, [(TOKENS, 1, HEADS, CHANNELS)]),
}

cases = pytest.mark.parametrize("name", CASES)


def inputs(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return random leaves, the same numbers in every dtype as far as it has them."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).bfloat16().to(dtype).requires_grad_() for shape in shapes]


def with_gradients(function: Function, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output, and the gradients of its product with random numbers."""
    output = function(*leaves)
    factors = torch.randn(output.shape, generator=torch.Generator().manual_seed(6)).bfloat16()
    output.backward(factors.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_those_of_the_expression(name: str, dtype: torch.dtype, tolerance: float) -> None:
    function, expression, shapes = CASES[name]
    found = with_gradients(function, inputs(shapes, dtype))
    expected = with_gradients(expression, inputs(shapes, torch.float64))
    assert len(found) == len(expected) == 1 + len(shapes)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@cases
def test_bits_do_not_depend_on_gradients(name: str) -> None:
    function, _, shapes = CASES[name]
    leaves = inputs(shapes, torch.float32)
    with torch.no_grad():
        alone = function(*leaves)
    assert torch.equal(function(*leaves), alone)


@cases
def test_only_inputs_are_kept_for_the_backward_pass(name: str) -> None:
    function, _, shapes = CASES[name]
    leaves = inputs(shapes, torch.float32)
    known = {tensor.data_ptr() for tensor in (*leaves, ANGLES)}
    others: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known:
            others.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*leaves)
    # of a norm also a number for each vector
    assert sum(others) <= leaves[0].numel() // CHANNELS


def test_parts_of_a_wider_tensor_are_taken_as_they_are() -> None:
    """Queries are a part of what their projection returns."""
    whole = inputs([(TOKENS, 1, HEADS, 2 * CHANNELS)], torch.float32)[0]
    part = whole[..., :CHANNELS]
    torch.testing.assert_close(rotate(part, ANGLES), rotate(part.contiguous(), ANGLES), rtol=0, atol=0)
    weight = torch.ones(CHANNELS)
    torch.testing.assert_close(rms_norm(part, weight, 1e-3), F.rms_norm(part, (CHANNELS,), weight, 1e-3))


def test_frozen_weight_has_no_gradient() -> None:
    values, weight = inputs([(TOKENS, CHANNELS), (CHANNELS,)], torch.float32)
    rms_norm(values, weight.requires_grad_(False), 1e-3).sum().backward()
    assert weight.grad is None
    assert values.grad is not None
