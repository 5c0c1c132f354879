"""Adapters: PEFT computes the same from the same files, in both directions and under every division of the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PretrainedConfig

from nemo_kto.algorithms import row_norms
from nemo_kto.algorithms.dropout import keep_mask, token_keys
from nemo_kto.config.compose import load_config
from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.gpt import KTOGPTModel, build_gpt
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.lora import (
    Adapted,
    adapters_merged,
    adapters_off,
    add_adapters,
    clear_adapters,
    initialize_adapters,
)
from nemo_kto.network.projections import LoRASettings, adapted_modules, fits_pattern, projections_of
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.adapter_config import adapter_config, read_adapter_settings
from nemo_kto.weights.export_hf import export_hf
from nemo_kto.weights.import_hf import import_hf
from nemo_kto.weights.peft_adapter import check_adapter, check_projections, export_adapter, import_adapter
from tests.network import tiny_hf

LAYOUTS: dict[str, Layout] = {
    "TP1": Layout(world_size=1),
    "TP2": Layout(world_size=2, tensor=2),
    "TP2SP": Layout(world_size=2, tensor=2, sequence=True),
    "PP2": Layout(world_size=2, pipeline=2),
    "WHOLE": Layout(world_size=2, tensor=2, sequence=True, expert_tensor=1),
}
LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("llama", {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}),
    # biases, tied embeddings; k has no adapters, the last layer alone has none
    "some": (
        "qwen2_tied",
        {
            "r": 4,
            "lora_alpha": 2,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "layers_to_transform": [0, 1, 2],
        },
    ),
    # heads whose channels do not make up the hidden size, norms of queries and keys
    "attention": ("qwen3", {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    # one projection for queries, keys and values, one for gate and up
    "fused": ("phi3_partial", {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}),
    "around norms": ("gemma3_text", {"r": 3, "lora_alpha": 4, "target_modules": "all-linear"}),
    # a feed-forward part that is not gated
    "plain": ("starcoder2_window", {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}),
    "biases": ("llama_biases", {"r": 2, "lora_alpha": 5, "target_modules": "all-linear"}),
    # layers of experts, where the feed-forward projections are the shared expert's, and a dense one
    "shared": (
        "qwen2_moe_mixed",
        {"r": 3, "lora_alpha": 3, "target_modules": ["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "halves": ("glm4", {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}),
    "sigmoids": ("glm4_moe", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "o_proj"]}),
    **{
        f"of {name}": (name, {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"})
        for name in (
            "mistral_window",
            "smollm3_pattern",
            "granite",
            "gemma2_uncapped",
            "olmo2_bias",
            "olmo3",
            "exaone4",
            "ministral3",
        )
    },
    "qwen3 experts": ("qwen3_moe_mixed", {"r": 2, "lora_alpha": 3, "target_modules": ["k_proj", "v_proj"]}),
    "granite experts": ("granitemoe_bias", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"]}),
    "minimax": ("minimax_m2", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "k_proj"]}),
    "latent": (
        "deepseek_v3",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        },
    ),
    "latent keys": ("deepseek_v3_plain", {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "kv_b_proj"]}),
    "dense latent": (
        "deepseek_v3_dense",
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_a_proj", "kv_a_proj_with_mqa"]},
    ),
    "of glm4_moe_lite": ("glm4_moe_lite", {"r": 2, "lora_alpha": 3, "target_modules": ["q_b_proj", "o_proj"]}),
    "experts and gates": (
        "qwen3_5_moe_text",
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "k_proj", "up_proj"]},
    ),
    # layers with and without linear attention, a query's gate, layers of experts and a dense one
    "gates": (
        "qwen3_next_mixed",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
    ),
    "linear attention": (
        "qwen3_5_text",
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "gate_proj", "down_proj"]},
    ),
    "sinks": ("gpt_oss", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "o_proj"]}),
    "experts": ("mixtral", {"r": 2, "lora_alpha": 4, "target_modules": ["k_proj", "o_proj"]}),
    # the names of modules by their ends, in full and as regular expressions; the first one that fits
    "patterns": (
        "llama",
        {
            "r": 3,
            "lora_alpha": 7,
            "target_modules": "all-linear",
            "rank_pattern": {
                r"layers\.[12]\..*_proj": 2,
                "model.layers.0.self_attn.k_proj": 6,
                "q_proj": 5,
                "mlp.down_proj": 1,
            },
            "alpha_pattern": {"3.self_attn.v_proj": 9.5, "o_proj": 2, "^model.layers.[01].mlp.up_proj": 4},
        },
    ),
    "patterns of fused": (
        "phi3_partial",
        {
            "r": 3,
            "lora_alpha": 7,
            "use_rslora": True,
            "target_modules": "all-linear",
            "rank_pattern": {"gate_up_proj": 4, "layers.1.self_attn.qkv_proj": 2},
            "alpha_pattern": {"down_proj": 2},
        },
    ),
    **{
        f"dora of {name}": (name, {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": targets, **fields})
        for name, targets, fields in (
            ("llama", "all-linear", {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 1}}),
            ("llama_biases", "all-linear", {}),
            ("phi3_partial", "all-linear", {"use_rslora": True}),
            ("qwen2_tied", ["q_proj", "v_proj", "up_proj"], {"layers_to_transform": [0, 1, 2]}),
            ("qwen3_next_mixed", ["q_proj", "v_proj", "o_proj"], {}),
            ("qwen2_moe_mixed", ["k_proj", "o_proj", "gate_proj", "down_proj"], {}),
            ("deepseek_v3", ["q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], {}),
        )
    },
    # embedding and output layer, trained whole
    "both whole": ("llama", {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "output whole": (
        "llama_biases",
        {"r": 2, "target_modules": ["o_proj"], "use_dora": True, "modules_to_save": ["lm_head"]},
    ),
    "embedding whole": (
        "qwen3_moe_mixed",
        {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["model.embed_tokens"]},
    ),
    "patterns of shared": (
        "qwen2_moe_mixed",
        {
            "r": 3,
            "lora_alpha": 3,
            "target_modules": ["v_proj", "up_proj", "down_proj"],
            "rank_pattern": {"shared_expert.up_proj": 5},
            "alpha_pattern": {"mlp.up_proj": 9},
        },
    ),
}
"""Adapter -> the family of its model, and PEFT's settings."""
SPARSE = ("experts", "shared", "sigmoids", "qwen3 experts", "granite experts", "minimax", "latent", "latent keys")
SPARSE += ("of glm4_moe_lite", "gates", "experts and gates", "patterns of shared")
SPARSE += ("dora of qwen3_next_mixed", "dora of qwen2_moe_mixed", "dora of deepseek_v3", "embedding whole")
BIASED = ("sinks",)
"""Adapters of mixtures whose experts are not divided."""
_FAMILIES = tiny_hf.families()
READ_BY_PEFT = [name for name, (base, _) in PEFT.items() if tiny_hf.adapters_are_read(_FAMILIES[base].model_type)]


