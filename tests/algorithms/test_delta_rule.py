"""The gated delta rule in chunks is the paper's recurrence, token by token, with its gradients; and transformers'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from nemo_kto.algorithms.delta_rule import (
    CHUNK,
    causal_convolution,
    convolve_newest,
    delta_rule_step,
    gated_delta_rule,
)

KEY_HEADS, VALUE_HEADS, KEY_CHANNELS, VALUE_CHANNELS = 2, 6, 8, 5
LENGTHS = (5, 1, 2 * CHUNK + 3, CHUNK, 9)

Parts = tuple[torch.Tensor, ...]


def parts_of_row(dtype: torch.dtype = torch.float64) -> Parts:
    """Return query, key, value, log decay and beta of a row, some of it decaying fast."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(sum(LENGTHS), *shape, generator=generator, dtype=torch.float64).to(dtype)

    decay = -8 * torch.rand(sum(LENGTHS), VALUE_HEADS, generator=generator, dtype=torch.float64).pow(4)
    beta = draw(VALUE_HEADS).sigmoid()
    return (
        *(draw(KEY_HEADS, KEY_CHANNELS) for _ in range(2)),
        draw(VALUE_HEADS, VALUE_CHANNELS),
        decay.to(dtype),
        beta,
    )


def recurrence(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rates: torch.Tensor) -> Parts:
    """Return outputs and last state of one document: S_t = a S_{t-1} (I - b k k^T) + b v k^T (eq. 10), o_t = S_t q.

    The paper has values by keys; the state that is returned is turned.
    """
    log_decay, beta = rates
    outputs, states = [], []
    for head in range(VALUE_HEADS):
        state = torch.zeros(VALUE_CHANNELS, KEY_CHANNELS, dtype=value.dtype)
        of_head = []
        for t in range(len(query)):
            q, k = (F.normalize(part[t, head // (VALUE_HEADS // KEY_HEADS)], dim=0) for part in (query, key))
            a, b, v = log_decay[t, head].exp(), beta[t, head], value[t, head]
            state = a * state @ (torch.eye(KEY_CHANNELS, dtype=v.dtype) - b * torch.outer(k, k)) + b * torch.outer(
                v, k
            )
            of_head.append(state @ q / KEY_CHANNELS**0.5)
        outputs.append(torch.stack(of_head))
        states.append(state.T)
    return torch.stack(outputs, 1), torch.stack(states)


def documents(parts: Parts) -> list[Parts]:
    return list(zip(*(part.split(LENGTHS) for part in parts), strict=True))


@pytest.mark.parametrize("chunk", [1, 4, CHUNK])
def test_chunks_are_the_recurrence_with_its_gradients(chunk: int) -> None:
    ours, plain = (tuple(part.requires_grad_() for part in parts_of_row()) for _ in range(2))
    output, states = gated_delta_rule(*ours, lengths=LENGTHS, chunk=chunk)
    expected = [recurrence(*document) for document in documents(plain)]
    # what is added under the root of the lengths of keys and queries is all the difference
    torch.testing.assert_close(output, torch.cat([found for found, _ in expected]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(states, torch.stack([state for _, state in expected]), rtol=1e-4, atol=1e-6)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * weight).sum().backward()
    (torch.cat([found for found, _ in expected]) * weight).sum().backward()
    for one, other in zip(ours, plain, strict=True):
        assert other.grad is not None and other.grad.abs().max() > 1e-2
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    lengths, chunk = (3, 7), 4
    parts = tuple(part[:10].requires_grad_() for part in parts_of_row())

    def rule(*given: torch.Tensor) -> torch.Tensor:
        query, key, value, log_decay, beta = given
        return gated_delta_rule(query, key, value, log_decay, beta, lengths=lengths, chunk=chunk)[0]

    assert torch.autograd.gradcheck(rule, parts)


@pytest.mark.parametrize("way", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_it_is_what_transformers_computes(way: str) -> None:
    parts = parts_of_row(torch.float32)
    output, states = gated_delta_rule(*parts, lengths=LENGTHS)
    for document, of_document, state in zip(documents(parts), output.split(LENGTHS), states, strict=True):
        query, key, value, log_decay, beta = (part[None] for part in document)
        settings = {"g": log_decay, "beta": beta, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        expected, last = getattr(theirs, way)(query, key, value, **settings)
        torch.testing.assert_close(of_document, expected[0], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(state, last[0], rtol=1e-5, atol=2e-6)


def test_a_document_gives_the_same_bits_in_any_row_with_and_without_gradients() -> None:
    parts = parts_of_row(torch.float32)
    output, _ = gated_delta_rule(*(part.clone().requires_grad_() for part in parts), lengths=LENGTHS)
    with torch.no_grad():
        assert torch.equal(gated_delta_rule(*parts, lengths=LENGTHS)[0], output)
    for document, expected in zip(documents(parts), output.split(LENGTHS), strict=True):
        query, key, value, log_decay, beta = document
        alone, _ = gated_delta_rule(query, key, value, log_decay, beta, lengths=(len(query),))
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-7)


def test_a_step_goes_on_where_a_document_ended() -> None:
    parts = parts_of_row()
    whole, last = gated_delta_rule(*parts, lengths=LENGTHS)
    of_one_token = 1  # has nothing before it
    before, newest = [], []
    for number, document in enumerate(documents(parts)):
        if number != of_one_token:
            before.append(tuple(part[:-1] for part in document))
            newest.append(tuple(part[-1] for part in document))
    joined = [torch.cat(part) for part in zip(*before, strict=True)]
    query, key, value, log_decay, beta = joined
    lengths = [length - 1 for number, length in enumerate(LENGTHS) if number != of_one_token]
    _, states = gated_delta_rule(query, key, value, log_decay, beta, lengths=lengths)
    query, key, value, log_decay, beta = (torch.stack(part) for part in zip(*newest, strict=True))
    output, states = delta_rule_step(query, key, value, log_decay, beta, states)
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    kept = [number for number in range(len(LENGTHS)) if number != of_one_token]
    torch.testing.assert_close(output, whole[ends[kept]])
    torch.testing.assert_close(states, last[kept])


@pytest.mark.parametrize("window", [1, 2, 4])
def test_the_convolution_is_torchs_within_each_document(window: int) -> None:
    generator = torch.Generator().manual_seed(3)
    row, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((sum(LENGTHS), 7), (7, window))
    )
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    ours, plain = ((row.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2))
    found = causal_convolution(*ours, places)
    expected = torch.cat(
        [
            F.silu(F.conv1d(F.pad(part.T[None], (window - 1, 0)), plain[1][:, None], groups=7))[0].T
            for part in plain[0].split(LENGTHS)
        ]
    )
    torch.testing.assert_close(found, expected)
    (found.square().sum() + found.sum()).backward()
    (expected.square().sum() + expected.sum()).backward()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    newest = torch.stack([F.pad(part, (0, 0, window, 0))[-window:] for part in row.split(LENGTHS)])
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    torch.testing.assert_close(convolve_newest(newest, weight), expected[ends])
