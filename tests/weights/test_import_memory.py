"""How much of a folder is in memory while it is read, counted tensor by tensor: little beside what a rank keeps."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from nemo_kto.network.families import family_of
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.quantised_weight import QuantisedWeight
from nemo_kto.network.stored import SafetensorsFolder
from nemo_kto.network.weight_rules import expected_shapes
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.dry_run import alone
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights import import_hf as importing
from nemo_kto.weights.import_hf import import_hf
from tests.network import tiny_hf

SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    # 128 experts, as Qwen3-30B-A3B has them in eight times as many layers
    "mixture": lambda: Qwen3MoeConfig(
        **{"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 6},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936},
        **{"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 4096},
    ),
    # Llama 3's 8B
    "dense": lambda: LlamaConfig(
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 4096},
    ),
}
CASES: list[tuple[str, Layout, int]] = [
    ("mixture", Layout(world_size=8, expert=8), 0),
    ("mixture", Layout(world_size=8, expert=4, pipeline=2), 7),  # the last stage, which reads the output layer last
    ("mixture", Layout(world_size=4, tensor=4, sequence=True, expert=4, expert_tensor=1), 3),
    ("dense", Layout(world_size=8, tensor=8), 0),
    ("dense", Layout(world_size=8, pipeline=8), 7),
]
"""Shape, layout, and which rank of it."""


def write_header(folder: Path, config: PretrainedConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a folder whose one file of weights has a header, and then a hole in the place of the numbers."""
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


class Empty:
    """A tensor of a file, of which blocks have shapes but no contents, so that a dry run counts them."""

    def __init__(self, stored: Any) -> None:
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype

    def __getitem__(self, where: tuple[slice, ...]) -> torch.Tensor:
        sizes = [len(range(*part.indices(size))) for part, size in zip(where, self.get_shape(), strict=True)]
        return torch.empty(sizes, dtype=torch.bfloat16)


def counted(folder: Path, layout: Layout, rank: int, quantised: str | None) -> tuple[int, int, int]:
    """Return the bytes of what a rank keeps, and the most that was there at once while it was made, and read."""
    torch.distributed.destroy_process_group()  # the harness's
    slice_of = SafetensorsFolder._slice_of
    SafetensorsFolder._slice_of = lambda source, name: Empty(slice_of(source, name))
    try:
        with alone(layout, rank) as run:
            hf_config = load_hf_config(folder)
            model = build_gpt(hf_config, layout, params_dtype=torch.bfloat16, unfused=True, quantised=quantised)
            kept, building = run.held, max(run.peaks.values())
            assert kept >= sum(nbytes(parameter) for parameter in model.parameters())
            run.forget_peaks()
            import_hf(model, folder)
            gc.collect()
            assert run.held == pytest.approx(kept, abs=4096)  # but for tables of levels
            return kept, building, max(run.peaks.values())
    finally:
        SafetensorsFolder._slice_of = slice_of


def nbytes(parameter: torch.Tensor) -> int:
    if isinstance(parameter, QuantisedWeight):
        return sum(part.nbytes for part in parameter.parts.values())
    return parameter.nbytes


@pytest.mark.parametrize(("shape", "layout", "rank"), CASES)
def test_little_is_there_beside_what_a_rank_keeps(
    tmp_path: Path, run_ranks: Callable[..., Any], shape: str, layout: Layout, rank: int
) -> None:
    """A tenth at most, were all of it in memory from the beginning."""
    config = SHAPES[shape]()
    write_header(tmp_path, config, expected_shapes(family_of(config).rules(config)))
    ((kept, _, peak),) = run_ranks(counted, 1, tmp_path, layout, rank, None)
    assert kept > 10**9 and kept < peak <= 1.1 * kept


@pytest.mark.parametrize("kind", ["nf4", "nf4_double", "int8"])
@pytest.mark.parametrize("size", [1, 8])
def test_a_base_in_fewer_bits_is_never_there_in_whole(
    tmp_path: Path, run_ranks: Callable[..., Any], kind: str, size: int
) -> None:
    """Of 8B, on one rank or eight: a tenth of what is kept, and one tensor as it is stored, from building it on."""
    config = SHAPES["dense"]()
    write_header(tmp_path, config, expected_shapes(family_of(config).rules(config)))
    ((kept, building, peak),) = run_ranks(counted, 1, tmp_path, Layout(world_size=size, tensor=size), 0, kind)
    tensor = 2 * 4096 * 14336
    assert kept < (7.6e9 if kind.startswith("nf4") else 10.5e9) / size
    assert kept <= building <= 1.1 * kept + 2 * tensor / size  # gate and up are one here
    assert kept < peak <= 1.1 * kept + tensor


def test_experts_that_share_a_tensor_are_read_one_by_one(tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    """As transformers 5 holds them: gate and up of all experts of a layer are one tensor, here of 805 MB."""
    config = SHAPES["mixture"]()
    shapes = expected_shapes(family_of(config).rules(config))
    for layer in range(config.num_hidden_layers):
        place = f"model.layers.{layer}.mlp.experts"
        for expert in range(128):
            for name in ("gate_proj", "up_proj", "down_proj"):
                del shapes[f"{place}.{expert}.{name}.weight"]
        shapes |= {f"{place}.gate_up_proj": (128, 2 * 768, 2048), f"{place}.down_proj": (128, 2048, 768)}
    write_header(tmp_path, config, shapes)
    ((kept, _, peak),) = run_ranks(counted, 1, tmp_path, Layout(world_size=8, expert=8), 5, None)
    assert kept < peak <= 1.1 * kept


PARTS = ("llama_tied", "phi3", "mixtral", "qwen3_5_text", "starcoder2")


def read_in_parts(source: Path) -> None:
    """Compare what is read a few rows at a time with what is read whole, on each of two tensor-parallel ranks."""
    enable_cpu()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    layout = Layout(world_size=2, tensor=2, sequence=True)
    parallel.initialize(layout, seed=1)
    usual = importing._AT_ONCE
    for name in PARTS:
        read = []
        for at_once in (usual, 100):  # three rows of 32 numbers, two of 48
            model = build_gpt(load_hf_config(source / name), layout)
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))
            importing._AT_ONCE = at_once
            try:
                import_hf(model, source / name)
            finally:
                importing._AT_ONCE = usual
            read.append(dict(model.named_parameters()))
        assert all(torch.equal(parameter, read[1][key]) for key, parameter in read[0].items()), name


def test_what_is_read_in_parts_is_what_is_read_whole(tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    for name in PARTS:
        tiny_hf.make_folder(tmp_path / name, tiny_hf.families()[name])
    run_ranks(read_in_parts, 2, tmp_path)
