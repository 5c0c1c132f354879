"""A weight in fewer bits: bitsandbytes' numbers, autograd's gradients, nothing kept, nothing written by accident."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import linear_with_frozen_weight

from nemo_kto.errors import ConfigError
from nemo_kto.network import quantised_weight
from nemo_kto.network.quantised_weight import (
    FORMATS,
    QuantisedWeight,
    plain_weights,
    scale_levels,
    weights_quantised,
)
from nemo_kto.runtime.bits import bitsandbytes
from nemo_kto.runtime.layout import Layout, ModelSizes, check_blocks

KINDS = ["nf4", "int8"]
OUTPUTS, INPUTS = 96, 192


def weight_of(kind: str, dtype: torch.dtype = torch.float32) -> QuantisedWeight:
    generator = torch.Generator().manual_seed(1)
    weight = QuantisedWeight.empty(kind, OUTPUTS, INPUTS, dtype=dtype)
    weight.write(weight.format.quantised(torch.randn(OUTPUTS, INPUTS, generator=generator)))
    return weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_what_its_plain_numbers_do_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(weight_of(kind, dtype), requires_grad=False)
    plain = weight.plain()  # type: ignore[attr-defined]
    results = []
    for each in (weight, plain):
        values = torch.ones(7, INPUTS, dtype=dtype).cumsum(0).requires_grad_()
        output = F.linear(values, each)
        again = linear_with_frozen_weight(output, each.t(), None, False, False, False, None)
        again.float().square().sum().backward()
        results.append((output, again, values.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours is not theirs


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the storages of floating-point tensors as large as the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(each, QuantisedWeight) for each in args):
            with self:
                return QuantisedWeight.__torch_dispatch__(func, types, args, kwargs)
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point() and made.numel() == OUTPUTS * INPUTS:
            self.seen.append(torch.multiprocessing.reductions.StorageWeakRef(made.untyped_storage()))
        return made


@pytest.mark.parametrize("kind", KINDS)
def test_plain_numbers_are_made_anew_in_the_backward_pass_and_not_kept(kind: str) -> None:
    weight = torch.nn.Parameter(weight_of(kind), requires_grad=False)
    values = torch.ones(7, INPUTS, requires_grad=True)
    with Largest() as largest:
        output = F.linear(values, weight)
        forward = len(largest.seen)
        assert forward and all(storage.expired() for storage in largest.seen)
        output.sum().backward()
    assert len(largest.seen) > forward and all(storage.expired() for storage in largest.seen)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_views_and_all_else_is_plain(kind: str) -> None:
    weight = weight_of(kind)
    rows = weight[10:20]
    assert isinstance(rows, QuantisedWeight) and torch.equal(rows.plain(), weight.plain()[10:20])
    gate, up = weight.chunk(2)
    assert isinstance(up, QuantisedWeight) and torch.equal(up.plain(), weight.plain()[OUTPUTS // 2 :])
    rows.write(weight[20:30].parts)
    assert torch.equal(weight.plain()[10:20], weight.plain()[20:30])
    for result in (weight[:, 3:5], weight + 0, weight.to(torch.float64), torch.cat([weight, weight])):
        assert not isinstance(result, QuantisedWeight)
    assert torch.equal(weight[:, 3:5], weight.plain()[:, 3:5])
    assert torch.equal(torch.zeros_like(weight), torch.zeros(OUTPUTS, INPUTS))
    target = torch.empty(OUTPUTS, INPUTS)
    target[:] = weight
    assert torch.equal(target, weight.plain())


def test_only_write_changes_it() -> None:
    weight, before = weight_of("nf4"), weight_of("nf4").plain()
    for change in (weight.zero_, lambda: weight.add_(1.0), lambda: weight.copy_(before)):
        with pytest.raises(TypeError, match=r"only QuantisedWeight\.write does"):
            change()
    assert torch.equal(weight.plain(), before)


@pytest.mark.parametrize("kind", FORMATS)
def test_it_takes_the_bytes_it_says(kind: str) -> None:
    weight = QuantisedWeight.empty(kind, OUTPUTS, 64 * 64, dtype=torch.bfloat16)
    taken = sum(part.nbytes for part in weight.parts.values())
    assert taken == weight.format.bytes_of(OUTPUTS, 64 * 64)
    # 4 bits and 32 / 64 of scales; or 8 / 64 of them and of each row two scales of scales, their mean and a place
    bits = {"nf4": 4.5, "nf4_double": 4 + 1 / 8 + 32 * 4 / 4096, "int8": 8 + 32 / 4096}[kind]
    assert 8 * taken / weight.numel() == bits


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_layers_before_the_last_of_a_class_are_kept_so(kind: str) -> None:
    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(INPUTS, 8)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(9, INPUTS)
            self.stack = Stack()
            self.head = torch.nn.Linear(INPUTS, 9)

    with weights_quantised(kind, (torch.nn.Linear,), until=Stack):
        with pytest.raises(TypeError, match="would change"):
            Model()  # torch's own layers fill their weights, Megatron's are left as they are
    with weights_quantised(None, (torch.nn.Linear,), until=Stack):
        assert type(Model().stack.first.weight) is torch.nn.Parameter


def test_plain_weights_take_the_place_of_those_in_fewer_bits_for_a_while() -> None:
    layer = torch.nn.Linear(INPUTS, OUTPUTS)
    layer.weight = torch.nn.Parameter(weight_of("nf4", torch.bfloat16), requires_grad=False)
    with plain_weights([layer]):
        assert type(layer.weight) is torch.nn.Parameter
        assert (layer.weight.shape, layer.weight.dtype) == ((OUTPUTS, INPUTS), torch.bfloat16)
    assert isinstance(layer.weight, QuantisedWeight)


def test_blocks_are_not_cut() -> None:
    sizes = ModelSizes(
        num_layers=2,
        num_attention_heads=4,
        num_query_groups=4,
        ffn_hidden_size=384,
        whole_inputs=(128,),
        divided_inputs=(128, 384),
        expert_inputs=(256,),
    )
    check_blocks(Layout(world_size=2, tensor=2), sizes)
    with pytest.raises(
        ConfigError, match=r"128 of a linear layer on 4 ranks each \(model\.tensor_model_parallel_size\)"
    ):
        check_blocks(Layout(world_size=4, tensor=4), sizes)
    with pytest.raises(ConfigError, match="expert_tensor_parallel_size.*fewer ranks, or int8"):
        check_blocks(Layout(world_size=8, tensor=1, expert_tensor=8), sizes)
    with pytest.raises(ConfigError, match="100 of a linear layer are no whole number of such blocks. Use int8"):
        check_blocks(Layout(world_size=1), ModelSizes(**{**vars(sizes), "whole_inputs": (100,)}))


def test_importing_bitsandbytes_fetches_nothing(tmp_path: Path) -> None:
    """A package `kernels` that is installed is not asked for code from the Hub, and is there afterwards."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs):\n    raise SystemExit('asked')\n")
    code = (
        "from nemo_kto.runtime.bits import bitsandbytes\nbitsandbytes().functional\n"
        "import kernels, logging\nassert kernels.get_kernel and logging.getLogger('bitsandbytes').level == 0\n"
    )
    paths = f"{tmp_path}:{Path(__file__).resolve().parents[2]}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert bitsandbytes() is bitsandbytes()


