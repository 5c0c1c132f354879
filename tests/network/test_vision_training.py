"""Training a model with what sees images: steps, checkpoints under another layout, and adapters beside it frozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_kto.config.schema import OptimConfig
from nemo_kto.kto.scoring import RowScorer, unwrapped
from nemo_kto.network.gpt import VISION_PREFIX
from nemo_kto.network.lora import adapters_off, add_adapters, initialize_adapters
from nemo_kto.network.projections import LoRASettings
from nemo_kto.network.sharded import ADAPTERS
from nemo_kto.runtime import checkpoint as ckpt
from nemo_kto.runtime import parallel
from nemo_kto.runtime.checkpoint import ShardedCheckpointIO
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.optimizer import make_optimizer, wrap_for_training
from tests.network import tiny_vision


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with each model."""
    return tiny_vision.make_folders(tmp_path_factory.mktemp("source"))


STEPS = 3
ADAM: dict[str, Any] = {"lr": 0.02, "betas": [0.8, 0.9], "eps": 1e-2, "weight_decay": 0.0}
"""With an epsilon beside which the rounding of small gradients is nothing."""
TRAINED = ("llava_clip", "qwen2_5_vl")


def learn(
    source: Path, layout: str, overlap: bool, steps: int = STEPS, kept: Path | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """Return what sees images in each model after some steps in which all of it is trained.

    With `kept` a checkpoint is written there behind them; if there is one already, they go on from it.
    """
    found = {}
    for name in TRAINED:
        division = Layout(world_size=dist.get_world_size(), **tiny_vision.LAYOUTS[layout])
        optim = OptimConfig(**ADAM, overlap_grad_sync=overlap, overlap_param_sync=overlap)
        chunks = wrap_for_training(tiny_vision.chunks_of(source / name, division, train="all"), optim)
        optimizer = make_optimizer(chunks, optim, params_dtype=torch.float32, gradient_clip=0.0)
        scorer = RowScorer(chunks=chunks, place=parallel.position(), layout=division)
        checkpoint = kept and kept / name
        if checkpoint is not None and checkpoint.exists():
            go_on(chunks, optimizer, checkpoint)
            checkpoint = None
        for _ in range(steps):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            scorer.train(tiny_vision.rows_of(source / name), tiny_vision.loss_of)
            optimizer.step()
        if overlap:
            for chunk in chunks:
                chunk.start_param_sync(force_sync=True)
        if checkpoint is not None:
            ShardedCheckpointIO().save_checkpoint(state_of(chunks, optimizer, is_loading=False), checkpoint)
        vision = unwrapped(chunks[0]).vision
        if vision is not None:
            found[name] = {vision.source_name(key): each.detach().clone() for key, each in vision.named_parameters()}
    return found


def state_of(chunks: Any, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """Return the sharded state of a run, as the strategy has it."""
    ckpt.allocate_optimizer_state(optimizer)
    metadata = ckpt.sharding_metadata()
    models = {
        f"chunk{number}": ckpt.sharded_trained(unwrapped(chunk), metadata) for number, chunk in enumerate(chunks)
    }
    state = optimizer.sharded_state_dict(dict(models), is_loading=is_loading, metadata=metadata)
    return {"state_dict": models, "optimizer": state}


def go_on(chunks: Any, optimizer: Any, checkpoint: Path) -> None:
    """Take over what a checkpoint holds of what is trained, and the optimizer's state."""
    sharded = state_of(chunks, optimizer, is_loading=True)
    loaded = ShardedCheckpointIO().load_checkpoint(checkpoint, sharded_state_dict=sharded)
    for number, chunk in enumerate(chunks):
        model = unwrapped(chunk)
        left = model.load_state_dict(loaded["state_dict"][f"chunk{number}"], strict=False).missing_keys
        # CLIP's unused layers are in no checkpoint
        assert not {name for name, each in model.named_parameters() if each.requires_grad} & set(left)
    optimizer.load_state_dict(loaded["optimizer"])
    ckpt.separate_step_counters(optimizer)


@pytest.fixture(scope="module")
def learned(source: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return all parameters of transformers' models after those steps of torch's Adam."""
    found = {}
    for name in TRAINED:
        model = tiny_vision.load(source / name)
        shown = [each for row in tiny_vision.documents(model.config) for each in row]
        optimizer = torch.optim.Adam(model.parameters(), lr=ADAM["lr"], betas=ADAM["betas"], eps=ADAM["eps"])
        for _ in range(STEPS):
            optimizer.zero_grad()
            logps = torch.stack([tiny_vision.whole_logps(model, each) for each in shown])
            (logps * torch.tensor(tiny_vision.WEIGHTS)).sum().backward()
            optimizer.step()
        found[name] = {key.removeprefix("model."): each.detach() for key, each in model.named_parameters()}
    return found


@pytest.mark.parametrize(("layout", "overlap"), [("TP1", False), ("TP2_SP", False), ("DP2", True), ("CP2", True)])
def test_steps_of_adam_equal_those_with_transformers(
    source: Path,
    learned: dict[str, dict[str, torch.Tensor]],
    run_ranks: Callable[..., Any],
    layout: str,
    overlap: bool,
) -> None:
    """Also where a rank has no images, and what is to come of gradients and parameters comes in the background."""
    for found in run_ranks(learn, tiny_vision.world_of(layout), source, layout, overlap):
        for name in TRAINED:
            assert len(found[name]) > 10
            for key, each in found[name].items():
                torch.testing.assert_close(each, learned[name][key], rtol=0, atol=2e-4)


@pytest.mark.parametrize(("before", "after"), [("TP2_SP", "TP1"), ("PP2", "DP2")])
def test_a_checkpoint_is_read_under_another_layout(
    source: Path,
    learned: dict[str, dict[str, torch.Tensor]],
    run_ranks: Callable[..., Any],
    tmp_path: Path,
    before: str,
    after: str,
) -> None:
    run_ranks(learn, tiny_vision.world_of(before), source, before, False, STEPS - 1, tmp_path)
    for found in run_ranks(learn, tiny_vision.world_of(after), source, after, False, 1, tmp_path):
        for name in TRAINED:
            for key, each in found[name].items():
                torch.testing.assert_close(each, learned[name][key], rtol=0, atol=2e-4)


# adapters


def adapt(source: Path) -> None:
    """Adapters of the language model alone are trained; without them log-probs are what they were."""
    enable_cpu()
    for name in tiny_vision.configs():
        (plain,) = tiny_vision.chunks_of(source / name, Layout(world_size=1))
        before = tiny_vision.logps_of(source / name, [plain], Layout(world_size=1))
        (model,) = tiny_vision.chunks_of(source / name, Layout(world_size=1), unfused=True)
        settings = LoRASettings(projections=("q_proj", "up_proj"), layers=(0, 2), rank=2, alpha=4.0, dropout=0.0)
        add_adapters(model, settings)
        initialize_adapters(model, seed=3)
        trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        assert trained and all(ADAPTERS in key and not key.startswith(VISION_PREFIX) for key in trained)
        assert not any(key.startswith(VISION_PREFIX) for key in ckpt.sharded_trained(model, ckpt.sharding_metadata()))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ADAPTERS in key:
                    parameter.add_(0.1)
        assert not torch.equal(tiny_vision.logps_of(source / name, [model], Layout(world_size=1)), before)
        with adapters_off([model]):
            torch.testing.assert_close(
                tiny_vision.logps_of(source / name, [model], Layout(world_size=1)), before, rtol=0, atol=1e-6
            )


def test_adapters_are_beside_the_language_model(source: Path, run_ranks: Callable[..., Any]) -> None:
    run_ranks(adapt, 1, source)
