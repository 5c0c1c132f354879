"""What a dry run and the planner's formula say of a step's memory is what trainings on the simulated device took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig

from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.optimizer import frugal_adams
from tests.cuda_sim.test_same_series import BF16, DORA, LORA, RECOMPUTE, TP2_SP
from tests.distributed_harness import free_port
from tests.integration.assets import WORDS, make_tokenizer, settings, train_on_rank

SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
PP2 = {"model__pipeline_model_parallel_size": 2}
ON_HOST = {"model__optim__offload_fraction": 1.0}
HALF_ON_HOST = {"model__optim__offload_fraction": 0.5, "model__optim__states": "bfloat16"}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model whose activations are many times what a process holds besides, and feedback."""
    return make_assets(tmp_path_factory.mktemp("larger"), LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same with a mixture of eight experts, two for each token."""
    config = MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2)
    return make_assets(tmp_path_factory.mktemp("mixture"), config)


def make_assets(folder: Path, config: PretrainedConfig) -> Path:
    tokenizer = make_tokenizer()
    config.eos_token_id = tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    text = " ".join(WORDS * 5)
    with (folder / "train.jsonl").open("w") as stream:
        for number in range(16):
            record = {"prompt": f"{WORDS[number]} {text}", "completion": f" {text}", "label": number % 2 == 0}
            stream.write(json.dumps(record) + "\n")
    return folder


class Meter(Callback):
    """Reads the device's count in the second step."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            lengths = iter([(prompt.numel(), response.numel()) for prompt, response in batch.samples])
            self.found["rows"] = [[next(lengths) for _ in range(size)] for size in batch.row_sizes]
            self.found["held"] = torch.cuda.memory_allocated()
            self.found["host"] = on_host(trainer.strategy.optimizers[0])
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            self.found["peak"] = torch.cuda.max_memory_allocated()


def on_host(optimizer: Any) -> int:
    """Return the bytes of the host's memory that an optimizer has taken, but for counters."""
    taken = 0
    for adam in frugal_adams(optimizer):
        states = [value for state in adam.state.values() for name, value in state.items() if name != "step"]
        taken += sum(each.nbytes for each in [*states, *adam._staging] if not each.is_cuda)
    return taken


def trained(assets: Path, log_folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the overrides of a run of two steps."""
    return settings(
        assets,
        log_folder,
        trainer__accelerator="gpu",
        trainer__kto__max_steps=2,
        model__micro_batch_size=2,
        model__data__seq_length=256,
        **changes,
    )


def measured(port: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return what a training takes on this rank, and the micro-batches it was measured with."""
    meter = Meter()
    train_on_rank(port, overrides, callbacks=[meter])
    return meter.found


def given(overrides: dict[str, Any]) -> tuple[Any, Any]:
    """Return the configuration of a run and that of its model."""
    from omegaconf import OmegaConf

    from nemo_kto.config.compose import parse_config
    from nemo_kto.network.hf_config import load_hf_config

    torch.distributed.destroy_process_group()  # the harness's
    raw = OmegaConf.create({})
    for key, value in overrides.items():
        OmegaConf.update(raw, key, value)
    return parse_config(raw), load_hf_config(overrides["pretrained_checkpoint.restore_from_path"])


def predicted(overrides: dict[str, Any], layout: Layout, rank: int, rows: Any) -> Any:
    """Return what a dry run finds."""
    from nemo_kto.runs.memory import step_memory

    config, hf_config = given(overrides)
    return step_memory(config, hf_config, layout, rank, rows=rows, every_layer=True)


def planned(overrides: dict[str, Any], layout: Layout, rank: int, rows: Any) -> tuple[float, int]:
    """Return the peak that the planner's formula finds, and what of the host's memory the optimizer takes."""
    from nemo_kto.network.families import dimensions_of, family_of
    from nemo_kto.planning.counts import parts_of
    from nemo_kto.planning.memory import Activations, adapters_by_layer, held_memory
    from nemo_kto.runs.reference import lora_settings, reference_settings

    config, hf_config = given(overrides)
    lora = lora_settings(config, hf_config)
    reference = reference_settings(config, hf_config, lora, accelerator="gpu")
    stage = rank // (layout.world_size // layout.pipeline)
    held = held_memory(config, parts_of(config, hf_config, lora), layout, stage, reference)
    sizes, fields = dimensions_of(hf_config), family_of(hf_config).fields(hf_config)
    activations = Activations(
        config=config,
        sizes=sizes,
        fields=fields,
        layout=layout,
        lora=lora,
        adapters=adapters_by_layer(lora, hf_config),
    )
    return held.held + max(activations.peak(stage, rows), held.update), held.host_optimizer


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        pytest.param(Layout(world_size=1), BF16, id="bf16"),
        pytest.param(Layout(world_size=1), {**BF16, **LORA, **RECOMPUTE}, id="bf16 LoRA recompute"),
        pytest.param(Layout(world_size=2, tensor=2, sequence=True), {**BF16, **DORA, **TP2_SP}, id="bf16 DoRA TP2 SP"),
        pytest.param(Layout(world_size=1), {"model__kto__reference__mode": "resident"}, id="float32 resident"),
        pytest.param(Layout(world_size=2, tensor=2, sequence=True), {**BF16, **TP2_SP}, id="bf16 TP2 SP"),
        pytest.param(Layout(world_size=2, pipeline=2), {**BF16, **PP2}, id="bf16 PP2"),
        pytest.param(Layout(world_size=2), BF16, id="bf16 DP2"),
        pytest.param(Layout(world_size=1), {**BF16, "model__optim__states": "bfloat16"}, id="bf16 moments"),
        pytest.param(Layout(world_size=1), {**BF16, **ON_HOST}, id="bf16 on the host"),
        pytest.param(Layout(world_size=2), {**BF16, **HALF_ON_HOST}, id="bf16 moments DP2, half on the host"),
        pytest.param(Layout(world_size=1), ON_HOST, id="float32 on the host"),
    ],
)
def test_a_training_takes_what_a_dry_run_says(
    assets: Path, tmp_path: Path, run_ranks: Any, gpu_ranks: Any, layout: Layout, changes: dict[str, Any]
) -> None:
    values = trained(assets, tmp_path, changes)
    for rank, found in enumerate(gpu_ranks(measured, layout.world_size, free_port(), values)):
        (dry,) = run_ranks(predicted, 1, values, layout, rank, found["rows"])
        # the batch and what is logged are the device's as well
        assert dry.held == pytest.approx(found["held"], abs=2**16)
        assert dry.peak == pytest.approx(found["peak"], rel=0.005)
        ((by_formula, host),) = run_ranks(planned, 1, values, layout, rank, found["rows"])
        assert by_formula == pytest.approx(found["peak"], rel=0.1)
        assert host == pytest.approx(found["host"], rel=0.02)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        pytest.param(Layout(world_size=1), BF16, id="bf16"),
        pytest.param(Layout(world_size=2, expert=2), {**BF16, "model__expert_model_parallel_size": 2}, id="bf16 EP2"),
    ],
)
def test_a_mixture_takes_what_the_formula_says(
    mixture: Path, tmp_path: Path, run_ranks: Any, gpu_ranks: Any, layout: Layout, changes: dict[str, Any]
) -> None:
    """Random routers load experts about equally, as the formula takes them to be."""
    values = trained(mixture, tmp_path, changes)
    for rank, found in enumerate(gpu_ranks(measured, layout.world_size, free_port(), values)):
        ((by_formula, _),) = run_ranks(planned, 1, values, layout, rank, found["rows"])
        assert by_formula == pytest.approx(found["peak"], rel=0.1)
