"""Linear attention: what kernels are asked, which layouts it allows, and what is kept of documents that go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from nemo_kto.errors import ConfigError
from nemo_kto.network import delta_net
from nemo_kto.network.families import dimensions_of, family_of
from nemo_kto.network.gpt import build_gpt, initialize_weights
from nemo_kto.network.hf_config import check_hf_config, load_hf_config
from nemo_kto.network.projections import layers_with, projections_of
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout, check_layout
from nemo_kto.weights.import_hf import import_hf
from tests.network import tiny_hf

ENDS = torch.tensor(tiny_hf.DOCUMENT_LENGTHS).cumsum(0).tolist()
CALLED: list[str] = []


def flash_linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, cu_seqlens: torch.Tensor, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as fla's kernel does: `[1, T, heads, channels]`, all heads alike, documents by their boundaries."""
    CALLED.append("rule")
    assert query.shape == key.shape and query.shape[:3] == value.shape[:3]
    assert cu_seqlens.dtype == torch.int64 and cu_seqlens.tolist() == [0, *ENDS]
    found = []
    for start, end in zip([0, *ENDS], ENDS, strict=False):
        of_document = {name: settings[name][:, start:end] for name in ("g", "beta")}
        parts = (part[:, start:end] for part in (query, key, value))
        found.append(theirs.torch_chunk_gated_delta_rule(*parts, **{**settings, **of_document}))
    return torch.cat([output for output, _ in found], 1), torch.cat([state for _, state in found])


def causal_conv1d(
    values: torch.Tensor, weight: torch.Tensor, bias: None, *, seq_idx: torch.Tensor, activation: str
) -> torch.Tensor:
    """Do as causal_conv1d's kernel does, which wants neighbouring channels with numbers of documents."""
    CALLED.append("convolution")
    assert values.stride(1) == 1 and seq_idx.dtype == torch.int32 and activation == "silu" and bias is None
    assert not values.shape[1] % 8
    parts = [values[:, :, seq_idx[0] == number] for number in seq_idx.unique()]
    before = weight.shape[1] - 1
    found = [F.conv1d(F.pad(part, (before, 0)), weight[:, None], groups=len(weight)) for part in parts]
    return F.silu(torch.cat(found, dim=2))


def compare_kernels(folder: Path) -> None:
    """Compare the logits with and without kernels, in one process."""
    enable_cpu()
    parallel.initialize(Layout(world_size=1), seed=1)
    model = build_gpt(load_hf_config(folder), Layout(world_size=1))
    import_hf(model, folder)
    plain = tiny_hf.packed_logits(model)
    layer = delta_net.GatedDeltaNet
    with (
        mock.patch.object(layer, "_takes_kernels", return_value=True),
        mock.patch.object(delta_net, "chunk_gated_delta_rule", flash_linear_attention),
        mock.patch.object(delta_net, "causal_conv1d_fn", causal_conv1d),
    ):
        kernels = tiny_hf.packed_logits(model)
    assert CALLED == ["convolution", "rule"] * 3
    torch.testing.assert_close(kernels, plain, rtol=0, atol=1e-5)
    assert not torch.equal(torch.as_tensor(kernels), torch.as_tensor(plain))
    inputs = torch.zeros(3, dtype=torch.bfloat16)
    found = model.decoder.layers[0].self_attention
    assert not found._takes_kernels(inputs)  # a CPU has none


def test_kernels_are_asked_for_the_same(tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    folder = tiny_hf.make_folder(tmp_path / "model", tiny_hf.families()["qwen3_5_text"])
    run_ranks(compare_kernels, 1, folder)


def random_weights() -> None:
    """Make a model with random weights: of its norms, those that one is added to are zero, the gated ones are one."""
    enable_cpu()
    parallel.initialize(Layout(world_size=1), seed=1)
    model = build_gpt(tiny_hf.families()["qwen3_5_text"], Layout(world_size=1))
    initialize_weights(model, seed=1, std=0.02)
    norms = {name: parameter for name, parameter in model.named_parameters() if "norm" in name}
    for name, parameter in norms.items():
        assert (parameter == (1.0 if name.endswith("gated_norm_weight") else 0.0)).all(), name
    assert sum(name.endswith("gated_norm_weight") for name in norms) == 3


def test_random_norms_do_nothing(run_ranks: Callable[..., Any]) -> None:
    run_ranks(random_weights, 1)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"world_size": 4, "tensor": 4}, "tensor_model_parallel_size=4"),
        ({"world_size": 4, "context": 4}, "tensor_model_parallel_size=1 x model.context_parallel_size=4"),
        ({"world_size": 4, "tensor": 2, "context": 2}, "tensor_model_parallel_size=2 x model.context"),
    ],
)
def test_layouts_that_cannot_divide_key_heads_are_refused(sizes: dict[str, int], named: str) -> None:
    config = AutoConfig.for_model(**{**tiny_hf.families()["qwen3_5_text"].to_dict(), "num_key_value_heads": 4})
    with pytest.raises(ConfigError, match=r"2 key heads of linear attention cannot be divided by model\." + named):
        check_layout(Layout(**sizes), dimensions_of(config).divided)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_act", "gelu_pytorch_tanh"), ("linear_num_value_heads", 5), ("layer_types", ["sliding_attention"] * 4)],
)
def test_what_cannot_be_expressed_is_named(field: str, value: Any) -> None:
    config = tiny_hf.families()["qwen3_5_text"]
    setattr(config, field, value)
    with pytest.raises(ConfigError, match=f"{field} is not supported"):
        check_hf_config(config)


def test_layers_of_linear_attention_as_published() -> None:
    """A folder says how often a layer has the other kind, which transformers makes a list of."""
    keys = {**tiny_hf.families()["qwen3_next"].to_dict(), "num_hidden_layers": 12, "full_attention_interval": 3}
    del keys["layer_types"]
    config = AutoConfig.for_model(**keys)
    expected = tuple(layer for layer, kind in enumerate(config.layer_types) if kind == "linear_attention")
    assert expected == (0, 1, 3, 4, 6, 7, 9, 10)

    class Plain:
        layer_types = None
        full_attention_interval = 3

        def __getattr__(self, name: str) -> Any:
            return keys[name]

    found = family_of(config).delta(Plain())
    assert found is not None and found.layers == expected == family_of(config).delta(config).layers  # type: ignore[union-attr]


def test_only_layers_with_a_projection_have_its_adapters() -> None:
    config = tiny_hf.families()["qwen3_next"]
    assert layers_with(projections_of(["attention"], config), config) == (2,)
    assert layers_with(projections_of(["all"], config), config) == (0, 1, 2, 3)
    with pytest.raises(ConfigError, match="in_proj_qkvz is unknown"):
        projections_of(["in_proj_qkvz"], config)
