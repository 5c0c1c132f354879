"""One result for every layout: all kinds of parallelism, dense and with experts, with and without recomputation.

Every cell is five steps and a validation against one process. `make test` takes those in DEFAULT, `make test-slow` the
rest. tests/integration/test_layouts.py has the plain layouts over ten steps and all micro-batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nemo_kto.network.families import dimensions_of
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.runs.layout import check_division, requested_layout
from tests.distributed_harness import free_port
from tests.integration.assets import assert_alike, configuration, read_series, settings, train_on_rank

Series = dict[str, dict[int, float]]

TP2 = {"model__tensor_model_parallel_size": 2}
SP2 = {**TP2, "model__sequence_parallel": True}
PP2 = {"model__pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "model__virtual_pipeline_model_parallel_size": 2}
CP2 = {"model__context_parallel_size": 2}
EP2 = {"model__expert_model_parallel_size": 2}
WHOLE = {"model__expert_tensor_parallel_size": 1}  # experts that tensor parallelism does not divide
SHARED = {"model__expert_tensor_parallel_size": 2}  # experts divided among data-parallel ranks
OVERLAP = {"model__optim__overlap_grad_sync": True, "model__optim__overlap_param_sync": True}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp2_overlap": (2, OVERLAP),
    "tp2": (2, TP2),
    "tp2sp": (2, SP2),
    "tp2sp_dp2_overlap": (4, {**SP2, **OVERLAP}),
    "pp2": (2, PP2),
    "pp2uneven": (2, {**PP2, "model__num_layers_in_first_pipeline_stage": 1}),
    "pp2vpp2": (2, VPP2),
    # as many micro-batches as stages: a stage that only warms up meets one that exchanges both directions at once
    "pp2vpp2_dp2_overlap": (4, {**VPP2, **OVERLAP}),
    "tp2pp2": (4, {**TP2, **PP2}),
    "tp2sp_pp2vpp2": (4, {**SP2, **VPP2}),
    "cp2": (2, CP2),
    "cp2_dp2_overlap": (4, {**CP2, **OVERLAP}),
    "tp2sp_cp2": (4, {**SP2, **CP2}),
    "pp2_cp2": (4, {**PP2, **CP2}),
}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{
        name: layout for name, layout in LAYOUTS.items() if name not in ("tp2", "tp2pp2")
    },  # these need SP with experts
    "ep2": (2, EP2),
    "ep2_dp2_overlap": (4, {**EP2, **OVERLAP}),
    "ep2_pp2": (4, {**EP2, **PP2}),
    "ep2_pp2vpp2": (4, {**EP2, **VPP2}),
    "ep2_cp2": (2, {**EP2, **CP2}),
    "tp2sp_ep2": (4, {**SP2, **EP2}),
    "tp2sp_ep2_whole": (2, {**SP2, **EP2, **WHOLE}),
    "tp2sp_whole": (2, {**SP2, **WHOLE}),
    "dp2_shared": (2, SHARED),
}
MIXTURE_LAYOUTS = {
    name: EXPERT_LAYOUTS[name]
    for name in ("one", "dp2", "tp2sp", "pp2", "pp2vpp2", "cp2", "ep2", "ep2_cp2", "tp2sp_ep2", "tp2sp_ep2_whole")
}
"""Those that each of the other mixtures is tried under."""
BIASED_LAYOUTS = {
    name: EXPERT_LAYOUTS[name]
    for name in ("one", "dp2", "tp2sp_whole", "pp2", "pp2vpp2", "cp2", "ep2", "ep2_cp2", "tp2sp_ep2_whole")
}
"""Those of mixtures whose experts have biases, and are not divided."""
# stages that hold the embedding and the output layer exchange the gradients of what is one matrix
TIED_LAYOUTS = {name: LAYOUTS[name] for name in ("one", "tp2sp", "pp2", "pp2vpp2_dp2_overlap", "tp2pp2", "pp2_cp2")}
# rotary embeddings that depend on a document's length, which context parallelism cuts; fused tensors
FUSED_LAYOUTS = {name: LAYOUTS[name] for name in ("one", "tp2sp", "pp2", "tp2pp2", "cp2", "tp2sp_cp2")}
GAPS_LAYOUTS = {name: LAYOUTS[name] for name in ("one", "tp2", "pp2uneven", "pp2vpp2", "cp2")}
DENSE_LAYOUTS = {name: LAYOUTS[name] for name in ("one", "tp2", "tp2sp", "pp2", "pp2vpp2", "cp2", "tp2sp_cp2")}
"""Those that each of the other dense families is tried under."""
PLAIN_LAYOUTS = {name: LAYOUTS[name] for name in ("one", "tp2sp", "pp2", "cp2")}
"""Those that families without parts of their own are tried under."""
LORA = {
    "model__peft__peft_scheme": "lora",
    "model__peft__lora_tuning__adapter_dim": 4,
    "model__peft__lora_tuning__adapter_dropout": 0.25,
    "model__optim__lr": 1e-2,
}
ADAPTERS = {**LORA, "model__peft__lora_tuning__target_modules": ["all"]}
# one layer of four: stages without anything to train, and layers whose backward pass nobody needs
FEW_ADAPTERS = {
    **LORA,
    "model__peft__lora_tuning__target_modules": ["v_proj", "up_proj"],
    "model__peft__lora_tuning__layer_selection": [3],
}
SEVERAL_RANKS = {
    **ADAPTERS,
    "model__peft__lora_tuning__rank_pattern": {"layers.[02].*": 3, "o_proj": 6, "up_proj": 1},
    "model__peft__lora_tuning__alpha_pattern": {"3.mlp.down_proj": 9, "q_proj": 1.5},
}
COPIES = {**LORA, "model__peft__lora_tuning__modules_to_save": ["embed_tokens", "lm_head"]}
DORA = {**ADAPTERS, "model__peft__lora_tuning__dora": True}
DORA_OF_ATTENTION = {**DORA, "model__peft__lora_tuning__target_modules": ["attention"]}
EXPERTS_ADAPTERS = {**LORA, "model__peft__lora_tuning__target_modules": ["attention"]}
NF4 = {"model__peft__quantize_base": "nf4"}
TWICE = {**NF4, "model__peft__double_quantization": True}
INT8 = {"model__peft__quantize_base": "int8"}
QUANTISED_LAYOUTS = {name: LAYOUTS[name] for name in ("one", "dp2", "tp2", "tp2sp", "pp2", "pp2vpp2", "tp2pp2", "cp2")}
QUANTISED_EXPERT_LAYOUTS = {
    name: EXPERT_LAYOUTS[name] for name in ("one", "dp2", "tp2sp", "pp2", "ep2", "tp2sp_ep2", "tp2sp_ep2_whole")
}
MODELS: dict[str, tuple[str, dict[str, tuple[int, dict[str, Any]]], dict[str, Any]]] = {
    "dense": ("hf", LAYOUTS, {}),
    "tied": ("tied", TIED_LAYOUTS, {}),
    "experts": ("experts", EXPERT_LAYOUTS, {}),
    "fused": ("fused", FUSED_LAYOUTS, {}),
    "gaps": ("gaps", GAPS_LAYOUTS, {}),
    "biases": ("biases", DENSE_LAYOUTS, {}),
    "mistral": ("mistral", PLAIN_LAYOUTS, {}),
    "qwen2": ("qwen2", PLAIN_LAYOUTS, {}),
    "qwen3": ("qwen3", PLAIN_LAYOUTS, {}),
    "mixtral": ("mixtral", {**PLAIN_LAYOUTS, "ep2": EXPERT_LAYOUTS["ep2"]}, {}),
    "shared": ("shared", MIXTURE_LAYOUTS, {}),
    "granite": ("granite", DENSE_LAYOUTS, {}),
    "granitemoe": ("granitemoe", MIXTURE_LAYOUTS, {}),
    "starcoder2": ("starcoder2", DENSE_LAYOUTS, {}),
    "gemma2": ("gemma2", DENSE_LAYOUTS, {}),
    "gemma3": ("gemma3", DENSE_LAYOUTS, {}),
    "glm4": ("glm4", DENSE_LAYOUTS, {}),
    "glm4_moe": ("glm4_moe", MIXTURE_LAYOUTS, {}),
    "ministral3": ("ministral3", DENSE_LAYOUTS, {}),
    "ministral3, adapters": ("ministral3", DENSE_LAYOUTS, ADAPTERS),
    "olmo2": ("olmo2", DENSE_LAYOUTS, {}),
    "olmo3": ("olmo3", DENSE_LAYOUTS, {}),
    "exaone4": ("exaone4", DENSE_LAYOUTS, {}),
    "minimax_m2": ("minimax_m2", MIXTURE_LAYOUTS, {}),
    "deepseek_v3": ("deepseek_v3", MIXTURE_LAYOUTS, {}),
    "deepseek_v3, adapters": ("deepseek_v3", MIXTURE_LAYOUTS, EXPERTS_ADAPTERS),
    "glm4_moe_lite": ("glm4_moe_lite", MIXTURE_LAYOUTS, {}),
    "glm4_moe_lite, adapters": ("glm4_moe_lite", MIXTURE_LAYOUTS, EXPERTS_ADAPTERS),
    "gpt_oss": ("gpt_oss", BIASED_LAYOUTS, {}),
    "gpt_oss, adapters": ("gpt_oss", BIASED_LAYOUTS, EXPERTS_ADAPTERS),
    "qwen3_next": ("qwen3_next", MIXTURE_LAYOUTS, {}),
    "qwen3_next, adapters": ("qwen3_next", MIXTURE_LAYOUTS, EXPERTS_ADAPTERS),
    "qwen3_5_moe": ("qwen3_5_moe", MIXTURE_LAYOUTS, {}),
    "qwen3_5": ("qwen3_5", DENSE_LAYOUTS, {}),
    "qwen3_5, adapters": ("qwen3_5", DENSE_LAYOUTS, ADAPTERS),
    "olmo2, adapters": ("olmo2", DENSE_LAYOUTS, ADAPTERS),
    "olmo3, adapters": ("olmo3", DENSE_LAYOUTS, ADAPTERS),
    "exaone4, adapters": ("exaone4", DENSE_LAYOUTS, ADAPTERS),
    "minimax_m2, adapters": ("minimax_m2", MIXTURE_LAYOUTS, EXPERTS_ADAPTERS),
    "glm4, adapters": ("glm4", DENSE_LAYOUTS, ADAPTERS),
    "glm4_moe, adapters": ("glm4_moe", MIXTURE_LAYOUTS, EXPERTS_ADAPTERS),
    "gemma2, adapters": ("gemma2", DENSE_LAYOUTS, ADAPTERS),
    "gemma3, adapters": ("gemma3", DENSE_LAYOUTS, ADAPTERS),
    "granite, adapters": ("granite", DENSE_LAYOUTS, ADAPTERS),
    "granitemoe, adapters": ("granitemoe", MIXTURE_LAYOUTS, EXPERTS_ADAPTERS),
    "starcoder2, adapters": ("starcoder2", DENSE_LAYOUTS, ADAPTERS),
    "shared, adapters": ("shared", MIXTURE_LAYOUTS, ADAPTERS),
    "fused, adapters": ("fused", FUSED_LAYOUTS, ADAPTERS),
    "adapters": ("hf", LAYOUTS, ADAPTERS),
    "biases, adapters": ("biases", DENSE_LAYOUTS, ADAPTERS),
    "several ranks": ("hf", DENSE_LAYOUTS, SEVERAL_RANKS),
    "whole beside adapters": ("hf", LAYOUTS, COPIES),
    "dora": ("biases", LAYOUTS, DORA),
    "deepseek_v3, dora": ("deepseek_v3", MIXTURE_LAYOUTS, DORA_OF_ATTENTION),
    "few adapters": ("tied", TIED_LAYOUTS, FEW_ADAPTERS),
    "experts, adapters": ("experts", EXPERT_LAYOUTS, EXPERTS_ADAPTERS),
    "nf4": ("wide", QUANTISED_LAYOUTS, {**ADAPTERS, **NF4}),
    "nf4 twice": ("wide", QUANTISED_LAYOUTS, {**ADAPTERS, **TWICE}),
    "int8": ("wide", QUANTISED_LAYOUTS, {**ADAPTERS, **INT8}),
    "nf4, dora": ("wide", QUANTISED_LAYOUTS, {**DORA, **NF4}),
    "nf4, experts": ("wide_experts", QUANTISED_EXPERT_LAYOUTS, {**EXPERTS_ADAPTERS, **NF4}),
    "nf4 twice, experts": ("wide_experts", QUANTISED_EXPERT_LAYOUTS, {**EXPERTS_ADAPTERS, **TWICE}),
    "int8, experts": ("wide_experts", QUANTISED_EXPERT_LAYOUTS, {**EXPERTS_ADAPTERS, **INT8}),
}
"""Kind of model -> its folder, its layouts, and what its runs are set to."""

FULL = "model__activations_checkpoint_"
RECOMPUTE: dict[str, dict[str, Any]] = {
    "kept": {},
    "selective": {f"{FULL}granularity": "selective"},
    "uniform": {f"{FULL}granularity": "full", f"{FULL}method": "uniform", f"{FULL}num_layers": 1},
    "block": {f"{FULL}granularity": "full", f"{FULL}method": "block", f"{FULL}num_layers": 1},
}
DEFAULT = {
    *{("dense", name, "kept") for name in ("dp2_overlap", "tp2sp", "pp2uneven", "pp2vpp2", "cp2")},
    *{("dense", name, "kept") for name in ("tp2sp_dp2_overlap", "pp2vpp2_dp2_overlap")},
    *{("dense", "one", recompute) for recompute in ("selective", "uniform", "block")},
    *{("dense", name, "uniform") for name in ("pp2vpp2", "cp2")},
    *{("experts", name, "kept") for name in ("dp2", "pp2vpp2", "ep2", "ep2_cp2", "tp2sp_ep2_whole")},
    ("experts", "ep2", "uniform"),
    ("tied", "pp2", "kept"),
    *{("fused", name, "kept") for name in ("tp2sp_cp2", "pp2")},
    ("fused, adapters", "tp2sp", "kept"),
    ("gaps", "pp2vpp2", "kept"),
    ("biases", "tp2sp", "kept"),
    ("granite", "pp2", "kept"),
    ("gemma2", "tp2sp_cp2", "kept"),
    ("gemma3", "pp2vpp2", "kept"),
    ("starcoder2", "cp2", "kept"),
    ("glm4", "tp2", "kept"),
    ("ministral3", "cp2", "kept"),
    ("olmo2", "tp2", "kept"),
    ("olmo3", "tp2sp", "kept"),
    ("exaone4", "pp2vpp2", "kept"),
    ("minimax_m2", "ep2", "kept"),
    *{("deepseek_v3", name, "kept") for name in ("tp2sp", "cp2")},
    ("deepseek_v3, adapters", "tp2sp_ep2_whole", "kept"),
    ("glm4_moe_lite", "ep2", "kept"),
    *{("qwen3_next", name, "kept") for name in ("tp2sp_ep2_whole", "ep2_cp2")},
    *{("qwen3_5", name, "kept") for name in ("tp2", "pp2vpp2")},
    ("qwen3_5", "one", "selective"),
    *{("gpt_oss", name, "kept") for name in ("tp2sp_whole", "cp2")},
    ("glm4_moe", "tp2sp_ep2_whole", "kept"),
    *{("adapters", name, "kept") for name in ("tp2sp_dp2_overlap", "pp2vpp2", "cp2")},
    ("adapters", "tp2", "uniform"),
    *{("several ranks", name, "kept") for name in ("tp2", "tp2sp", "pp2vpp2")},
    *{("whole beside adapters", name, "kept") for name in ("tp2", "tp2sp_dp2_overlap", "pp2vpp2", "cp2")},
    ("whole beside adapters", "tp2sp", "uniform"),
    *{("dora", name, "kept") for name in ("tp2", "tp2sp_dp2_overlap", "pp2vpp2", "cp2")},
    ("dora", "tp2sp", "uniform"),
    ("deepseek_v3, dora", "tp2sp_ep2_whole", "kept"),
    ("few adapters", "pp2", "kept"),
    ("few adapters", "one", "uniform"),
    ("experts, adapters", "ep2_cp2", "kept"),
    *{("nf4", name, "kept") for name in ("dp2", "tp2", "pp2")},
    ("nf4", "tp2sp", "uniform"),
    ("nf4 twice", "tp2", "kept"),
    ("nf4, dora", "tp2sp", "kept"),
    ("int8", "tp2sp", "kept"),
    ("nf4, experts", "ep2", "kept"),
    ("nf4 twice, experts", "tp2sp_ep2_whole", "kept"),
}
"""The cells of the default test run: each kind of parallelism, and the combinations that have gone wrong."""


def cells() -> Iterator[Any]:
    """Yield (model, layout, recompute) of every cell, slow unless in DEFAULT."""
    for model, (_, layouts, _) in MODELS.items():
        for layout in layouts:
            for recompute in RECOMPUTE:
                cell = (model, layout, recompute)
                if layout == "one" and recompute == "kept":
                    continue
                # of the partial kinds of recomputation a few layouts tell enough
                if recompute in ("selective", "block") and layout not in ("one", "tp2sp_pp2vpp2", "tp2sp_ep2"):
                    continue
                yield pytest.param(*cell, marks=() if cell in DEFAULT else pytest.mark.slow)


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_is_one_of_the_model(root: Path, tmp_path: Path, model: str) -> None:
    """So that the cells which only `make test-slow` runs can be run."""
    folder, layouts, kind = MODELS[model]
    sizes = dimensions_of(load_hf_config(root / folder)).divided
    for world_size, changes in layouts.values():
        values = settings(root, tmp_path, model__micro_batch_size=2, trainer__devices=world_size, **kind, **changes)
        config = configuration(values)
        check_division(config, requested_layout(config, world_size), sizes)


@pytest.fixture(scope="module")
def series(train: Callable[..., Path], root: Path) -> Callable[..., Series]:
    """Return `series(model, layout, **changes)`: what was logged in five steps and a validation; run once each.

    Of whole models, the reference is exchanged in the one way with activations that are kept, in the other with
    recomputed ones.
    """
    done: dict[tuple[Any, ...], Series] = {}

    def get(model: str, layout: str, **changes: Any) -> Series:
        key = (model, layout, *changes.items())
        if key not in done:
            folder, layouts, kind = MODELS[model]
            world_size, sizes = layouts[layout]
            mode = "resident" if changes else "cpu_swap"
            done[key] = read_series(
                train(
                    world_size,
                    pretrained_checkpoint__restore_from_path=str(root / folder),
                    model__tokenizer__path=str(root / "hf"),  # beside Qwen2 transformers would make Qwen2's of it
                    model__micro_batch_size=2,
                    model__data__data_prefix__validation=str(root / "validation.jsonl"),
                    model__kto__reference__mode="auto" if kind else mode,
                    trainer__kto__max_steps=5,
                    trainer__kto__val_check_interval=5,
                    **kind,
                    **sizes,
                    **changes,
                )
            )
        return done[key]

    return get


@pytest.mark.parametrize(("model", "layout", "recompute"), [*cells()])
def test_the_layout_does_not_change_the_result(series: Any, model: str, layout: str, recompute: str) -> None:
    actual = series(model, layout, **RECOMPUTE[recompute])
    assert len(actual["train/loss"]) == 5 and len(actual["val/loss"]) == 1
    assert actual["train/loss"][0] == 0.5 and "train/moe_aux_loss" not in actual
    assert_alike(actual, series(model, "one"))


BALANCED = {"model__moe_aux_loss_coeff": 0.1}


@pytest.mark.parametrize(
    "layout",
    [
        "tp2sp",  # rows of odd lengths are filled up, and what fills them must not count
        "ep2_cp2",
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("dp2", "pp2vpp2", "ep2", "tp2sp_ep2", "cp2")),
    ],
)
def test_balancing_the_experts_loads_does_not_depend_on_the_layout(series: Any, layout: str) -> None:
    actual, expected = series("experts", layout, **BALANCED), series("experts", "one", **BALANCED)
    assert_alike(actual, expected)
    assert actual["train/moe_aux_loss"] == pytest.approx(expected["train/moe_aux_loss"], rel=1e-5)
    assert actual["train/loss"][0] == 0.5
    assert actual["train/loss"][4] != series("experts", "one")["train/loss"][4]


@pytest.mark.parametrize("recompute", ["selective", "uniform"])
def test_recomputed_routers_count_their_loss_once(series: Any, recompute: str) -> None:
    actual, expected = (
        series("experts", "one", **BALANCED, **RECOMPUTE[recompute]),
        series("experts", "one", **BALANCED),
    )
    for name in ("train/loss", "train/grad_norm", "train/moe_aux_loss"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-5), name


def train_in_small_buckets(port: int, overrides: dict[str, Any]) -> None:
    """Train with buckets of a few matrices, as large models have them; Megatron's least is 40 million numbers."""
    from nemo_kto.runtime import optimizer

    original = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = partial(original, bucket_size=2000)
    try:
        train_on_rank(port, overrides)
    finally:
        optimizer.DistributedDataParallelConfig = original


@pytest.mark.parametrize("model", ["dense", "experts", "adapters"])
def test_parameters_are_gathered_before_they_are_read(
    series: Any, root: Path, tmp_path: Path, run_ranks: Callable[..., Any], model: str
) -> None:
    """The output layer's weight is read without calling the layer, whose hooks would wait for it."""
    values = settings(
        root,
        tmp_path,
        pretrained_checkpoint__restore_from_path=str(root / MODELS[model][0]),
        model__micro_batch_size=2,
        trainer__kto__max_steps=5,
        **MODELS[model][2],
        **OVERLAP,
    )
    run_ranks(train_in_small_buckets, 2, free_port(), values)
    actual, expected = read_series(tmp_path), series(model, "one")
    for name in ("train/loss", "train/grad_norm"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-5), name
