"""The reference in the live model: in by a context manager, out exactly, also when the pass fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_kto.data.batches.packed_rows import KTOBatch
from nemo_kto.data.batches.reference_cache import LogprobTable
from nemo_kto.kto.reference import EXCHANGED, CachedReference, CpuSwapReference, ResidentReference, Scores


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


@pytest.mark.parametrize("mode", EXCHANGED)
def test_the_model_is_the_reference_inside_and_the_policy_outside(mode: str) -> None:
    model = make_model()
    start = weights(model)
    reference = EXCHANGED[mode](model.parameters())
    for _ in range(3):  # the exchange must lose nothing, however often
        train_a_step(model)
        policy = weights(model)
        assert not same(policy, start)
        with reference.activated():
            assert same(weights(model), start)
        assert same(weights(model), policy)


@pytest.mark.parametrize("mode", EXCHANGED)
def test_the_policy_comes_back_when_the_pass_raises(mode: str) -> None:
    model = make_model()
    reference = EXCHANGED[mode](model.parameters())
    train_a_step(model)
    policy = weights(model)
    with pytest.raises(RuntimeError, match="out of memory"), reference.activated():
        raise RuntimeError("out of memory")
    assert same(weights(model), policy)


@pytest.mark.parametrize("mode", EXCHANGED)
def test_gradients_and_the_optimizer_follow_the_policy(mode: str) -> None:
    """One step with a reference pass before and after the backward pass equals a step without any."""
    inputs = torch.ones(2, 4)

    def step(with_reference: bool) -> list[torch.Tensor]:
        model = make_model()
        reference = EXCHANGED[mode](model.parameters())
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
    with CpuSwapReference(model.parameters()).activated():
        assert [parameter.data_ptr() for parameter in model.parameters()] == before
    with ResidentReference(model.parameters()).activated():
        assert not set(before) & {parameter.data_ptr() for parameter in model.parameters()}
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


@pytest.mark.parametrize("mode", EXCHANGED)
def test_what_is_loaded_while_the_reference_is_in_the_model_becomes_the_reference(mode: str) -> None:
    model, other = make_model(), make_model()
    train_a_step(other)
    start = weights(model)
    reference = EXCHANGED[mode](model.parameters())
    with reference.activated():
        model.load_state_dict(other.state_dict())
    assert same(weights(model), start)
    with reference.activated():
        assert same(weights(model), weights(other))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_swap_on_cuda_holds_two_parameters_besides() -> None:
    """One leaves while the next comes in, bit by bit the same afterwards, and no more of them wait on the device."""
    model = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(16)]).cuda()
    start = weights(model)
    reference = EXCHANGED["cpu_swap"](model.parameters())
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    policy = weights(model)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        with reference.activated():
            assert same(weights(model), start)
        assert same(weights(model), policy)
    size = 2048 * 2048 * 4
    # `weights` clones all of them, while nothing is exchanged
    assert torch.cuda.max_memory_allocated() - before <= 16 * size + 3 * size


@pytest.mark.parametrize("mode", EXCHANGED)
def test_only_the_given_parameters_are_exchanged(mode: str) -> None:
    model = make_model()
    start = weights(model)
    reference = EXCHANGED[mode](model[0].parameters())
    train_a_step(model)
    policy = weights(model)
    with reference.activated():
        assert same(weights(model), start[:2] + policy[2:])


@pytest.mark.parametrize("mode", EXCHANGED)
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_a_move_by_hand(mode: str, alpha: float) -> None:
    """alpha * policy + (1 - alpha) * reference, arXiv 2404.09656: from 1 towards 3, then towards 7."""
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, 1.0)
    torch.nn.init.constant_(model.bias, -2.0)
    reference = EXCHANGED[mode](model.parameters())
    expected = 1.0
    for policy in (3.0, 7.0):
        torch.nn.init.constant_(model.weight, policy)
        reference.move(alpha)
        expected = alpha * policy + (1 - alpha) * expected
        with reference.activated():
            assert model.weight.tolist() == [[expected, expected]]
            assert model.bias.tolist() == [-2.0]
        assert model.weight.tolist() == [[policy, policy]]


def test_a_move_is_made_in_float32() -> None:
    """0.3 * 3 + 0.7 * 1 = 1.6 is 1.6015625 in bfloat16; from terms that are rounded first it would be 1.59375."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(model.weight, 1.0)
    reference = ResidentReference(model.parameters())
    torch.nn.init.constant_(model.weight, 3.0)
    reference.move(0.3)
    with reference.activated():
        assert model.weight.item() == 1.6015625


@pytest.mark.parametrize("mode", EXCHANGED)
def test_a_loaded_reference_replaces_the_one_that_was_kept(mode: str) -> None:
    """Also where nothing was loaded in place."""
    model, other = make_model(), make_model()
    start = weights(model)
    reference = EXCHANGED[mode](model.parameters())
    train_a_step(other)
    reference.load_state_dict(model, {name: tensor.clone() for name, tensor in other.state_dict().items()})
    assert same(weights(model), start)
    with reference.activated():
        assert same(weights(model), weights(other))


def test_cached_log_probs_are_looked_up_by_split_and_pair() -> None:
    tables = {"train": LogprobTable(10), "validation": LogprobTable(10)}
    for split, sign in (("train", -1.0), ("validation", -100.0)):
        prompts, responses = torch.tensor([2, 2, 7]), torch.tensor([2, 7, 7])
        tables[split].add(tables[split].names(prompts, responses), sign * torch.tensor([1.0, 2.0, 3.0]))
    document = (torch.tensor([1]), torch.tensor([1]))  # only whether there is a KL set is asked
    batch = KTOBatch(
        samples=[document] * 3,
        kl_samples=[document] * 3,
        row_sizes=[3],
        kl_row_sizes=[3],
        pairs=torch.tensor([[2, 2], [7, 7], [2, 2]]),
        kl_pairs=torch.tensor([[2, 7], [7, 7], [2, 2]]),
        places=torch.arange(3),
        kl_places=torch.arange(3),
        desirable=torch.tensor([True, True, True]),
        weights=torch.ones(3),
        kl_weights=torch.ones(3),
        loss_weights=torch.ones(3),
    )
    reference = CachedReference(tables)
    kl, samples = reference.log_probs(batch, "train", score=never)
    assert (kl.tolist(), samples.tolist()) == ([-2.0, -3.0, -1.0], [-1.0, -3.0, -1.0])
    kl, samples = reference.log_probs(batch, "validation", score=never)
    assert (kl.tolist(), samples.tolist()) == ([-200.0, -300.0, -100.0], [-100.0, -300.0, -100.0])
    without = replace(batch, kl_samples=[], kl_pairs=torch.empty(0, 2, dtype=torch.int64))
    kl, samples = reference.log_probs(without, "train", score=never)
    assert kl is None and samples.tolist() == [-1.0, -3.0, -1.0]


def never() -> Scores:
    raise AssertionError("a cached reference scores nothing")


def test_the_copy_is_in_cpu_memory_whatever_the_default_device() -> None:
    """Lightning makes the GPU the default device while a model is built."""
    model = make_model()
    with torch.device("meta"):
        reference = CpuSwapReference(model.parameters())
    assert {stored.device.type for stored in reference._stored} == {"cpu"}
