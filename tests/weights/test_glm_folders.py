"""Folders of GLM-4.5 and DeepSeek-V3: layers behind the model's own are left out, routers' biases stay in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_kto.errors import CheckpointError
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.moe import router_biases
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.export_hf import export_hf
from nemo_kto.weights.import_hf import check_weights, import_hf
from tests.distributed_harness import heard
from tests.network import tiny_hf

COUNT = "num_nextn_predict_layers"
FURTHER = "model.layers.4."  # the model has four: 0 to 3


def published(folder: Path, name: str = "glm4_moe") -> Path:
    """Save a model as these are published: one more layer in a file of its own, counted in config.json."""
    tiny_hf.make_folder(folder, AutoConfig.for_model(**tiny_hf.families()[name].to_dict()))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    further = {
        key.replace(".layers.3.", ".layers.4."): tensor for key, tensor in tensors.items() if ".layers.3." in key
    }
    further |= {
        f"{FURTHER}{key}": torch.ones(32) for key in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    }
    further |= {f"{FURTHER}eh_proj.weight": torch.ones(32, 64), f"{FURTHER}embed_tokens.weight": torch.ones(131, 32)}
    files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": further}
    for file, parts in files.items():
        save_file({key: tensor.clone() for key, tensor in parts.items()}, folder / file, metadata={"format": "pt"})
    weight_map = {key: file for file, parts in files.items() for key in parts}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    keys = json.loads((folder / "config.json").read_text())
    keys = {key: value for key, value in keys.items() if "mtp" not in key and key != COUNT}
    (folder / "config.json").write_text(json.dumps({**keys, **({COUNT: 1} if name != "qwen3_moe" else {})}, indent=1))
    return folder


def convert(source: Path, results: Path) -> list[str]:
    """Import and export the folder, and return what was said."""
    said = heard()
    enable_cpu()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel.initialize(Layout(world_size=1), seed=1)
    hf_config = load_hf_config(source)
    for dtype in (torch.float32, torch.bfloat16):
        model = build_gpt(hf_config, Layout(world_size=1), params_dtype=dtype)
        check_weights(source, hf_config)
        import_hf(model, source)
        assert {bias.dtype for bias in router_biases(model)} == {torch.float32}
        export_hf([model], hf_config, results / f"kept {dtype}", source_folder=source)
        export_hf([model], hf_config, results / f"changed {dtype}", source_folder=source, dtype=torch.bfloat16)
        export_hf([model], hf_config, results / f"no source {dtype}")
        if dtype == torch.float32:
            torch.save(tiny_hf.packed_logits(model), results / "logits.pt")
    return said


@pytest.fixture(scope="module", params=["glm4_moe", "deepseek_v3"])
def source(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Return such a folder."""
    return published(tmp_path_factory.mktemp("glm") / "source", request.param)


@pytest.fixture(scope="module")
def converted(
    source: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[list[str]]]
) -> tuple[Path, list[str]]:
    """Return the folder of exports, and what was said."""
    results = tmp_path_factory.mktemp("exports")
    return results, run_ranks(convert, 1, source, results)[0]


def test_layers_behind_the_models_own_are_left_out_as_in_transformers(
    source: Path, converted: tuple[Path, list[str]]
) -> None:
    results, said = converted
    theirs = tiny_hf.transformers_logits(source)
    torch.testing.assert_close(torch.load(results / "logits.pt"), theirs, rtol=0, atol=1e-5)
    given, back = tiny_hf.stored_tensors(source), tiny_hf.stored_tensors(results / "kept torch.float32")
    further = {key for key in given if key.startswith(FURTHER)}
    assert back.keys() == given.keys() - further
    assert all(torch.equal(back[key], given[key]) for key in back)
    left_out = [text for text in said if "are left out" in text]
    assert len(left_out) == 1
    assert f"{source}: the {len(further)} tensors of layers from number 4 on" in left_out[0]


@pytest.mark.parametrize("kind", ["kept", "changed", "no source"])
def test_an_export_says_that_it_has_no_further_layers(
    source: Path, converted: tuple[Path, list[str]], kind: str
) -> None:
    folder = converted[0] / f"{kind} torch.float32"
    before, after = (json.loads((root / "config.json").read_text()) for root in (source, folder))
    if kind == "no source":
        assert {name: after[name] for name in ("num_mtp_layers", COUNT) if after.get(name) is not None} in (
            {"num_mtp_layers": 0},
            {COUNT: 0},
        )
    else:
        assert after == {**before, COUNT: 0, **({"dtype": "bfloat16"} if kind == "changed" else {})}
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["kept", "changed", "no source"])
def test_routers_biases_are_written_in_float32(
    source: Path, converted: tuple[Path, list[str]], dtype: str, kind: str
) -> None:
    """As transformers keeps them: in bfloat16 other experts would be chosen."""
    given = tiny_hf.stored_tensors(source)
    back = tiny_hf.stored_tensors(converted[0] / f"{kind} torch.{dtype}")
    biases = [key for key in back if key.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    assert all(torch.equal(back[key], given[key]) for key in biases)
    others = {tensor.dtype for key, tensor in back.items() if key not in biases}
    assert others == {torch.bfloat16 if kind == "changed" else torch.float32}


def test_another_familys_further_layers_have_no_place(tmp_path: Path) -> None:
    folder = published(tmp_path / "qwen", "qwen3_moe")
    with pytest.raises(CheckpointError, match=f"no place for: {FURTHER}"):
        check_weights(folder, load_hf_config(folder))