def case(*values: str) -> Any:
    """Return the parameters of a test, the last of which is an adapter."""
    reason = "PEFT 0.19 cannot read adapters where transformers 5.8 puts experts together"
    return pytest.param(*values, marks=pytest.mark.skipif(values[-1] not in READ_BY_PEFT, reason=reason))


def suits(layout: str, name: str) -> bool:
    """Return whether a model can be divided so; Megatron's experts need sequence parallelism beside tensor's."""
    if name in BIASED:
        return not layout.startswith("TP2")
    return layout != "WHOLE" and (layout != "TP2" or name not in SPARSE)


NAMES = list(map(case, PEFT))
CASES = [case(layout, name) for layout in LAYOUTS for name in PEFT if suits(layout, name)]


def make_adapter(folder: Path, base: Path, settings: dict[str, Any]) -> torch.Tensor:
    """Save an adapter made by PEFT, with random A and B, and return PEFT's logits `[T, vocab]` of the documents."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **settings)).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapted.save_pretrained(folder)
    return peft_logits(base, folder)


@torch.no_grad()
def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    return torch.cat([adapted(document[None]).logits[0] for document in tiny_hf.documents()])


# what the ranks do


def use_adapters(source: Path, results: Path, layouts: list[str]) -> None:
    """Import every adapter, save its logits, and export it again, alone and merged."""
    enable_cpu()
    for layout in layouts:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        parallel.initialize(LAYOUTS[layout], seed=1)
        for name in READ_BY_PEFT:
            if suits(layout, name):
                use_adapter(source, results / layout / name, name, LAYOUTS[layout])


def use_adapter(source: Path, target: Path, name: str, layout: Layout) -> None:
    base = source / PEFT[name][0]
    hf_config = load_hf_config(base)
    settings = read_adapter_settings(source / name)
    check_adapter(source / name, settings, hf_config)
    model = build_gpt(hf_config, layout)
    import_hf(model, base)
    model.requires_grad_(False)  # torch multiplies by a matrix that needs a gradient with another kernel
    plain = tiny_hf.packed_logits(model)
    frozen = {key: parameter.clone() for key, parameter in model.named_parameters()}
    add_adapters(model, settings)

    initialize_adapters(model, seed=5)
    parallel.run_on_rank_zero(lambda: target.mkdir(parents=True), "")
    untrained = tiny_hf.packed_logits(model)
    describe(target / "source", settings, base, hf_config)
    export_adapter([model], target / "source", target / "initial")

    import_adapter(model, source / name)
    adapted = tiny_hf.packed_logits(model)
    export_adapter([model], target / "source", target / "exported")
    with adapters_off([model]):
        off = tiny_hf.packed_logits(model)
    with adapters_merged([model]):
        merged = tiny_hf.packed_logits(model)
        export_hf([model], hf_config, target / "merged", source_folder=base)
    again = tiny_hf.packed_logits(model)
    clear_adapters(model)
    cleared = tiny_hf.packed_logits(model)
    if adapted is not None and parallel.position().tp_rank == 0:
        logits = {"plain": plain, "untrained": untrained, "adapted": adapted, "off": off, "merged": merged}
        torch.save({**logits, "again": again, "cleared": cleared}, target / "logits.pt")
    kept = {key: parameter for key, parameter in model.named_parameters() if key in frozen}
    assert kept.keys() == frozen.keys()
    assert all(torch.equal(frozen[key], kept[key]) and not kept[key].requires_grad for key in frozen)
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".adapters." in key for key in trained)


def describe(folder: Path, settings: LoRASettings, base: Path, hf_config: PretrainedConfig) -> None:
    """Write the `adapter_config.json` that exports copy."""
    if dist.get_rank() == 0:
        folder.mkdir()
        config = adapter_config(settings, base_folder=base, hf_config=hf_config)
        (folder / "adapter_config.json").write_text(json.dumps(config))
    dist.barrier()


# the tests


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models and the adapters that PEFT made for them, logits beside them."""
    folder = tmp_path_factory.mktemp("source")
    families = tiny_hf.families()
    for name in READ_BY_PEFT:
        family, settings = PEFT[name]
        base = tiny_hf.make_folder(folder / family, families[family])
        torch.save(make_adapter(folder / name, base, settings), folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def results(source: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]) -> Path:
    """Return a folder with what every layout made of every adapter."""
    folder = tmp_path_factory.mktemp("results")
    run_ranks(use_adapters, 1, source, folder, ["TP1"])
    run_ranks(use_adapters, 2, source, folder, ["TP2", "TP2SP", "PP2", "WHOLE"])
    return folder


