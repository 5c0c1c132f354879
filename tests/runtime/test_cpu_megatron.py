"""Real Megatron-Core on gloo ranks: trains as plain PyTorch does, saves, loads; and touches nothing unless asked."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import mappings
from transformers import AutoModelForCausalLM, LlamaConfig

from nemo_kto.errors import ConfigError
from nemo_kto.network.gpt import KTOGPTModel, build_gpt
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.export_hf import export_hf
from nemo_kto.weights.import_hf import import_hf
from tests.network import tiny_hf
from tests.waiting import HANG

LAYOUTS = {"one": (1, 1, 1), "DP2": (2, 1, 1), "TP2": (2, 2, 1), "PP2": (2, 1, 2)}  # processes, tensor, pipeline
SEED = 11
STEPS, LEARNING_RATE, CLIP = 3, 1e-3, 0.5


def rows() -> list[list[torch.Tensor]]:
    """Return packed rows that differ in length and in number of documents."""
    generator = torch.Generator().manual_seed(2)
    lengths = [[5, 9], [12], [2, 3, 4], [7, 7]]
    return [[torch.randint(0, 128, (length,), generator=generator) for length in row] for row in lengths]


NUM_TARGETS = sum(len(document) - 1 for row in rows() for document in row)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama whose vocabulary needs no padding, so that the loss is a plain cross-entropy in every layout."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=128, tie_word_embeddings=True)
    return tiny_hf.make_folder(tmp_path_factory.mktemp("hf") / "llama", config)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, by transformers and torch alone, one document at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    series = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = [
            F.cross_entropy(model(document[None]).logits[0, :-1], document[1:], reduction="sum")
            for row in rows()
            for document in row
        ]
        loss = torch.stack(losses).sum() / NUM_TARGETS
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        series.append((loss.item(), norm.item()))
    assert min(norm for _, norm in series) > CLIP  # or clipping would go untested
    return series


# what the ranks do


def train_layouts(folder: Path, results: Path, names: list[str]) -> None:
    """Train under each layout; save a checkpoint under the last but one, load it under the last."""
    enable_cpu()
    for name in names:
        model = build(folder, name)
        import_hf(model, folder)
        check_generators()
        series = train(model)
        if parallel.position().reports and parallel.position().dp_rank == 0:
            (results / f"{name}.json").write_text(json.dumps(series))
        if name == "TP2":
            export_hf([model], load_hf_config(folder), results / "trained")
            (results / "checkpoint").mkdir(exist_ok=True)
            dist_checkpointing.save({"model": model.sharded_state_dict()}, str(results / "checkpoint"))
    if "PP2" in names:
        model = build(folder, "PP2")
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(results / "checkpoint"))
        model.load_state_dict(state["model"])
        export_hf([model], load_hf_config(folder), results / "loaded")


def check_generators() -> None:
    """Megatron's tracker draws from its own seeds and leaves the default generator alone."""
    torch.manual_seed(4)
    undisturbed = torch.rand(3)
    torch.manual_seed(4)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        forked = torch.rand(3)
    assert torch.equal(torch.rand(3), undisturbed)
    # tensor-parallel rank r is seeded with seed + 2718 + r (tensor_parallel/random.py)
    torch.manual_seed(SEED + 2718 + parallel.position().tp_rank)
    assert torch.equal(forked, torch.rand(3))


def build(folder: Path, layout: str) -> KTOGPTModel:
    """Make the process groups and this rank's part of the model."""
    processes, tensor, pipeline = LAYOUTS[layout]
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    division = Layout(world_size=processes, tensor=tensor, pipeline=pipeline)
    parallel.initialize(division, seed=SEED)
    return build_gpt(load_hf_config(folder), division)


def train(model: KTOGPTModel) -> list[tuple[float, float]]:
    """Take the steps with Megatron's wrapper, schedule and optimizer; return loss and gradient norm of each."""
    place, config = parallel.position(), model.config
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer_config = OptimizerConfig(optimizer="adam", lr=LEARNING_RATE, weight_decay=0.0, clip_grad=CLIP)
    optimizer = get_megatron_optimizer(optimizer_config, [wrapped])
    config.finalize_model_grads_func = finalize_model_grads
    mine = rows()[place.dp_rank :: place.dp_size]
    series = []
    for _ in range(STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        with tiny_hf.rows_known(mine, model):
            outputs = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(mine),
                model=[wrapped],
                num_microbatches=len(mine),
                seq_length=1,
                micro_batch_size=1,
                forward_only=False,
            )
        _, norm, _ = optimizer.step()
        loss = torch.stack(outputs).sum() if outputs else torch.zeros(())
        dist.all_reduce(loss, group=place.dp_group)
        series.append((loss.item(), float(norm)))
    return series


def forward_step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
    row = next(data)
    hidden = model(
        input_ids=torch.cat(row)[None],
        position_ids=torch.cat([torch.arange(len(document)) for document in row])[None],
        attention_mask=None,
        packed_seq_params=tiny_hf.packed_params([len(document) for document in row]),
    )
    return hidden, partial(row_loss, row, model.module)


