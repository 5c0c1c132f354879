"""Models made of Transformer Engine's layers: their weights' names, their numbers, and how they train.

Skipped where its Python is not at hand: see `engine.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda_sim import engine
from tests.cuda_sim.building import NoDevice, build
from tests.cuda_sim.test_host_syncs import watched
from tests.cuda_sim.test_optimizer_on_host import SAVING
from tests.cuda_sim.test_same_series import BF16, EXPERTS, LORA, RECOMPUTE, TP2_SP, assert_same
from tests.distributed_harness import RankServer, free_port
from tests.integration.assets import make_model_folder, read_series, settings, train_on_rank
from tests.network import tiny_hf

ENGINE = {"model__transformer_impl": "transformer_engine"}
ON_HOST = {"model__optim__offload_fraction": 1.0}
EP2 = {**EXPERTS, "model__micro_batch_size": 2}
ETP2 = {**EP2, **TP2_SP, "model__expert_model_parallel_size": 1, "model__expert_tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def engine_ranks() -> Iterator[Callable[..., list[Any]]]:
    """Return `engine_ranks(function, world_size, *arguments)`: like `gpu_ranks`, with Transformer Engine."""
    if not os.environ.get(engine.FOLDER):
        pytest.skip(f"{engine.FOLDER} names no folder with Transformer Engine (tests/cuda_sim/engine.py)")
    try:
        build()
    except NoDevice as reason:
        pytest.skip(f"no simulated GPU: {reason}")
    server = RankServer(engine.install, backend="nccl")
    yield lambda function, world_size, *arguments: server.run(function, world_size, arguments)
    server.close()


def engines_parts(model: torch.nn.Module) -> set[str]:
    """Return the names of its classes that are Transformer Engine's, or Megatron's around them."""
    return {name for module in model.modules() if (name := type(module).__name__).startswith("TE")}


def converted(folder: Path, dtype: torch.dtype, unfused: bool) -> tuple[set[str], torch.Tensor]:
    """Import a folder, export it beside as `out`, and return (the engine's classes, logits of `documents`)."""
    from nemo_kto.network.gpt import build_gpt
    from nemo_kto.network.hf_config import load_hf_config
    from nemo_kto.runtime import parallel
    from nemo_kto.runtime.layout import Layout
    from nemo_kto.weights.export_hf import export_hf
    from nemo_kto.weights.import_hf import import_hf

    layout = Layout(world_size=1)
    parallel.initialize(layout, seed=1)
    hf_config = load_hf_config(folder)
    model = build_gpt(hf_config, layout, transformer_impl="transformer_engine", params_dtype=dtype, unfused=unfused)
    import_hf(model, folder)
    export_hf([model], hf_config, folder.with_name("out"))
    logits = tiny_hf.packed_logits(model)
    assert logits is not None
    return engines_parts(model), logits.float().cpu()


@pytest.mark.parametrize("unfused", [pytest.param(False, id="fused"), pytest.param(True, id="unfused")])
@pytest.mark.parametrize("name", tiny_hf.families())
def test_every_family_comes_back_bit_by_bit_and_has_transformers_logits(
    tmp_path: Path, engine_ranks: Callable[..., list[Any]], name: str, unfused: bool
) -> None:
    """In float32, where the engine's linear layers, norms and experts have our attention between them."""
    folder = tiny_hf.make_folder(tmp_path / "in", tiny_hf.families()[name])
    ((parts, logits),) = engine_ranks(converted, 1, folder, torch.float32, unfused)
    stored, back = tiny_hf.stored_tensors(folder), tiny_hf.stored_tensors(tmp_path / "out")
    assert stored.keys() == back.keys()
    assert all(torch.equal(stored[key], back[key]) for key in stored)
    assert unfused or parts or name not in ("llama", "mixtral")  # layers of some families are Megatron's own
    torch.testing.assert_close(logits, tiny_hf.transformers_logits(folder), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_its_attention_keeps_documents_apart(
    tmp_path: Path, engine_ranks: Callable[..., list[Any]], name: str
) -> None:
    """In bfloat16, which its kernels for packed rows take."""
    folder = tiny_hf.make_folder(tmp_path / "in", tiny_hf.families()[name], dtype=torch.bfloat16)
    ((parts, logits),) = engine_ranks(converted, 1, folder, torch.bfloat16, False)
    assert "TEDotProductAttention" in parts
    expected = tiny_hf.transformers_logits(folder, dtype=torch.bfloat16).float()
    # of a few tokens a router chooses another expert, as bfloat16 rounds
    assert (logits - expected).abs().quantile(0.9) < 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    ("ranks", "changes", "error"),
    [
        pytest.param(1, {}, 1e-4, id="float32"),
        pytest.param(2, TP2_SP, 1e-4, id="float32 TP2 SP"),
        pytest.param(2, EP2, 1e-4, id="float32 EP2"),
        pytest.param(2, ETP2, 1e-4, id="float32 ETP2"),
        pytest.param(1, BF16, 3e-2, id="bf16"),
        pytest.param(1, {**BF16, **LORA, **RECOMPUTE}, 3e-2, id="bf16 LoRA recompute"),
    ],
)
def test_it_trains_as_local_layers_do(
    root: Path, tmp_path: Path, engine_ranks: Any, run_ranks: Any, ranks: int, changes: dict[str, Any], error: float
) -> None:
    """The gradient's norm too, over the parts of all ranks: the layers are marked as divided, whatever they say."""
    series = []
    for kind, run, own in (("engine", engine_ranks, ENGINE), ("local", run_ranks, {})):
        values = settings(
            root,
            tmp_path / kind,
            trainer__accelerator="gpu" if own else "cpu",
            trainer__kto__max_steps=3,
            **{"model__micro_batch_size": 2, **changes, **own},
        )
        model = root / values["pretrained_checkpoint.restore_from_path"]
        values["pretrained_checkpoint.restore_from_path"] = str(model)
        run(train_on_rank, ranks, free_port(), values)
        series.append(read_series(tmp_path / kind))
    assert_same(*series, error=error)


def test_its_adam_reads_checkpoints_of_ours_and_ours_its(root: Path, tmp_path: Path, engine_ranks: Any) -> None:
    """Two steps by its Adam, two by ours with the state on the host, two by its again, as by its Adam throughout."""
    parts = [{"trainer__kto__max_steps": 2}, {"trainer__kto__max_steps": 4, **ON_HOST}, {"trainer__kto__max_steps": 6}]
    for name, runs in (("parts", parts), ("whole", parts[2:])):
        for changes in runs:
            common = {"trainer__accelerator": "gpu", "model__micro_batch_size": 2, **BF16, **ENGINE, **SAVING}
            values = settings(root, tmp_path / name, **{**common, **changes})
            engine_ranks(train_on_rank, 2, free_port(), values)
    # its kernel, an imitation, and torch's add up in another order; bias correction by a wrong step would be felt
    assert_same(read_series(tmp_path / "parts"), read_series(tmp_path / "whole"), error=3e-3)


def test_the_host_waits_no_oftener_for_more_layers(root: Path, tmp_path: Path, engine_ranks: Any) -> None:
    make_model_folder(root / "eight layers", layers=8)
    for model, rows in (("hf", 2), ("eight layers", 4)):
        values = settings(
            root,
            tmp_path / model,
            trainer__accelerator="gpu",
            trainer__kto__max_steps=2,
            model__micro_batch_size=8 // rows,
            **BF16,
            **ENGINE,
        )
        values["pretrained_checkpoint.restore_from_path"] = str(root / model)
        ((found, uploads),) = engine_ranks(watched, 1, free_port(), values)
        assert sum(found.values()) <= 6, found
        assert uploads