def expected_logits(source: Path, name: str) -> torch.Tensor:
    """Return PEFT's logits with an adapter."""
    tiny_hf.skip_where_wrong(source / PEFT[name][0])
    logits: torch.Tensor = torch.load(source / f"{name}.pt")
    return logits


every_case = pytest.mark.parametrize(("layout", "name"), CASES)


@every_case
def test_logits_of_an_imported_adapter_are_pefts(source: Path, results: Path, layout: str, name: str) -> None:
    logits, expected = torch.load(results / layout / name / "logits.pt"), expected_logits(source, name)
    torch.testing.assert_close(logits["adapted"], expected, rtol=1e-4, atol=2e-5)
    assert (logits["plain"] - expected).abs().max() > 0.1


@every_case
def test_an_adapter_comes_back_bit_by_bit(source: Path, results: Path, layout: str, name: str) -> None:
    ours = load_file(results / layout / name / "exported" / "adapter_model.safetensors")
    theirs = load_file(source / name / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_an_exported_adapter_with_the_same_logits(source: Path, results: Path, name: str) -> None:
    expected = expected_logits(source, name)
    ours = peft_logits(source / PEFT[name][0], results / ("WHOLE" if name in BIASED else "TP2SP") / name / "exported")
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@every_case
def test_without_trained_or_with_switched_off_adapters_it_is_the_base_model(
    results: Path, layout: str, name: str
) -> None:
    logits = torch.load(results / layout / name / "logits.pt")
    for kind in ("untrained", "off", "cleared"):
        assert torch.equal(logits[kind], logits["plain"]), kind


@every_case
def test_merging_keeps_the_logits_and_is_undone_exactly(source: Path, results: Path, layout: str, name: str) -> None:
    folder = results / layout / name
    logits, expected = torch.load(folder / "logits.pt"), expected_logits(source, name)
    torch.testing.assert_close(logits["merged"], expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(tiny_hf.transformers_logits(folder / "merged"), expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(logits["again"], logits["adapted"])


@every_case
def test_initial_values_do_not_depend_on_the_layout(results: Path, layout: str, name: str) -> None:
    ours, whole = (
        load_file(results / each / name / "initial" / "adapter_model.safetensors") for each in (layout, "TP1")
    )
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


def test_initial_values_are_distributed_as_pefts(results: Path) -> None:
    """A uniform between -1/sqrt(i) and 1/sqrt(i), no two alike; B zero."""
    tensors = load_file(results / "TP1" / "all" / "initial" / "adapter_model.safetensors")
    inner = {key: tensor for key, tensor in tensors.items() if "lora_A" in key}
    assert not any(tensor.any() for key, tensor in tensors.items() if key not in inner)
    for tensor in inner.values():
        scaled = tensor * tensor.shape[1] ** 0.5
        assert 0.9 < scaled.abs().max() <= 1 and abs(scaled.mean()) < 0.25
    values = torch.cat([tensor.flatten() * tensor.shape[1] ** 0.5 for tensor in inner.values()])
    assert values.std().item() == pytest.approx(3**-0.5, rel=0.05) and values.unique().numel() > 0.99 * values.numel()


@pytest.mark.parametrize("name", [name for name in PEFT if name.startswith("dora") and name in READ_BY_PEFT])
def test_initial_magnitudes_are_pefts(source: Path, results: Path, name: str) -> None:
    """The lengths of the rows of the weights, in the order that PEFT has them in."""
    base, settings = PEFT[name]
    model = AutoModelForCausalLM.from_pretrained(source / base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    expected = {key.replace(".default.weight", ""): value for key, value in adapted.state_dict().items()}
    ours = load_file(results / "TP1" / name / "initial" / "adapter_model.safetensors")
    magnitudes = [key for key in ours if key.endswith("lora_magnitude_vector")]
    assert magnitudes
    for key in magnitudes:
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-6, atol=0)


# settings


@pytest.mark.parametrize(
    ("names", "projections"),
    [
        (["attention_qkv", "mlp_fc2"], "down_proj qkv_proj"),
        (["all"], "o_proj down_proj qkv_proj gate_up_proj"),
        (["gate_up_proj", "o_proj"], "o_proj gate_up_proj"),
    ],
)
def test_names_of_target_modules_of_fused_projections(names: list[str], projections: str) -> None:
    assert projections_of(names, Phi3Config()) == tuple(projections.split())
    with pytest.raises(ConfigError, match="q_proj is unknown. Use .*qkv_proj"):
        projections_of(["q_proj"], Phi3Config())


@pytest.mark.parametrize(
    ("names", "projections"),
    [
        (["attention_qkv"], "q_proj k_proj v_proj"),
        (["attention_dense"], "o_proj"),
        (["mlp_fc1"], "gate_proj up_proj"),
        (["mlp_fc2"], "down_proj"),
        (["attention"], "q_proj k_proj v_proj o_proj"),
        (["mlp"], "gate_proj up_proj down_proj"),
        (["all"], "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        (["v_proj", "mlp_fc2", "q_proj", "v_proj"], "q_proj v_proj down_proj"),
    ],
)
def test_names_of_target_modules(names: list[str], projections: str) -> None:
    assert projections_of(names, LlamaConfig()) == tuple(projections.split())


@pytest.mark.parametrize(("names", "word"), [(["attention_kv"], "attention_kv is unknown"), ([], "empty")])
def test_target_modules_that_do_not_exist(names: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        projections_of(names, LlamaConfig())


def test_scales_by_hand() -> None:
    common: dict[str, Any] = {"projections": ("q_proj",), "layers": (0,), "rank": 16, "alpha": 8}
    module = "model.layers.0.self_attn.q_proj"
    assert LoRASettings(**common).scale_of(module) == 0.5
    assert LoRASettings(**common, rslora=True).scale_of(module) == 2
    patterns: dict[str, Any] = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 2, module: 3}}
    assert LoRASettings(**common, **patterns).scale_of(module) == 2 / 4
    assert LoRASettings(**common, **patterns, rslora=True).scale_of(module) == 2 / 2
    assert LoRASettings(**common, **patterns).scale_of("model.layers.0.self_attn.k_proj") == 0.5


MODULES = [
    f"model.layers.{layer}.{name}" for layer in (1, 11, 21) for name in ("self_attn.q_proj", "mlp.up_proj", "q_proj")
]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "_proj",
        ".*_proj",
        "1.self_attn.q_proj",
        "layers.1.*",
        "^model.layers.1.*",
        r"model\.layers\.\d\.mlp\.up_proj",
        "model.layers.11.self_attn.q_proj",
        "(self_attn|mlp).(q|up)_proj",
        "q_proj|up_proj",
        "layers",
        "",
    ],
)
def test_patterns_fit_as_in_peft(pattern: str) -> None:
    for module in MODULES:
        assert fits_pattern(pattern, module) == (get_pattern_key([pattern], module) == pattern), module


MIXTURES = [name for name, config in tiny_hf.families().items() if dimensions_of(config).mixture is not None]


@pytest.mark.parametrize("name", MIXTURES)
def test_which_mixtures_have_adapters_in_feed_forward_parts_is_pefts_matter(name: str) -> None:
    """PEFT takes the names of the projections for the experts', whether or not a layer has any."""
    config = tiny_hf.families()[name]
    settings: dict[str, Any] = {"layers": (0, 1, 2, 3), "rank": 2, "alpha": 2}
    names = ["gate_proj", "up_proj", "down_proj"]
    check_projections(LoRASettings(**settings, projections=("q_proj", "o_proj")), config)
    try:
        peft = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, target_modules=names))
        places = {key.split(".lora_A.")[0].rpartition(".")[2] for key in peft.state_dict() if ".lora_A." in key}
    except ValueError:  # there are no such modules
        places = set()
    if places == set(names):
        check_projections(LoRASettings(**settings, projections=tuple(names)), config)
    else:
        with pytest.raises(
            ConfigError, match=f"gate_proj, up_proj, down_proj cannot have adapters.*'{config.model_type}'"
        ):
            check_projections(LoRASettings(**settings, projections=tuple(names)), config)