def row_loss(row: list[torch.Tensor], model: KTOGPTModel, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (this row's loss, scaled for Megatron's averages; the same unscaled)."""
    place = parallel.position()
    shards = tensor_parallel.copy_to_tensor_model_parallel_region(hidden) @ model.output_weight().T
    tokens = torch.cat(row)
    token_losses = tensor_parallel.vocab_parallel_cross_entropy(shards, tokens.roll(-1)[:, None])[:, 0]
    last = torch.tensor([len(document) for document in row]).cumsum(0) - 1
    token_losses = token_losses.index_fill(0, last, 0.0)
    loss = token_losses.sum() / NUM_TARGETS
    num_microbatches = len(rows()) // place.dp_size
    return loss * num_microbatches * place.dp_size, loss.detach().clone()


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]) -> Path:
    """Folder with what the ranks wrote."""
    root = tmp_path_factory.mktemp("results")
    run_ranks(train_layouts, 1, folder, root, ["one"])
    run_ranks(train_layouts, 2, folder, root, ["DP2", "TP2", "PP2"])
    return root


# what must come out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_plain_pytorch(results: Path, oracle: list[tuple[float, float]], layout: str) -> None:
    series = json.loads((results / f"{layout}.json").read_text())
    torch.testing.assert_close(torch.tensor(series), torch.tensor(oracle), rtol=1e-5, atol=0)


def test_checkpoint_of_one_layout_loads_into_another(results: Path, folder: Path) -> None:
    trained, loaded = (tiny_hf.stored_tensors(results / name) for name in ("trained", "loaded"))
    before = tiny_hf.stored_tensors(folder)
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    assert not any(torch.equal(trained[name], before[name]) for name in trained)


def exchange_unevenly() -> None:
    """Gather and scatter parts of different lengths, and one of none, through autograd as Megatron's layers do."""
    enable_cpu()
    rank = dist.get_rank()
    sizes = [3, 0]
    group = dist.new_group([0, 1])
    mine = torch.arange(6.0).reshape(3, 2) + 1 if rank == 0 else torch.zeros(0, 2)
    mine.requires_grad_()
    gathered = mappings.gather_from_sequence_parallel_region(mine, group=group, output_split_sizes=sizes)
    assert gathered.tolist() == [[1, 2], [3, 4], [5, 6]]
    scattered = mappings.reduce_scatter_to_sequence_parallel_region(gathered, group=group, input_split_sizes=sizes)
    assert scattered.tolist() == (2 * mine).tolist()  # the sum of two equal copies
    scattered.sum().backward()
    assert mine.grad is not None and mine.grad.tolist() == torch.full_like(mine, 2.0).tolist()

    even = mappings.gather_from_sequence_parallel_region(torch.full((1,), float(rank)), group=group)
    assert even.tolist() == [0, 1]


def test_parts_of_different_lengths_are_exchanged(run_ranks: Callable[..., None]) -> None:
    run_ranks(exchange_unevenly, 2)


def route_alone() -> None:
    """Route and dispatch tokens in one process, without a stream and without starting torch's compiler."""
    enable_cpu()
    parallel.initialize(Layout(world_size=1), seed=SEED)
    config = tiny_hf.families()["mixtral"]
    layer = build_gpt(config, Layout(world_size=1)).decoder.layers[0].mlp
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(5, 1, config.hidden_size)
    output, _ = layer(hidden)

    logits = hidden[:, 0] @ layer.router.weight.T
    weights, chosen = logits.softmax(-1).topk(config.num_experts_per_tok)
    weights = weights / weights.sum(-1, keepdim=True)
    for token, (row, shares, experts) in enumerate(zip(hidden[:, 0], weights, chosen, strict=True)):
        parts = [layer.experts.local_experts[expert](row[None])[0] for expert in experts]
        expected = sum(share * part[0] for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(output[token, 0], expected, rtol=1e-5, atol=1e-5)
    assert not torch._dynamo.utils.compilation_time_metrics, "the compiler was started"


def test_tokens_are_dispatched_without_a_stream_and_a_compiler(run_ranks: Callable[..., None]) -> None:
    run_ranks(route_alone, 1)


def test_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="trainer.accelerator=gpu"):
        enable_cpu()


def test_nothing_is_patched_before_the_call_and_once_by_it() -> None:
    script = """
import torch
before = (torch.cuda.current_device, torch.Tensor.cuda, torch.cuda.get_rng_state)
from nemo_kto.runtime.cpu_megatron import enable_cpu
assert (torch.cuda.current_device, torch.Tensor.cuda, torch.cuda.get_rng_state) == before
enable_cpu()
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer import mlp
first = (torch.cuda.current_device, torch.Tensor.cuda, clip_grads.torch, mappings._gather_along_first_dim)
assert not set(first) & set(before)
enable_cpu()
assert (torch.cuda.current_device, torch.Tensor.cuda, clip_grads.torch, mappings._gather_along_first_dim) == first
assert mlp.torch is torch
assert clip_grads.torch.zeros(2, device="cuda").device.type == "cpu"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=HANG)
