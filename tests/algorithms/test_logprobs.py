"""Vocabulary-parallel log-probs against torch's log_softmax over all logits: values, gradients, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_kto.algorithms.logprobs import PLAIN, LogitShape, response_token_logps, sum_per_document

VOCAB, HIDDEN, TOKENS = 50, 16, 11
CAPPED = LogitShape(factor=0.7, cap=3.0)  # logits are up to 15
LAST_SHARD_EMPTY = 72  # of 4 ranks with 18 rows each, the last has ids 54 to 71: padding only


def make_inputs(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[torch.Tensor, ...]:
    """Return hidden `[R, h]`, weight of the real vocabulary `[v, h]`, targets `[R]`, gradient of log-probs `[R]`."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    if tokens:
        targets[0], targets[-1] = 0, VOCAB - 1
    return hidden, weight, targets, torch.randn(tokens, generator=generator)


def shaped(logits: torch.Tensor, shape: LogitShape) -> torch.Tensor:
    """Return logits as Granite and Gemma 2 have them in transformers."""
    logits = logits * shape.factor
    return logits if shape.cap is None else torch.tanh(logits / shape.cap) * shape.cap


def reference(
    dtype: torch.dtype = torch.float32, tokens: int = TOKENS, shape: LogitShape = PLAIN
) -> tuple[torch.Tensor, ...]:
    """Return log-probs and the gradients of hidden and weight by torch alone."""
    hidden, weight, targets, upstream = make_inputs(dtype, tokens)
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = (hidden @ weight.T).float()
    logps = F.log_softmax(shaped(logits, shape), dim=-1).gather(1, targets[:, None])[:, 0]
    logps.backward(upstream)
    assert hidden.grad is not None and weight.grad is not None
    return logps.detach(), hidden.grad, weight.grad