def changed(source: Path, folder: Path, *, of: str = "all", **fields: Any) -> Path:
    """Return a copy of the adapter `of` with other fields in its configuration."""
    shutil.copytree(source / of, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"peft_type": "IA3"}, "is IA3, not LORA"),
        ({"use_dora": True, "use_bdlora": {"x": 1}}, "uses use_bdlora"),
        ({"bias": "all", "lora_bias": True}, "uses lora_bias, bias"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern has 0 for 'q_proj', which is no whole number above 0"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern has '8' for 'q_proj', which is no number"),
        ({"alpha_pattern": {"(q_proj": 8}}, r"alpha_pattern has the key '\(q_proj', which is no regular expression"),
        ({"rank_pattern": [8]}, r"rank_pattern is \[8\], no mapping"),
        ({"modules_to_save": ["score", "lm_head"]}, "has score in modules_to_save.*embed_tokens and lm_head"),
        ({"init_lora_weights": "pissa"}, "uses init_lora_weights"),
        ({"r": "many"}, "adapter_config.json: r='many' is not possible"),
    ],
)
def test_adapters_of_other_kinds_are_refused(source: Path, tmp_path: Path, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        read_adapter_settings(changed(source, tmp_path / "adapter", **fields))


def test_an_adapter_of_another_shape_says_what_to_set(source: Path) -> None:
    settings = LoRASettings(projections=("q_proj", "k_proj", "v_proj"), layers=(0, 1), rank=8, alpha=7)
    with pytest.raises(ConfigError) as error:
        check_adapter(source / "some", settings, tiny_hf.families()["qwen2_tied"])
    prefix = "model.peft.lora_tuning."
    assert str(error.value).endswith(
        f"Set {prefix}target_modules=[q_proj, v_proj, up_proj] {prefix}adapter_dim=4 {prefix}alpha=2.0 "
        f"{prefix}rslora=true {prefix}layer_selection=[1, 2, 3]."
    )
    with pytest.raises(ConfigError, match=r"of another kind. Set model.peft.lora_tuning.dora=true\."):
        found = read_adapter_settings(source / "dora of llama")
        check_adapter(source / "dora of llama", replace(found, dora=False), tiny_hf.families()["llama"])


def test_magnitudes_without_dora_and_dora_without_magnitudes(source: Path, tmp_path: Path) -> None:
    folder = changed(source, tmp_path / "adapter", of="dora of llama", use_dora=False)
    with pytest.raises(CheckpointError, match=r"has magnitudes \(.*lora_magnitude_vector.*no use_dora"):
        read_adapter_settings(folder)
    folder = changed(source, tmp_path / "other", use_dora=True)
    with pytest.raises(CheckpointError, match=r"q_proj.lora_magnitude_vector is missing, though others"):
        check_adapter(folder, read_adapter_settings(folder), tiny_hf.families()["llama"])


def test_patterns_may_be_written_in_another_way_that_means_the_same(source: Path) -> None:
    """Each module's rank and alpha, by name; and what is said where one of them is another."""
    hf_config, folder = tiny_hf.families()["llama"], source / "patterns"
    found = read_adapter_settings(folder)
    modules = adapted_modules(found, hf_config).values()
    same = replace(
        found,
        rank=9,
        rank_pattern={module: found.rank_of(module) for module in modules},
        alpha_pattern={module: found.alpha_of(module) for module in modules},
    )
    check_adapter(folder, same, hf_config)
    ranks = {**same.rank_pattern, "model.layers.3.mlp.up_proj": 4}
    with pytest.raises(ConfigError) as error:
        check_adapter(folder, replace(same, rank_pattern=ranks), hf_config)
    prefix = "model.peft.lora_tuning."
    assert str(error.value).endswith(
        f"Set {prefix}adapter_dim=3 {prefix}rank_pattern={{layers\\\\.\\[12\\]\\\\..*_proj: 2, mlp.down_proj: 1, "
        "model.layers.0.self_attn.k_proj: 6, q_proj: 5}."
    )
    keys = load_config(str(error.value)[:-1].partition("Set ")[2].split(" ", 1)).model.peft.lora_tuning
    assert (keys.adapter_dim, keys.rank_pattern) == (3, found.rank_pattern)  # what is said can be set
    with pytest.raises(ConfigError, match=r"of another kind. Set \S+alpha=7.0 \S+alpha_pattern={3.self_attn"):
        check_adapter(folder, replace(found, alpha_pattern={}, alpha=8), hf_config)


def test_tensors_that_do_not_fit_the_model_are_named(source: Path, tmp_path: Path) -> None:
    hf_config = tiny_hf.families()["llama"]
    settings = read_adapter_settings(source / "all")
    folder = changed(source, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.2.self_attn.k_proj.lora_B.weight"
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"layers.2.self_attn.k_proj.lora_B.weight has the shape \[15, 3\]"):
        check_adapter(folder, settings, hf_config)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=r"k_proj.lora_B.weight is missing"):
        check_adapter(folder, settings, hf_config)
    save_file({key: tensor for key, tensor in tensors.items() if ".layers.2.self_attn.k_proj." not in key}, file)
    with pytest.raises(CheckpointError, match=r"nothing for k_proj of layer 3\. .*Merge it") as partial:
        check_adapter(folder, settings, hf_config)
    assert "another model" not in str(partial.value)
    beyond = name.replace("layers.2", "layers.7")
    save_file({**tensors, beyond: tensors[name].clone()}, file)
    with pytest.raises(CheckpointError, match=r"layer 8, and the model only has 4 layers.*another model"):
        check_adapter(folder, settings, hf_config)
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"no projection known here: base_model.model.lm_head.lora_A.weight"):
        read_adapter_settings(folder)
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors cannot be read"):
        read_adapter_settings(folder)


