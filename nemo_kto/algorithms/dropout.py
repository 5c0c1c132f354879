"""Dropout whose choices are a function of what is dropped, not of a generator.

A generator's numbers depend on how tokens and channels are divided among processes, and on what was drawn before; so
would the result of a run. And layers recomputed in the backward pass would have to find the same numbers again.

Tensor legend: `T` tokens, `i` channels.
"""

from typing import Any

import torch
from torch import Tensor

_INT32 = 1 << 32


def token_keys(positions: Tensor, places: Tensor, *, step: int) -> Tensor:
    """Return a key for each token, on which `keep_mask` depends: `[T]` int32.

    Args:
        positions: `[T]` int64, place of the token in its document.
        places: `[T]` int64, place of its document in the global batch.
        step: Number of the optimizer step.
    """
    return _mixed(_mixed(_mixed(places.int()) + positions.int()) + _as_int32(step * 0x9E3779B1))


def keep_mask(keys: Tensor, channels: range, *, salt: int, probability: float) -> Tensor:
    """Return what is kept: `[T, i]` bool, each True with 1 - `probability`.

    Args:
        keys: `[T]` int32, see `token_keys`.
        channels: Numbers of the channels in the undivided tensor.
        salt: A number of the place in the model.
        probability: Probability of being dropped, at least 0 and below 1.
    """
    numbers = torch.arange(channels.start, channels.stop, dtype=torch.int32, device=keys.device)
    hashed = _mixed(_mixed(keys + _as_int32(salt))[:, None] + _mixed(numbers)[None])
    return hashed >= int(probability * _INT32) - _INT32 // 2


def drop_out(inputs: Tensor, keys: Tensor, channels: range, *, salt: int, probability: float) -> Tensor:
    """Return `inputs` `[T, i]` with what `keep_mask` drops set to zero and the rest divided by 1 - `probability`.

    The backward pass makes the mask again instead of keeping it. For the other arguments see `keep_mask`.
    """
    dropped: Tensor = _DropOut.apply(inputs, keys, channels, salt, probability)  # type: ignore[no-untyped-call]
    return dropped


class _DropOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, keys: Tensor, channels: range, salt: int, probability: float) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.settings = (channels, salt, probability)
        return _DropOut._scale(inputs, keys, *ctx.settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _DropOut._scale(gradient, *ctx.saved_tensors, *ctx.settings), None, None, None, None

    @staticmethod
    def _scale(values: Tensor, keys: Tensor, channels: range, salt: int, probability: float) -> Tensor:
        kept = keep_mask(keys, channels, salt=salt, probability=probability)
        return values * (kept.to(values.dtype) / (1 - probability))


def _mixed(values: Tensor) -> Tensor:
    """Return int32 numbers whose every bit depends on all bits of `values`: MurmurHash3's final mixer."""
    values = (values ^ _shifted(values, 16)) * _as_int32(0x85EBCA6B)
    values = (values ^ _shifted(values, 13)) * _as_int32(0xC2B2AE35)
    return values ^ _shifted(values, 16)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Return `values` shifted to the right, with zeros from the left: torch would repeat the sign."""
    return (values >> bits) & ((1 << (32 - bits)) - 1)


def _as_int32(number: int) -> int:
    """Return the signed number of 32 bits that `number` wraps around to."""
    return (number + _INT32 // 2) % _INT32 - _INT32 // 2