def padded_shard(weight: torch.Tensor, padded: int, *, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Return a rank's rows of `weight` with padding rows so large that any use of them would show."""
    whole = torch.cat([weight, torch.full((padded - len(weight), HIDDEN), 100.0, dtype=weight.dtype)])
    return whole.chunk(tp_size)[tp_rank].clone()


def room(chunk: int, rows: int, dtype: torch.dtype = torch.float32, shape: LogitShape = PLAIN) -> int:
    """Return the bytes of so many tokens' logits and their log-softmax in float32, and of capped logits besides."""
    return chunk * rows * (dtype.itemsize + (4 if shape == PLAIN else 8))


def score_shard(padded: int, chunk: int, tokens: int = TOKENS, shape: LogitShape = PLAIN) -> tuple[torch.Tensor, ...]:
    """Return log-probs, with and without gradients, the gradients, and that of hidden where the shard is frozen."""
    hidden, weight, targets, upstream = make_inputs(tokens=tokens)
    group = dist.group.WORLD
    shard = padded_shard(weight, padded, tp_rank=dist.get_rank(), tp_size=dist.get_world_size())
    logits_memory = room(chunk, len(shard), shape=shape)
    arguments = {"vocab_size": VOCAB, "shape": shape, "tp_group": group, "logits_memory": logits_memory}
    with torch.no_grad():
        plain = response_token_logps(hidden, shard, targets, **arguments)
    hidden.requires_grad_()
    frozen = response_token_logps(hidden, shard, targets, **arguments)
    frozen.backward(upstream)
    assert torch.equal(frozen, plain)
    grad_frozen, hidden.grad = hidden.grad, None
    shard.requires_grad_()
    logps = response_token_logps(hidden, shard, targets, **arguments)
    logps.backward(upstream)
    assert hidden.grad is not None and shard.grad is not None and grad_frozen is not None
    return plain, logps.detach(), hidden.grad, shard.grad, grad_frozen


@pytest.mark.parametrize("shape", [PLAIN, CAPPED, LogitShape(factor=0.125)])
@pytest.mark.parametrize("chunk", [1, 4, TOKENS - 1, TOKENS, 1000])
@pytest.mark.parametrize(("tp_size", "padded"), [(2, 52), (4, 52), (4, LAST_SHARD_EMPTY)])
def test_shards_equal_the_whole_vocabulary(
    run_ranks: Callable[..., Any], tp_size: int, padded: int, chunk: int, shape: LogitShape
) -> None:
    logps, grad_hidden, grad_weight = reference(shape=shape)
    results = run_ranks(score_shard, tp_size, padded, chunk, TOKENS, shape)
    for plain, actual, actual_grad_hidden, _, grad_frozen in results:
        assert torch.equal(plain, actual)
        torch.testing.assert_close(actual, logps)
        torch.testing.assert_close(actual_grad_hidden, grad_hidden)
        torch.testing.assert_close(grad_frozen, grad_hidden)
    shards = torch.cat([result[3] for result in results])
    torch.testing.assert_close(shards[:VOCAB], grad_weight)
    assert not shards[VOCAB:].any()


def test_no_response_tokens(run_ranks: Callable[..., Any]) -> None:
    """A rank's micro-batch may, by padding, be empty; it must take part in no collective that others lack."""
    for plain, logps, grad_hidden, grad_shard, grad_frozen in run_ranks(score_shard, 2, 52, 4, 0):
        assert plain.shape == logps.shape == (0,) and grad_hidden.shape == grad_frozen.shape == (0, HIDDEN)
        assert not grad_shard.any()


@pytest.mark.parametrize("shape", [PLAIN, CAPPED])
def test_one_process_needs_no_group(shape: LogitShape) -> None:
    hidden, weight, targets, upstream = make_inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    logits_memory = room(3, VOCAB, shape=shape)
    logps = response_token_logps(hidden, weight, targets, vocab_size=VOCAB, shape=shape, logits_memory=logits_memory)
    logps.backward(upstream)
    for actual, expected in zip((logps.detach(), hidden.grad, weight.grad), reference(shape=shape), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [PLAIN, CAPPED])
@pytest.mark.parametrize("chunk", [4, TOKENS])
@pytest.mark.parametrize("frozen", [False, True])
def test_bfloat16_inputs_are_summed_in_float32(chunk: int, frozen: bool, shape: LogitShape) -> None:
    """The products are rounded to bfloat16, as in transformers; the cap and the softmax over them are not."""
    hidden, weight, targets, upstream = make_inputs(torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    logits_memory = room(chunk, VOCAB, torch.bfloat16, shape)
    logps = response_token_logps(hidden, weight, targets, vocab_size=VOCAB, shape=shape, logits_memory=logits_memory)
    logps.backward(upstream)
    expected, grad_hidden, grad_weight = reference(torch.bfloat16, shape=shape)
    assert logps.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logps.detach(), expected)
    torch.testing.assert_close(hidden.grad, grad_hidden, rtol=2e-2, atol=2e-2)  # bfloat16 has 8 bits
    if frozen:
        assert weight.grad is None
    else:
        assert weight.grad.dtype == torch.bfloat16
        torch.testing.assert_close(weight.grad, grad_weight, rtol=2e-2, atol=2e-2)


def test_gradients_numerically() -> None:
    """In float64 finite differences are exact enough; the log-probs themselves are float32 by contract."""
    hidden, weight, targets, upstream = make_inputs(tokens=3)
    hidden.requires_grad_()
    response_token_logps(hidden, weight, targets, vocab_size=VOCAB).backward(upstream[:3])
    step = torch.zeros_like(hidden)
    step[1, 2] = 1e-4

    def exact(shifted: torch.Tensor) -> float:
        logps = F.log_softmax(shifted.double() @ weight.double().T, dim=-1).gather(1, targets[:, None])[:, 0]
        return float(logps @ upstream[:3].double())

    with torch.no_grad():
        slope = (exact(hidden.double() + step) - exact(hidden.double() - step)) / 2e-4
    assert hidden.grad[1, 2].item() == pytest.approx(slope, rel=1e-4)


class Made(TorchDispatchMode):
    """Notes the number of elements of the largest tensor any operation returns, and how often logits are computed."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.largest = self.products = 0
        self._vocab = vocab

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        if func is torch.ops.aten.mm.default and result.shape[1] == self._vocab:
            self.products += len(result)
        return result


def make_work(
    chunk: int, *, frozen: bool = False, shape: LogitShape = PLAIN, tokens: int = 256, vocab: int = 400
) -> Made:
    """Return what a forward and a backward pass make."""
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=not frozen)
    targets = torch.randint(vocab, (tokens,))
    with Made(vocab) as made:
        logits_memory = room(chunk, vocab, shape=shape)
        logps = response_token_logps(
            hidden, weight, targets, vocab_size=vocab, shape=shape, logits_memory=logits_memory
        )
        logps.sum().backward()
    return made


@pytest.mark.parametrize("shape", [PLAIN, CAPPED])
@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize("frozen", [False, True])
def test_all_logits_never_exist(chunk: int, frozen: bool, shape: LogitShape) -> None:
    """Neither the forward nor the backward pass makes a tensor larger than a chunk's logits, or the inputs."""
    assert make_work(chunk, frozen=frozen, shape=shape).largest == chunk * 400 < 256 * 400


def test_logits_are_computed_again_only_where_they_do_not_fit() -> None:
    assert make_work(256).products == 256
    assert make_work(255).products == 2 * 256
    assert make_work(8, frozen=True).products == 256


def test_documents_are_summed() -> None:
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    # document 1 has no response token here
    assert sum_per_document(logps, (3, 0, 1)).tolist() == [-7.0, 0.0, -8.0]