def test_adapters_of_a_model_of_eight_billion_take_megabytes(run_ranks: Callable[..., Any]) -> None:
    """Llama 3 8B, every projection, rank 16: 16 * (i + o) numbers each, 41,943,040 together, as PEFT counts them."""
    ((numbers, names),) = run_ranks(count_trained, 1)
    assert numbers == 41_943_040 and names == 2 * 7 * 32


def count_trained() -> tuple[int, int]:
    """Return the numbers and tensors a checkpoint of a large model's adapters holds, without making the model."""
    from transformers import LlamaConfig

    from nemo_kto.runtime.checkpoint import sharded_trained, sharding_metadata

    enable_cpu()
    parallel.initialize(Layout(world_size=1), seed=1)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    hf_config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8)
    with torch.device("meta"):
        model: KTOGPTModel = build_gpt(hf_config, Layout(world_size=1))
    add_adapters(
        model, LoRASettings(projections=projections_of(["all"], hf_config), layers=tuple(range(32)), rank=16, alpha=16)
    )
    state = sharded_trained(model, sharding_metadata())
    return sum(tensor.data.numel() for tensor in state.values()), len(state)


def test_modules_that_are_whole_in_one_place_only(source: Path, tmp_path: Path) -> None:
    """In the configuration and not among the tensors, and the other way round; and in the adapter, but not wanted."""
    hf_config = tiny_hf.families()["llama"]
    folder = changed(source, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"base_model.model.lm_head.weight is missing, as modules_to_save says"):
        check_adapter(folder, read_adapter_settings(folder), hf_config)
    folder = changed(source, tmp_path / "other", of="both whole", modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"no projection known here: base_model.model.model.embed_tokens.weight"):
        read_adapter_settings(folder)
    found = read_adapter_settings(source / "both whole")
    with pytest.raises(ConfigError, match=r"Set model.peft.lora_tuning.modules_to_save=\[embed_tokens, lm_head\]\."):
        check_adapter(source / "both whole", replace(found, whole=("lm_head",)), hf_config)


