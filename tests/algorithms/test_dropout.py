"""Masks that depend on what is dropped only: their rate, their independence, and that parts fit together."""

import pytest
import torch

from nemo_kto.algorithms.dropout import _mixed, drop_out, keep_mask, token_keys

TOKENS, CHANNELS = 600, 512


def mask(*, step=0, salt=0, probability=0.3, places=None, channels=range(CHANNELS)):
    positions = torch.arange(TOKENS) % 50
    places = torch.arange(TOKENS) // 50 if places is None else places
    return keep_mask(token_keys(positions, places, step=step), channels, salt=salt, probability=probability)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_rate(probability):
    """Of 307,200 independent choices the share deviates by 4 standard deviations, 0.0036, once in 16,000 times."""
    kept = mask(probability=probability).double()
    assert kept.mean().item() == pytest.approx(1 - probability, abs=0.0037)
    assert kept.mean(0).std() == pytest.approx((probability * (1 - probability) / TOKENS) ** 0.5, abs=0.004)
    assert kept.mean(1).std() == pytest.approx((probability * (1 - probability) / CHANNELS) ** 0.5, abs=0.004)


@pytest.mark.parametrize(
    "other",
    [
        {"step": 1},
        {"salt": 1},
        {"places": torch.arange(TOKENS) // 50 + 1},
        {"channels": range(CHANNELS, 2 * CHANNELS)},
        {"channels": range(1, CHANNELS + 1)},
    ],
)
def test_other_steps_layers_samples_and_channels_are_dropped_independently(other):
    """Both keep with probability 1/2, so independent masks agree in half of the places."""
    agreement = (mask(probability=0.5) == mask(probability=0.5, **other)).double()
    assert agreement.mean().item() == pytest.approx(0.5, abs=0.0037)


def test_neighbouring_tokens_are_dropped_independently():
    kept = mask(probability=0.5)
    assert (kept[1:] == kept[:-1]).double().mean().item() == pytest.approx(0.5, abs=0.0037)
    assert (kept[:, 1:] == kept[:, :-1]).double().mean().item() == pytest.approx(0.5, abs=0.0037)


def test_what_is_dropped_is_dropped_in_the_backward_pass_too():
    inputs = torch.randn(TOKENS, 64, requires_grad=True)
    keys = token_keys(torch.arange(TOKENS), torch.zeros(TOKENS, dtype=torch.int64), step=0)
    settings = {"salt": 5, "probability": 0.25}
    output = drop_out(inputs, keys, range(64), **settings)
    kept = keep_mask(keys, range(64), **settings)
    torch.testing.assert_close(output, torch.where(kept, inputs / 0.75, 0.0))
    output.backward(torch.full_like(output, 3.0))
    torch.testing.assert_close(inputs.grad, torch.where(kept, 4.0, 0.0))


def test_parts_are_those_of_the_whole():
    positions, places = torch.arange(TOKENS) % 50, torch.arange(TOKENS) // 50
    whole = mask(step=7, salt=3)
    part = slice(130, 410)
    keys = token_keys(positions[part], places[part], step=7)
    assert torch.equal(keep_mask(keys, range(100, 200), salt=3, probability=0.3), whole[part, 100:200])


def test_numbers_beyond_32_bits_do_not_fail():
    assert 0.6 < mask(step=2**40 + 5, salt=2**32 - 1).double().mean() < 0.8


def test_the_mixer_is_murmurhash3s():
    """fmix32 of Appleby's MurmurHash3, worked out in unlimited integers."""

    def fmix32(number):
        for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
            number = (number ^ (number >> shift)) * multiplier % 2**32
        return number ^ (number >> 16)

    numbers = [0, 1, 5, 2**31 - 1, 2**31, 2**32 - 1, 0xDEADBEEF]
    mixed = _mixed(torch.tensor(numbers).to(torch.int32))
    assert [number % 2**32 for number in mixed.tolist()] == [fmix32(number) for number in numbers]
