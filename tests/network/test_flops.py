"""Operations of passes over a model, beside those that PyTorch counts in transformers' models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next

from nemo_kto.network.flops import ModelFlops
from nemo_kto.network.projections import LoRASettings
from nemo_kto.runtime.devices import DEVICES, peak_flops
from tests.network.tiny_hf import documents, families

LENGTHS = [len(document) for document in documents()]
TOKENS = sum(LENGTHS)
FAMILIES = families()
TRAINED = ("llama", "qwen3", "llama_tied", "phi3", "starcoder2", "gemma2", "deepseek_v3_dense", "mixtral", "qwen2_moe")


def of_visible(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as a model does, but to what each token sees only: no product is made to be thrown away."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    outputs = []
    for place in range(query.shape[2]):
        seen = torch.ones(key.shape[2], dtype=torch.bool)
        if attention_mask is not None:
            mask = attention_mask[0, 0, place, : key.shape[2]]
            seen = mask if mask.dtype == torch.bool else mask == 0
        scores = query[:, :, place : place + 1] @ key[:, :, seen].transpose(2, 3)
        outputs.append(scores.softmax(-1) @ value[:, :, seen])
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register("of_visible", of_visible)
AttentionMaskInterface.register("of_visible", eager_mask)


@pytest.fixture(autouse=True)
def recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers compute linear attention token by token: its chunks take more."""
    for module in (modeling_qwen3_next, modeling_qwen3_5, modeling_qwen3_5_moe):
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", module.torch_recurrent_gated_delta_rule)


def transformers_model(config: PretrainedConfig) -> torch.nn.Module:
    """Return a model whose experts are computed one by one."""
    model: torch.nn.Module = AutoModelForCausalLM.from_config(
        config, attn_implementation="of_visible", experts_implementation="eager", dtype=torch.float32
    )
    return model


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def uncounted_of_linear_attention(config: PretrainedConfig) -> int:
    """Return what PyTorch does not count of the recurrence, less what transformers throws away.

    The recurrence is not written as products: three multiply-adds for each key and value channel of a token. The
    convolution returns `window - 1` tokens more than there are, of `window` multiply-adds for each channel.
    """
    layers = getattr(config, "layer_types", None) or []
    of_state = config.linear_key_head_dim * config.linear_value_head_dim * config.linear_num_value_heads
    window = config.linear_conv_kernel_dim
    channels = (
        2 * config.linear_num_key_heads * config.linear_key_head_dim
        + config.linear_num_value_heads * config.linear_value_head_dim
    )
    of_document = [2 * 3 * length * of_state - 2 * (window - 1) * window * channels for length in LENGTHS]
    return layers.count("linear_attention") * sum(of_document)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_forward_pass_of_every_family_is_what_pytorch_counts(name: str) -> None:
    config = FAMILIES[name]
    model = transformers_model(config).eval()
    expected = counted(lambda: [model(document[None], use_cache=False) for document in documents()])
    if hasattr(config, "linear_conv_kernel_dim"):
        expected += uncounted_of_linear_attention(config)
    assert ModelFlops(config).forward(LENGTHS, TOKENS) == expected


@pytest.mark.parametrize("name", TRAINED)
def test_a_backward_pass_is_what_pytorch_counts(name: str) -> None:
    config = FAMILIES[name]
    model = transformers_model(config)
    losses = [model(document[None], use_cache=False).logits.sum() for document in documents()]
    assert ModelFlops(config).backward(LENGTHS, TOKENS) == counted(lambda: sum(losses).backward())


def with_gradient(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Let the input of a layer have a gradient, which we count in the first layer with adapters."""
    inputs[0].requires_grad_()


ADAPTED = {
    "all": ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], None),
    "attention of some layers": ("qwen3", ["q_proj", "v_proj"], [1, 3]),
    "fused": ("phi3", ["qkv_proj", "gate_up_proj"], None),
    "experts in between": ("mixtral", ["o_proj"], [0, 2]),
    "whole besides": ("llama", ["q_proj", "o_proj"], [2]),
    "other ranks": ("llama", ["q_proj", "o_proj", "up_proj"], [0, 2]),
    "latent": ("deepseek_v3_dense", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], [2, 3]),
}


RANKS = {"other ranks": {"o_proj": 7, "layers.2.*": 1}}


@pytest.mark.parametrize("kind", ADAPTED)
def test_passes_with_adapters_are_what_pytorch_counts(kind: str) -> None:
    name, projections, layers = ADAPTED[kind]
    config = FAMILIES[name]
    chosen = tuple(range(config.num_hidden_layers) if layers is None else layers)
    patterns = RANKS.get(kind, {})
    whole = ("embed_tokens", "lm_head") if kind == "whole besides" else ()
    common: dict[str, Any] = {"rank_pattern": patterns}
    lora = LoRASettings(projections=tuple(projections), layers=chosen, rank=3, alpha=6, whole=whole, **common)
    peft = LoraConfig(
        r=3, target_modules=projections, layers_to_transform=layers, modules_to_save=list(whole) or None, **common
    )
    model = get_peft_model(transformers_model(config), peft)
    if not whole:  # the embedding has a gradient otherwise
        model.base_model.model.model.layers[chosen[0]].register_forward_pre_hook(with_gradient)
    losses: list[torch.Tensor] = []
    forward = counted(lambda: losses.extend(model(document[None]).logits.sum() for document in documents()))
    assert ModelFlops(config, lora).forward(LENGTHS, TOKENS) == forward
    assert ModelFlops(config, lora).backward(LENGTHS, TOKENS) == counted(lambda: sum(losses).backward())


def test_the_output_layer_is_counted_where_it_is_applied() -> None:
    """A llama of one layer by hand: hidden 8, two heads of 4, one key head, feed-forward 16, vocabulary 32."""
    config = LlamaConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        num_hidden_layers=1,
        vocab_size=32,
    )
    linear = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    attention = (6 + 3) * 2 * 2 * 4  # documents of 3 and 2 tokens: 6 and 3 pairs; two heads, two products of 4
    forward = 2 * (5 * linear + attention + 3 * 8 * 32)
    assert ModelFlops(config).forward([3, 2], 3) == forward
    assert ModelFlops(config).backward([3, 2], 3) == 2 * forward
    assert ModelFlops(config).forward([], 0) == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_a_peak_is_known_by_the_name_that_cuda_gives(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_memory_rates_and_links_of_a_device_are_in_bytes() -> None:
    """DGX B200: 64 TB/s and 14.4 TB/s of NVLink for eight; data sheets of H200 and A100."""
    b200, h200, a100 = (DEVICES[name] for name in ("b200", "h200", "a100"))
    assert 8 * b200.memory_bandwidth == 64e12 and 8 * b200.nvlink_bandwidth == 14.4e12
    assert (h200.memory_bandwidth, h200.nvlink_bandwidth, h200.network_bandwidth) == (4.8e12, 900e9, 400e9 / 8)
    assert (a100.nvlink_bandwidth, a100.network_bandwidth) == (600e9, 200e9 / 8)