def test_levels_of_scales_are_copied_to_a_device_once() -> None:
    assert scale_levels(torch.device("cpu")) is scale_levels(torch.device("cpu"))
    assert torch.equal(scale_levels(torch.device("cpu")), bitsandbytes().functional.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_block_is_quantised_as_bitsandbytes_does_on_a_cpu(dtype: torch.dtype) -> None:
    """With ties, rows of zeros and the greatest numbers of a block."""
    block = torch.randn(64, INPUTS, generator=torch.Generator().manual_seed(2)).to(dtype)
    block[3], block[4, ::2], block[5] = 0, 0.5, block[5].abs().max() / 2
    block[5, 0] *= 2
    functional = bitsandbytes().functional
    codes, state = functional.quantize_4bit(block.float(), blocksize=64, quant_type="nf4")
    ours = FORMATS["nf4"].quantised(block)
    assert torch.equal(ours["codes"].flatten(), codes.flatten())
    assert torch.equal(ours["scales"].flatten(), state.absmax)
    some = block[[*range(3), *range(4, 64)]]  # of a row of zeros bitsandbytes' are not defined
    whole, scales, _ = functional.int8_vectorwise_quant(some.half())
    eight = FORMATS["int8"].quantised(some)
    assert torch.equal(eight["codes"], whole) and torch.equal(eight["scales"], scales)
    assert not FORMATS["int8"].quantised(block)["codes"][3].any()


def test_eight_bits_are_made_plain_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of("int8", torch.bfloat16)
    whole = weight.plain()
    monkeypatch.setattr(quantised_weight, "_AT_ONCE", 5 * INPUTS)
    assert torch.equal(weight.plain(), whole)
