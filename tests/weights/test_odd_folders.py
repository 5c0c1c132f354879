"""Folders that transformers loads though it does not save such: logits are its logits, exports are like the source."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    SmolLM3Config,
)

from nemo_kto.errors import KTOError
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.export_hf import export_hf
from nemo_kto.weights.import_hf import check_weights, import_hf
from nemo_kto.weights.source_folder import write_source_folder
from tests.network import tiny_hf
from tests.network.tiny_hf import SIZES

MODELS = tiny_hf.families()
_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 2}
EMBEDDING, OUTPUT, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Tensors = dict[str, torch.Tensor]

# how folders are made


def changed(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    tensors: Callable[[Tensors], Tensors] | None = None,
) -> None:
    """Change what is in config.json, take keys out of it, and change the tensors of a folder with a single file."""
    file = folder / "config.json"
    keys = {**json.loads(file.read_text()), **(config or {})}
    file.write_text(json.dumps({key: value for key, value in keys.items() if key not in without}, indent=1))
    if tensors is not None:
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def saved(model: PretrainedConfig, **changes: Any) -> Callable[[Path], None]:
    """Return what saves a model of a configuration, with `changes`."""

    def make(folder: Path) -> None:
        tiny_hf.make_folder(folder, AutoConfig.for_model(**model.to_dict()))
        changed(folder, **changes)

    return make


def own_head(tensors: Tensors) -> Tensors:
    return {**tensors, OUTPUT: tensors[EMBEDDING].flip(0).contiguous()}


def same_head(tensors: Tensors) -> Tensors:
    return {**tensors, OUTPUT: tensors[EMBEDDING].clone()}


def head_only(tensors: Tensors) -> Tensors:
    return {OUTPUT if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def other_prefixes(tensors: Tensors) -> Tensors:
    """The output layer with the prefix it should not have, one layer without the one it should."""
    return {
        "model." + name if name == OUTPUT else name.removeprefix("model.") if ".layers.1." in name else name: tensor
        for name, tensor in tensors.items()
    }


def mostly_bf16(tensors: Tensors) -> Tensors:
    return {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}


def bf16(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def with_buffers(tensors: Tensors) -> Tensors:
    return {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}


def called_mlp(tensors: Tensors) -> Tensors:
    return {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in tensors.items()}


def fused(name: str) -> Callable[[Path], None]:
    """Return what saves a mixture of experts as transformers 5 holds it in memory."""

    def make(folder: Path) -> None:
        tiny_hf.make_folder(folder, AutoConfig.for_model(**MODELS[name].to_dict()))
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(folder, save_original_format=False)
        # named as in memory; transformers 5.8 holds those of granitemoe there as they are published
        assert {key for key, _ in model.named_parameters()} <= load_file(folder / "model.safetensors").keys()

    return make


def base_model(folder: Path) -> None:
    tiny_hf.make_folder(folder, AutoConfig.for_model(**MODELS["qwen2_tied"].to_dict()))
    AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    assert EMBEDDING.removeprefix("model.") in load_file(folder / "model.safetensors")


def sharded(folder: Path) -> None:
    tiny_hf.make_folder(folder, LlamaConfig(**SIZES), max_shard_size="20KB")


def stale_index(folder: Path) -> None:
    """A new single file beside an index and the shards of another model."""
    sharded(folder)
    tensors = tiny_hf.stored_tensors(folder)
    save_file({name: tensor * 0.9 for name, tensor in tensors.items()}, folder / "model.safetensors")


def lying_index(folder: Path) -> None:
    """An index whose tensors are all said to be in other files; only the files count."""
    sharded(folder)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = list(index["weight_map"])
    index["weight_map"] = dict(zip(names, reversed(index["weight_map"].values()), strict=True))
    file.write_text(json.dumps(index))


def single_shard(folder: Path) -> None:
    """A single file that an index names, as converters write it."""
    tiny_hf.make_folder(folder, LlamaConfig(**SIZES))
    file = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(file), file.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def across_layers(folder: Path) -> None:
    """Files that each hold some projections of all layers."""
    tiny_hf.make_folder(folder, LlamaConfig(**SIZES))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: "b.safetensors" if "k_proj" in name else "a.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def hub_cache(folder: Path) -> None:
    """Links into a folder of blobs, as huggingface_hub keeps snapshots."""
    blobs = folder.parent / "blobs"
    tiny_hf.make_folder(blobs, LlamaConfig(**SIZES))
    folder.mkdir()
    for number, file in enumerate(sorted(blobs.iterdir())):
        blob = file.rename(blobs / f"{number:040x}")
        (folder / file.name).symlink_to(os.path.relpath(blob, folder))


def other_formats(folder: Path) -> None:
    """What Meta and Mistral put beside the weights, and another variant of them."""
    tiny_hf.make_folder(folder, LlamaConfig(**SIZES))
    (folder / "original").mkdir()
    for name in ("original/consolidated.00.pth", "pytorch_model.bin", "consolidated.safetensors"):
        (folder / name).write_bytes(b"not read")
    shutil.copyfile(folder / "model.safetensors", folder / "model.fp16.safetensors")


V4_LLAMA3 = {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 2.0, "high_freq_factor": 6.5}
V4_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 1.7, 2.9, 4.5]}
V4_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
V5 = ("rope_parameters", "dtype")
PHI3 = Phi3Config(**SIZES, **_TOKENS)
FLOAT32 = {"torch_dtype": "float32"}

ODD: dict[str, Callable[[Path], None]] = {
    "own_head": saved(MODELS["llama_tied"], tensors=own_head),
    "own_head_without_a_word": saved(
        SmolLM3Config(**SIZES, **_TOKENS), without=("tie_word_embeddings",), tensors=own_head
    ),
    "same_head": saved(MODELS["llama_tied"], tensors=same_head),
    "head_only": saved(MODELS["qwen2_tied"], tensors=head_only),
    "stale_index": stale_index,
    "lying_index": lying_index,
    "sharded": sharded,
    "single_shard": single_shard,
    "across_layers": across_layers,
    "hub_cache": hub_cache,
    "other_formats": other_formats,
    "no_prefix": base_model,
    "no_prefix_with_head": saved(MODELS["llama"], tensors=without_prefix),
    "other_prefixes": saved(MODELS["llama"], tensors=other_prefixes),
    "fused_mixtral": fused("mixtral"),
    "fused_qwen3_moe": fused("qwen3_moe_mixed"),
    "fused_granitemoe": fused("granitemoe"),
    "fused_qwen2_moe": fused("qwen2_moe_mixed"),
    "fused_glm4_moe": fused("glm4_moe"),
    "fused_minimax_m2": fused("minimax_m2"),
    "fused_deepseek_v3": fused("deepseek_v3"),
    "fused_glm4_moe_lite": fused("glm4_moe_lite"),
    "mixtral_called_mlp": saved(MODELS["mixtral"], tensors=called_mlp),
    # keys that transformers keeps and does not look at in models of these architectures
    "llama_window": saved(
        MODELS["llama"],
        config={"sliding_window": 3, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 4},
    ),
    "mistral_unused": saved(
        MistralConfig(**SIZES, sliding_window=7),
        config={"use_sliding_window": False, "attention_bias": True},
    ),
    "phi3_unused": saved(
        Phi3Config(**SIZES, **_TOKENS, sliding_window=7),
        config={"use_sliding_window": False, "mlp_bias": True, "layer_types": ["full_attention"] * 4},
    ),
    # here the layers' types decide alone
    "smollm3_types": saved(
        SmolLM3Config(**SIZES, **_TOKENS, sliding_window=7),
        config={"use_sliding_window": False, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "v4_theta": saved(MODELS["llama"], config={"rope_theta": 500.0, "rope_scaling": None, **FLOAT32}, without=V5),
    "v4_linear": saved(
        MODELS["llama"],
        config={"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.5}, **FLOAT32},
        without=V5,
    ),
    "v4_llama3": saved(
        MODELS["llama"],
        config={"rope_theta": 1e4, "rope_scaling": {**V4_LLAMA3, "original_max_position_embeddings": 32}, **FLOAT32},
        without=V5,
    ),
    "v4_yarn": saved(
        MODELS["qwen2_tied"],
        config={
            "rope_theta": 1e4,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            **FLOAT32,
        },
        without=V5,
    ),
    "v4_dynamic": saved(
        MODELS["llama_biases"],
        config={"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}, **FLOAT32},
        without=V5,
    ),
    "v4_phi3": saved(
        PHI3,
        config={"rope_theta": 1e4, "rope_scaling": V4_LONGROPE, "original_max_position_embeddings": 16, **FLOAT32},
        without=V5,
    ),
    "v4_gemma3": saved(
        MODELS["gemma3_text"],
        config={
            "rope_theta": 1e5,
            "rope_local_base_freq": 50.0,
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
            "sliding_window_pattern": 2,
            "cache_implementation": "hybrid",
            **FLOAT32,
        },
        without=(*V5, "layer_types"),
    ),
    "v4_gemma2": saved(
        MODELS["gemma2"],
        config={"rope_theta": 1e3, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", **FLOAT32},
        without=(*V5, "layer_types", "use_bidirectional_attention"),
    ),
    "v4_glm4": saved(
        MODELS["glm4"],
        config={"rope_theta": 1e3, "rope_scaling": None, "partial_rotary_factor": 0.25, **FLOAT32},
        without=V5,
    ),
    "v4_glm4_moe": saved(
        MODELS["glm4_moe_groups"],
        config={"rope_theta": 1e4, "rope_scaling": None, "num_nextn_predict_layers": 0, **FLOAT32},
        without=(*V5, "num_mtp_layers"),
    ),
    "v4_deepseek_v3": saved(
        MODELS["deepseek_v3"],
        config={
            **{"rope_theta": 1e4, "num_nextn_predict_layers": 0, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
            "rope_scaling": {**V4_YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
            **{"moe_layer_freq": 1, "ep_size": 1, **FLOAT32},
        },
        without=(*V5, "num_mtp_layers", "rope_interleave", "qk_head_dim", "head_dim"),
    ),
    "v4_gpt_oss": saved(
        MODELS["gpt_oss"],
        config={
            **{"rope_theta": 1e4, "rope_scaling": {**V4_YARN, "truncate": False}, "experts_per_token": 2},
            **{"initial_context_length": 16, "head_dim": 16, **FLOAT32},
        },
        without=(*V5, "swiglu_alpha"),
    ),
    "v4_olmo3": saved(
        MODELS["olmo3_pattern"],
        config={
            "rope_theta": 1e4,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            **FLOAT32,
        },
        without=V5,
    ),
    "v4_minimax_m2": saved(
        MODELS["minimax_m2"],
        config={
            **{"rope_theta": 1e4, "rotary_dim": 4, "use_qk_norm": True, "qk_norm_type": "per_layer"},
            **{"scoring_func": "sigmoid", "use_routing_bias": True, **FLOAT32},
        },
        without=V5,
    ),
    "v4_no_dtype": saved(MODELS["qwen2_tied"], config={"rope_theta": 300.0}, without=V5, tensors=bf16),
    "mixed_dtypes": saved(MODELS["qwen3"], config={"dtype": "bfloat16"}, tensors=mostly_bf16),
    "other_dtype": saved(MODELS["llama"], config={"dtype": "float32"}, tensors=bf16),
    "nulls": saved(
        LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
        config={
            "rope_parameters": {"rope_type": "default", "rope_theta": 200.0, "partial_rotary_factor": None},
            "head_dim": None,
            "quantization_config": None,
            "pad_token_id": -1,
            "hidden_act": "swish",
        },
        without=("num_key_value_heads",),
    ),
    "buffers": saved(MODELS["llama"], tensors=with_buffers),
}

LAYOUTS = {"TP1": {}, "TP2": {"tensor": 2}, "PP2": {"pipeline": 2}, "EP2": {"expert": 2}}
DIVIDED = ("own_head", "same_head", "head_only", "no_prefix", "sharded", "fused_mixtral", "fused_qwen3_moe")


def names_of(layout: str) -> list[str]:
    if layout == "EP2":
        return ["fused_mixtral", "fused_qwen3_moe"]
    return list(ODD if layout == "TP1" else DIVIDED)


CASES = [(layout, name) for layout in LAYOUTS for name in names_of(layout)]


# what the ranks do


def convert_folders(source: Path, results: Path, layouts: list[str]) -> None:
    """Import every folder, save its logits, and export it with nothing of it left but what a checkpoint keeps."""
    enable_cpu()
    for layout in layouts:
        division = Layout(world_size=1 if layout == "TP1" else 2, **LAYOUTS[layout])
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        parallel.initialize(division, seed=1)
        for name in names_of(layout):
            hf_config = load_hf_config(source / name)
            # Megatron wants sequence parallelism for experts whose layers are divided
            has_experts = dimensions_of(hf_config).mixture is not None
            model = build_gpt(hf_config, replace(division, sequence=has_experts and layout == "TP2"))
            import_hf(model, source / name)
            target, kept = results / layout / name, results / layout / f"{name}.kept"
            if torch.distributed.get_rank() == 0:
                kept.mkdir(parents=True)
                write_source_folder(kept, hf_config, model_folder=source / name, tokenizer_folder=source / name)
            export_hf([model], hf_config, target, source_folder=kept)
            logits = tiny_hf.packed_logits(model)
            if logits is not None and parallel.position().tp_rank == 0:
                torch.save(logits, results / layout / f"{name}.pt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the odd folders."""
    root = tmp_path_factory.mktemp("odd")
    for name, make in ODD.items():
        make(root / name)
    return root


