"""Training on the simulated GPUs, with nothing of Megatron patched for CPUs, gives the series that CPUs give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed_harness import free_port
from tests.integration.assets import read_series, settings, train_on_rank, without_times

STEPS = 4

BF16 = {"trainer__precision": "bf16-mixed"}
TP2_SP = {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True}
EXPERTS = {
    "pretrained_checkpoint__restore_from_path": "experts",
    "model__moe_aux_loss_coeff": 0.01,
    "model__expert_model_parallel_size": 2,
}
LORA = {
    "model__peft__peft_scheme": "lora",
    "model__peft__lora_tuning__adapter_dim": 4,
    "model__peft__lora_tuning__target_modules": ["all"],
    "model__peft__lora_tuning__adapter_dropout": 0.1,
}
DORA = {
    **LORA,
    "model__peft__lora_tuning__dora": True,
    "model__peft__lora_tuning__modules_to_save": ["embed_tokens", "lm_head"],
}
QLORA = {**LORA, "pretrained_checkpoint__restore_from_path": "wide", "model__peft__quantize_base": "nf4"}
EIGHT_BITS = {**QLORA, "model__peft__quantize_base": "int8"}
RECOMPUTE = {
    "model__activations_checkpoint_granularity": "full",
    "model__activations_checkpoint_method": "uniform",
    "model__activations_checkpoint_num_layers": 1,
}
SAVING = {
    "exp_manager__create_checkpoint_callback": True,
    "trainer__kto__save_interval": 2,
    "model__optim__sched__name": "Constant",
}
ASYNC = {**SAVING, "exp_manager__checkpoint_callback_params__async_save": True}
MOVING = {"model__kto__reference__mode": "cpu_swap", "model__kto__reference__sync_every_n_steps": 2}
CACHED = {**SAVING, "model__kto__reference__mode": "cached"}


@pytest.fixture
def runs(root: Path, tmp_path: Path, run_ranks: Any, gpu_ranks: Any) -> Callable[..., dict[str, dict[int, float]]]:
    """Return `runs(accelerator, ranks, **changes)`: trains there, in a folder of its own, and returns the series."""

    def run(accelerator: str, ranks: int, *, steps: int = STEPS, **changes: Any) -> dict[str, dict[int, float]]:
        values = settings(
            root,
            tmp_path / accelerator,
            trainer__accelerator=accelerator,
            trainer__kto__max_steps=steps,
            trainer__kto__val_check_interval=STEPS,
            model__data__data_prefix__validation=str(root / "validation.jsonl"),
            model__micro_batch_size=2,
            **changes,
        )
        model = root / values["pretrained_checkpoint.restore_from_path"]
        values["pretrained_checkpoint.restore_from_path"] = str(model)
        (gpu_ranks if accelerator == "gpu" else run_ranks)(train_on_rank, ranks, free_port(), values)
        return read_series(tmp_path / accelerator)

    return run


def assert_same(
    actual: dict[str, dict[int, float]], expected: dict[str, dict[int, float]], *, error: float = 1e-5
) -> None:
    """Compare all that was logged; small values are differences of log-probs, whose error they have."""
    assert actual.keys() == expected.keys()
    for name in without_times(expected):
        if error > 1e-3 and name.endswith("/accuracies"):
            continue  # of a few samples, of which some have a reward of hardly more than nothing
        assert actual[name] == pytest.approx(expected[name], rel=error, abs=2 * error), name


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(1, BF16, id="bf16"),
        pytest.param(2, {**BF16, **TP2_SP}, id="TP2 SP bf16"),
        pytest.param(
            2,
            {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2},
            id="PP2 VPP2",
        ),
        pytest.param(
            4,
            {**EXPERTS, **TP2_SP, "model__expert_tensor_parallel_size": 2},
            id="EP2 ETP2",
            marks=pytest.mark.slow,
        ),
        pytest.param(1, {**LORA, **RECOMPUTE}, id="LoRA recompute"),
        pytest.param(2, {**DORA, **TP2_SP}, id="DoRA TP2 SP"),
        pytest.param(1, {**QLORA, "model__peft__double_quantization": True}, id="nf4 twice"),
        pytest.param(1, EIGHT_BITS, id="int8"),
        pytest.param(1, MOVING, id="cpu_swap sync"),
    ],
)
def test_gpus_train_as_cpus_do(runs: Any, ranks: int, changes: dict[str, Any]) -> None:
    # in bfloat16 the norms round in other places: on CUDA they are torch's own
    error = 3e-2 if "trainer__precision" in changes else 1e-5
    assert_same(runs("gpu", ranks, **changes), runs("cpu", ranks, **changes), error=error)


@pytest.mark.parametrize("saving", [pytest.param(CACHED, id="cached"), pytest.param(ASYNC, id="async save")])
def test_a_resumed_run_is_the_whole_one(runs: Any, saving: dict[str, Any]) -> None:
    """With torch's Adam, as where neither Apex nor Transformer Engine is."""
    runs("gpu", 2, steps=2, **saving)
    resumed = runs("gpu", 2, **saving)
    whole = runs("cpu", 2, **saving)
    for name, values in resumed.items():  # the first of the two validated at its end as well
        resumed[name] = {step: value for step, value in values.items() if step in whole.get(name, values)}
    assert_same(resumed, whole)


@pytest.mark.parametrize("original", [False, True])
def test_a_base_in_fewer_bits_is_merged_as_on_cpus(
    root: Path, tmp_path: Path, run_ranks: Any, gpu_ranks: Any, original: bool
) -> None:
    """On two stages: the later one sends weights that are in the host's memory. DoRA's lengths are made anew."""
    folders = []
    for accelerator, ranks in (("gpu", gpu_ranks), ("cpu", run_ranks)):
        changes = {
            **QLORA,
            "model__peft__lora_tuning__dora": True,
            "pretrained_checkpoint__restore_from_path": str(root / "wide"),
            "model__pipeline_model_parallel_size": 2,
            "export__enabled": True,
            "export__merge_adapters": True,
            "export__merge_into_original": original,
        }
        folder = tmp_path / accelerator
        steps = {"trainer__accelerator": accelerator, "trainer__kto__max_steps": 1, "model__micro_batch_size": 2}
        ranks(train_on_rank, 2, free_port(), settings(root, folder, **steps, **changes))
        folders.append(load_file(folder / "hf" / "model.safetensors"))
    ours, theirs = folders
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
