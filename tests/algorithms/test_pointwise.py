"""Norm, gated activation and rotary embedding against the expressions they stand for, in float64, by autograd."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from nemo_kto.algorithms.pointwise import geglu, gelu, quick_geglu, rms_norm, rotate, swiglu

TOKENS, CHANNELS, HEADS = 7, 12, 3

Function = Callable[..., torch.Tensor]


def norm_expression(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return values / (values.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight


def swiglu_expression(projected: torch.Tensor, weights: torch.Tensor | float = 1.0) -> torch.Tensor:
    gate, up = projected[..., :CHANNELS], projected[..., CHANNELS:]
    return gate * torch.sigmoid(gate) * up * weights


def gelu_expression(values: torch.Tensor) -> torch.Tensor:
    return 0.5 * values * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (values + 0.044715 * values**3)))


def geglu_expression(projected: torch.Tensor) -> torch.Tensor:
    return gelu_expression(projected[..., :CHANNELS]) * projected[..., CHANNELS:]


def quick_geglu_expression(projected: torch.Tensor, weights: torch.Tensor, limit: float = 0.75) -> torch.Tensor:
    """Clamped at a number that bfloat16 has, so that the same numbers are clamped in every dtype."""
    gate, up = projected[..., :CHANNELS].clamp(max=limit), projected[..., CHANNELS:].clamp(-limit, limit)
    return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1) * weights


def rotation_expression(values: torch.Tensor) -> torch.Tensor:
    """Each pair of channels (i, i + d/2) is a complex number, multiplied by e^(i angle)."""
    real, imaginary = values.chunk(2, dim=-1)
    rotated = torch.complex(real, imaginary) * torch.polar(torch.ones(()).double(), half_angles())
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def half_angles() -> torch.Tensor:
    return torch.arange(TOKENS)[:, None, None, None] * torch.logspace(0, -2, CHANNELS // 2, dtype=torch.float64)


TABLE = torch.cat([half_angles().cos(), half_angles().sin()], dim=-1).float()


def partial_rotation_expression(values: torch.Tensor) -> torch.Tensor:
    """The channels that the table has no angles for stay as they are."""
    rotated, rest = values.split([CHANNELS, 3], dim=-1)
    return torch.cat([rotation_expression(rotated), rest], dim=-1)


def interleaved_expression(values: torch.Tensor) -> torch.Tensor:
    """The pairs are channels that are neighbours."""
    order = torch.arange(CHANNELS).view(2, -1).T.flatten()  # 0, d/2, 1, d/2 + 1, ...
    apart = torch.empty_like(values)
    apart[..., order] = values
    return rotation_expression(apart)[..., order]


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
    "geglu": (geglu, geglu_expression, [(TOKENS, 1, 2 * CHANNELS)]),
    "clamped": (
        partial(quick_geglu, offset=1.0, limit=0.75),
        quick_geglu_expression,
        [(TOKENS, 2 * CHANNELS), (TOKENS, 1)],
    ),
    "not clamped": (
        partial(quick_geglu, offset=1.0),
        partial(quick_geglu_expression, limit=torch.inf),
        [(TOKENS, 2 * CHANNELS), (TOKENS, 1)],
    ),
    "gelu": (gelu, gelu_expression, [(TOKENS, 1, CHANNELS)]),
    "rotation": (lambda values: rotate(values, TABLE), rotation_expression, [(TOKENS, 1, HEADS, CHANNELS)]),
    "interleaved rotation": (
        lambda values: rotate(values, TABLE, interleaved=True),
        interleaved_expression,
        [(TOKENS, 1, HEADS, CHANNELS)],
    ),
    "rotation of some channels": (
        lambda values: rotate(values, TABLE),
        partial_rotation_expression,
        [(TOKENS, 1, HEADS, CHANNELS + 3)],
    ),
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
def test_little_is_kept_for_the_backward_pass(name: str) -> None:
    """What goes in; of a norm a number for each vector besides."""
    function, _, shapes = CASES[name]
    leaves = inputs(shapes, torch.float32)
    known = {tensor.data_ptr() for tensor in (*leaves, TABLE)}
    others: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known:
            others.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*leaves)
    assert sum(others) == (leaves[0].numel() // CHANNELS if name.startswith("norm") else 0)


@pytest.mark.parametrize("name", ["norm", "swiglu", "rotation"])
def test_part_of_a_wider_tensor_is_as_good_as_a_copy(name: str) -> None:
    """Queries are a part of what their projection returns."""
    function, _, [shape, *others] = CASES[name]
    here = slice(shape[-1], 2 * shape[-1])
    wide, *rest = inputs([(*shape[:-1], 3 * shape[-1]), *others], torch.float32)
    copies = [leaf.detach().clone().requires_grad_() for leaf in (wide[..., here], *rest)]
    found = with_gradients(lambda wide, *rest: function(wide[..., here], *rest), [wide, *rest])
    found[1] = found[1][..., here]
    for one, other in zip(found, with_gradients(function, copies), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_experts_are_weighed_in_float32() -> None:
    """A router's weights are float32 whatever the model's dtype is."""
    projected = inputs([(TOKENS, 2 * CHANNELS)], torch.bfloat16)[0]
    weights = inputs([(TOKENS, 1)], torch.float32)[0]
    found = with_gradients(swiglu, [projected, weights])
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    leaves = [tensor.detach().double().requires_grad_() for tensor in (projected, weights)]
    for one, other in zip(found, with_gradients(swiglu_expression, leaves), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2)


def test_frozen_inputs_have_no_gradient() -> None:
    values, weight = inputs([(TOKENS, CHANNELS), (CHANNELS,)], torch.float32)
    rms_norm(values, weight.requires_grad_(False), 1e-3).sum().backward()
    projected, weights = inputs([(TOKENS, 2 * CHANNELS), (TOKENS, 1)], torch.float32)
    swiglu(projected, weights.requires_grad_(False)).sum().backward()
    assert weight.grad is None
    assert weights.grad is None
    assert values.grad is not None
    assert projected.grad is not None