@pytest.fixture(scope="module")
def results(source: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]) -> Path:
    """Folder of what each layout made of the folders in `source`."""
    root = tmp_path_factory.mktemp("results")
    run_ranks(convert_folders, 1, source, root, ["TP1"])
    run_ranks(convert_folders, 2, source, root, [layout for layout in LAYOUTS if layout != "TP1"])
    return root


# what must come out


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_logits_equal_transformers(source: Path, results: Path, name: str, layout: str) -> None:
    ours, theirs = torch.load(results / layout / f"{name}.pt"), tiny_hf.transformers_logits(source / name)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ODD)
def test_transformers_loads_the_export(source: Path, results: Path, name: str) -> None:
    exported = tiny_hf.transformers_logits(results / "TP1" / name)
    torch.testing.assert_close(exported, tiny_hf.transformers_logits(source / name), rtol=0, atol=1e-6)
    _, info = AutoModelForCausalLM.from_pretrained(results / "TP1" / name, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_export_has_the_sources_files_names_dtypes_and_numbers(
    source: Path, results: Path, name: str, layout: str
) -> None:
    given, back = files_of(source / name), files_of(results / layout / name)
    assert back.keys() == given.keys()
    if name == "across_layers":  # no file is held back until a later layer's tensors come
        given, back = ({"": tiny_hf.stored_tensors(root / name)} for root in (source, results / layout))
    for file, tensors in given.items():
        expected = {key: tensor for key, tensor in tensors.items() if "inv_freq" not in key}
        assert back[file].keys() == expected.keys(), file
        for key, tensor in expected.items():
            assert back[file][key].dtype == tensor.dtype, key
            assert torch.equal(back[file][key], tensor), key


def files_of(folder: Path) -> dict[str, Tensors]:
    """Return the files that transformers reads, and their tensors."""
    if (folder / "model.safetensors").exists():
        return {"model.safetensors": load_file(folder / "model.safetensors")}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {file: load_file(folder / file) for file in sorted(set(index["weight_map"].values()))}


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_configuration_is_the_sources_letter_by_letter(source: Path, results: Path, name: str, layout: str) -> None:
    """So whatever read the source reads it, transformers 4 with its `rope_theta` and `torch_dtype` too."""
    given, back = (root / name / "config.json" for root in (source, results / layout))
    if name.startswith("own_head"):
        assert json.loads(back.read_text()) == {**json.loads(given.read_text()), "tie_word_embeddings": False}
    else:
        assert back.read_text() == given.read_text()
    generation = "generation_config.json"
    assert (results / layout / name / generation).exists() == (source / name / generation).exists()


# other dtypes


def export_in_dtypes(source: Path, results: Path) -> None:
    """Export folders in a dtype that is not theirs, one with a number that float16 cannot hold."""
    enable_cpu()
    division = Layout(world_size=1)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel.initialize(division, seed=1)
    for name, dtype in (("v4_theta", torch.bfloat16), ("mixed_dtypes", torch.float16), ("v4_no_dtype", torch.float32)):
        hf_config = load_hf_config(source / name)
        model = build_gpt(hf_config, division)
        import_hf(model, source / name)
        export_hf([model], hf_config, results / name, source_folder=source / name, dtype=dtype)
        if name == "mixed_dtypes":
            with torch.no_grad():
                model.decoder.final_layernorm.weight[3] = 7e4
            export_hf([model], hf_config, results / "large", source_folder=source / name, dtype=dtype)
    sizes = load_hf_config(source / "sharded")
    model = build_gpt(sizes, division)
    import_hf(model, source / "sharded")
    export_hf([model], sizes, results / "half", source_folder=source / "sharded", dtype=torch.bfloat16)
    export_hf([model], sizes, results / "no_source")


@pytest.fixture(scope="module")
def dtypes(source: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]) -> Path:
    """Folder of what is exported in other dtypes."""
    root = tmp_path_factory.mktemp("dtypes")
    run_ranks(export_in_dtypes, 1, source, root)
    return root