def test_a_row_of_zeros_keeps_its_output(run_ranks: Callable[..., Any]) -> None:
    """It has no direction, and dividing by its length would make a NaN of it."""
    run_ranks(compare_rows_of_zeros, 1)


def compare_rows_of_zeros() -> None:
    enable_cpu()
    parallel.initialize(Layout(world_size=1), seed=1)
    model = build_gpt(tiny_hf.families()["llama"], Layout(world_size=1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    add_adapters(model, LoRASettings(projections=("o_proj",), layers=(0,), rank=2, alpha=2, dora=True))
    layer = model.decoder.layers[0].self_attention.linear_proj
    with torch.no_grad():
        layer.weight[3] = 0
    initialize_adapters(model, seed=1)
    inputs = torch.randn(5, 1, layer.weight.shape[1])
    output, _ = layer(inputs)
    assert torch.equal(output, torch.nn.functional.linear(inputs, layer.weight))
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.adapters.parameters())


@pytest.mark.parametrize("rows_at_once", [1 << 23, 100, 24, 7])
def test_lengths_of_rows_do_not_depend_on_how_many_are_there_at_once(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(row_norms, "_NUMBERS", rows_at_once)
    weight, lora_a, lora_b = torch.randn(3, 5, 8), torch.randn(2, 8), torch.randn(3, 5, 2)
    squares = row_norms.row_squares(weight, lora_a, lora_b, scale=0.7)
    expected = torch.linalg.norm((weight + 0.7 * lora_b @ lora_a).double(), dim=-1).flatten()
    torch.testing.assert_close(squares.sqrt(), expected, rtol=1e-6, atol=0)
    whole = row_norms.row_squares(weight.bfloat16(), lora_a, 0 * lora_b, scale=0.7)
    assert torch.equal(whole, weight.bfloat16().float().square().sum(-1, dtype=torch.float64).flatten())


def test_dropout_by_hand(run_ranks: Callable[..., Any]) -> None:
    """W x + scale * B A (kept * x / (1 - p)), eq. 3 of the paper with dropout; each layer drops other channels."""
    for dora in (False, True):
        run_ranks(compare_dropout, 1, dora)


def compare_dropout(dora: bool) -> None:
    enable_cpu()
    parallel.initialize(Layout(world_size=1), seed=1)
    hf_config = tiny_hf.families()["llama_biases"]
    model = build_gpt(hf_config, Layout(world_size=1))
    settings: dict[str, Any] = {"projections": projections_of(["all"], hf_config), "layers": (0, 1), "dora": dora}
    add_adapters(model, LoRASettings(**settings, rank=3, alpha=6, dropout=0.25))
    torch.manual_seed(2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layers = [module for module in model.modules() if isinstance(module, Adapted)]
    keys = token_keys(torch.arange(50), torch.zeros(50, dtype=torch.int64), step=4)
    for layer in layers:
        inputs = torch.randn(50, 1, layer.weight.shape[1], requires_grad=True)
        kept = keep_mask(keys, range(inputs.shape[-1]), salt=layer._dropout_salt, probability=0.25)
        changed = layer.weight + layer.weight_change()
        if dora:  # PEFT's way: the base model sees everything, and what changes it does not
            changed *= (magnitudes_of(layer) / changed.norm(dim=1).detach())[:, None]
        seen = inputs * kept[:, None] / 0.75
        expected = inputs @ layer.weight.T + seen @ (changed - layer.weight).T
        layer._switch.dropout_keys = keys
        dropped = without_bias(layer, inputs)
        torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-4)
        ours, theirs = (torch.autograd.grad(output.square().sum(), inputs)[0] for output in (dropped, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
        layer._switch.dropout_keys = None
        torch.testing.assert_close(without_bias(layer, inputs), inputs @ changed.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.merged_weight(), changed, rtol=1e-4, atol=1e-5)
    assert len({layer._dropout_salt for layer in layers}) == len(layers) == 8


def without_bias(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    output, _ = layer(inputs)
    return output if layer.bias is None or layer.skip_bias_add else output - layer.bias


def magnitudes_of(layer: Any) -> torch.Tensor:
    """Return the magnitudes of a layer of which every part has some, in the order of its rows."""
    found = {part: each for adapter in layer.adapters.values() for part, each in adapter().magnitudes.items()}
    grouped = [found[part].unflatten(0, (layer._groups, -1)) for part, _ in layer._parts]
    return torch.cat(grouped, dim=1).flatten()