@pytest.mark.parametrize(
    ("name", "dtype", "key"),
    [
        ("v4_theta", torch.bfloat16, "torch_dtype"),
        ("mixed_dtypes", torch.float16, "dtype"),
        ("v4_no_dtype", torch.float32, "torch_dtype"),  # named by neither: the key that every version reads
    ],
)
def test_another_dtype_changes_the_one_key_that_names_it(
    source: Path, dtypes: Path, name: str, dtype: torch.dtype, key: str
) -> None:
    given, back = tiny_hf.stored_tensors(source / name), tiny_hf.stored_tensors(dtypes / name)
    assert {tensor.dtype for tensor in back.values()} == {dtype}
    assert all(torch.equal(back[key], tensor.to(dtype)) for key, tensor in given.items())
    before, after = (json.loads((root / name / "config.json").read_text()) for root in (source, dtypes))
    assert after == {**before, key: str(dtype).removeprefix("torch.")}


def test_what_float16_cannot_hold_is_written_in_bfloat16(dtypes: Path) -> None:
    tensors = tiny_hf.stored_tensors(dtypes / "large")
    assert {name for name, tensor in tensors.items() if tensor.dtype != torch.float16} == {NORM}
    assert tensors[NORM].dtype == torch.bfloat16
    assert tensors[NORM][3] == torch.tensor(7e4).bfloat16()
    assert json.loads((dtypes / "large" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(dtypes / "large").model.norm.weight.isfinite().all()


def test_narrower_weights_need_fewer_files(source: Path, dtypes: Path) -> None:
    before, after = (files_of(root) for root in (source / "sharded", dtypes / "half"))
    largest = max(sum(tensor.nbytes for tensor in tensors.values()) for tensors in before.values())
    assert 1 < len(after) < len(before)
    assert all(sum(tensor.nbytes for tensor in tensors.values()) <= largest for tensors in after.values())


def test_transformers_4_reads_a_configuration_without_a_source(source: Path, dtypes: Path) -> None:
    """It looks for the base of the rotary embedding outside of `rope_parameters`."""
    written = json.loads((dtypes / "no_source" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10000.0
    theirs = tiny_hf.transformers_logits(source / "sharded")
    torch.testing.assert_close(tiny_hf.transformers_logits(dtypes / "no_source"), theirs, rtol=0, atol=1e-6)


# what is refused


def classifier(folder: Path) -> None:
    AutoModelForSequenceClassification.from_config(LlamaConfig(**SIZES)).save_pretrained(folder)


def tied_classifier(folder: Path) -> None:
    AutoModelForSequenceClassification.from_config(MODELS["llama_tied"]).save_pretrained(folder)


def headless(folder: Path) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).model.save_pretrained(folder)


def index_to(place: str) -> Callable[[Path], None]:
    """Return what saves an index with a file elsewhere."""

    def make(folder: Path) -> None:
        sharded(folder)
        file = folder / "model.safetensors.index.json"
        outside = str(folder.parent / "elsewhere.safetensors") if place == "absolute" else place
        file.write_text(json.dumps({"metadata": {}, "weight_map": {EMBEDDING: outside}}))

    return make


def adapter_beside(folder: Path) -> None:
    tiny_hf.make_folder(folder, LlamaConfig(**SIZES))
    (folder / "adapter_config.json").write_text("{}")


def twice(tensors: Tensors) -> Tensors:
    return {**tensors, "norm.weight": tensors[NORM] * 2}


def in_int8(tensors: Tensors) -> Tensors:
    return {**tensors, NORM: tensors[NORM].to(torch.int8)}


LLAMA = LlamaConfig(**SIZES)
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
REFUSED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "classifier": (classifier, ["lacks lm_head.weight", "LlamaForSequenceClassification", "score.weight"]),
    "tied_classifier": (tied_classifier, ["no place for", "score.weight"]),
    "headless": (headless, ["lacks lm_head.weight", "LlamaModel", "tie_word_embeddings"]),
    "up": (index_to("../elsewhere.safetensors"), ["index.json", "../elsewhere.safetensors"]),
    "absolute": (index_to("absolute"), ["index.json", "elsewhere.safetensors", "outside"]),
    "adapter_beside": (adapter_beside, ["a model and an adapter", "adapter_config.json"]),
    "twice": (saved(LLAMA, tensors=twice), ["no place for", "norm.weight"]),
    "int8": (saved(LLAMA, tensors=in_int8), ["model.norm.weight is stored as I8"]),
    "other_file": (saved(LLAMA, config={"transformers_weights": "mine.safetensors"}), ["transformers_weights"]),
    "uneven": (saved(LLAMA, config={"per_layer_config": {"1": {"intermediate_size": 24}}}), ["per_layer_config"]),
    "no_window": (saved(MistralConfig(**SIZES), config={"sliding_window": 0}), ["sliding_window", "0"]),
    "nested_rope": (saved(MODELS["qwen3"], config={"rope_parameters": NESTED}), ["rope_parameters"]),
    "null_share": (
        saved(
            LLAMA,
            config={
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "partial_rotary_factor": None,
                }
            },
        ),
        ["no rotary embedding can be computed", "partial_rotary_factor"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_folders_are_named(tmp_path: Path, name: str) -> None:
    make, wanted = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(KTOError) as caught:
        check_weights(tmp_path / name, load_hf_config(tmp_path / name))
    assert all(part in str(caught.value) for part in [str(tmp_path / name), *wanted]), str(caught.value)


# what stands beside the weights


def test_code_that_a_configuration_names_is_kept(tmp_path: Path) -> None:
    """For whoever trusts it: without it the folder could not be loaded with `trust_remote_code=True`."""
    model, kept = tmp_path / "model", tmp_path / "kept"
    saved(
        PHI3, config={"auto_map": {"AutoConfig": "my_phi3.Config", "AutoModel": "other/repository--my_other.Model"}}
    )(model)
    for name in ("my_phi3.py", "my_other.py", "unnamed.py"):
        (model / name).write_text("raise SystemExit('code was run')\n")
    kept.mkdir()
    write_source_folder(kept, load_hf_config(model), model_folder=model, tokenizer_folder=model)
    assert {file.name for file in kept.glob("*.py")} == {"my_phi3.py"}


def test_generation_config_is_that_of_the_model_not_of_the_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    saved(MODELS["llama"])(model)
    tokenizer.mkdir()
    (tokenizer / "generation_config.json").write_text('{"eos_token_id": 99}')
    (tokenizer / "tokenizer.json").write_text("{}")
    config = load_hf_config(model)
    for present in (True, False):
        kept = tmp_path / f"kept_{present}"
        kept.mkdir()
        write_source_folder(kept, config, model_folder=model, tokenizer_folder=tokenizer)
        assert (kept / "tokenizer.json").exists()
        assert (kept / "generation_config.json").exists() == present
        if present:
            assert (kept / "generation_config.json").read_text() == (model / "generation_config.json").read_text()
        (model / "generation_config.json").unlink(missing_ok=True)
