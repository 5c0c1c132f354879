"""Models that see images: their language model is read, trained and exported, and the rest passed on as it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    LlavaConfig,
    Mistral3Config,
    PixtralVisionConfig,
    PretrainedConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    SiglipVisionConfig,
)
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig

from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.network.families import dimensions_of, sizes_of_folder
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.lora import add_adapters
from nemo_kto.network.projections import LoRASettings
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights import import_hf as importing
from nemo_kto.weights.adapter_config import adapter_config, read_adapter_config, read_adapter_settings
from nemo_kto.weights.export_hf import export_hf
from nemo_kto.weights.import_hf import check_weights, import_hf
from nemo_kto.weights.peft_adapter import check_adapter, export_adapter, import_adapter
from nemo_kto.weights.source_folder import write_source_folder
from tests.network import tiny_hf, tiny_vision

TEXT = tiny_hf.families()
EYES: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8},
}
QWEN_EYES: dict[str, Any] = {
    **{"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32},
    **{"patch_size": 4, "num_position_embeddings": 16},
}
QWEN_TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
LAYOUTS = {"TP1": {}, "TP2": {"tensor": 2}, "PP2": {"pipeline": 2}, "EP2": {"expert": 2}}


OF_TRANSFORMERS_5 = ("qwen3_5", "qwen3_5_moe")
"""Those whose published tensors have the names of transformers 5."""


def wholes() -> dict[str, PretrainedConfig]:
    """Return a configuration for each kind of model with images, tied and not."""
    sees: dict[str, Any] = {"vision_config": PixtralVisionConfig(**EYES, head_dim=8), "image_token_index": 3}
    return {
        "gemma3": Gemma3Config(
            text_config=TEXT["gemma3_text"],
            vision_config=SiglipVisionConfig(**EYES),
            mm_tokens_per_image=4,
            image_token_index=3,
            tie_word_embeddings=True,
        ),
        "llava": LlavaConfig(
            text_config=TEXT["llama"], vision_config=CLIPVisionConfig(**EYES, projection_dim=8), image_token_index=3
        ),
        "llava_of_qwen": LlavaConfig(
            text_config=TEXT["qwen2_tied"], vision_config=SiglipVisionConfig(**EYES), image_token_index=3
        ),
        "mistral3": Mistral3Config(text_config=TEXT["mistral"], tie_word_embeddings=False, **sees),
        "mistral3_of_ministral": Mistral3Config(text_config=TEXT["ministral3"], tie_word_embeddings=True, **sees),
        "qwen2_5_vl": tiny_vision.configs()["qwen2_5_vl"],
        "qwen3_5": Qwen3_5Config(
            text_config=TEXT["qwen3_5_text"], vision_config=Qwen3_5VisionConfig(**QWEN_EYES), **QWEN_TOKENS
        ),
        "qwen3_5_moe": Qwen3_5MoeConfig(
            text_config=TEXT["qwen3_5_moe_text"], vision_config=Qwen3_5MoeVisionConfig(**QWEN_EYES), **QWEN_TOKENS
        ),
    }


def as_published(name: str, kind: str) -> str:
    """Return what the published folders of a model call the tensor `name` of transformers 5."""
    if kind == "qwen2_5_vl":
        return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    for new, old in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    plain = name.removeprefix("model.")
    # transformers 5.9 and later have a level less
    has_level = not plain.startswith("vision_tower.") or kind == "mistral3" or "vision_model." in plain
    return plain if has_level else plain.replace("vision_tower.", "vision_tower.vision_model.")


def make_folder(
    folder: Path, config: PretrainedConfig, *, published: bool, language: dict[str, torch.Tensor] | None = None
) -> Path:
    """Save a model with random weights, but for those in `language`, and a buffer of whole numbers, in two files."""
    config.dtype = torch.float32
    model = AutoModelForImageTextToText.from_config(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = parameter.mean() if name.endswith("norm.weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + centre)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    renamed = {
        as_published(name, config.model_type) if published else name: tensor
        for name, tensor in (standard(tensors) | (language or {})).items()
    }
    if published and config.model_type != "qwen2_5_vl":
        renamed["vision_tower.position_ids"] = torch.arange(4)[None]
    files: dict[str, dict[str, torch.Tensor]] = {f"model-0000{number}-of-00002.safetensors": {} for number in (1, 2)}
    for name, tensor in renamed.items():
        in_second = any(part in name for part in ("layers.2.", "layers.3.", "norm.weight", "projector", "lm_head"))
        files[f"model-0000{1 + in_second}-of-00002.safetensors"][name] = tensor.clone()
    for file, own in files.items():
        save_file(own, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in files.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in ("preprocessor_config.json", "generation_config.json"):
        (folder / file).write_text(json.dumps({"of": folder.name}))
    return folder


def standard(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors under the names of transformers 5's modules, whatever it has saved them under."""
    found = {}
    for name, tensor in tensors.items():
        new = name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
        if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):  # Qwen2.5-VL
            new = name.replace("model.", "model.language_model.")
        found[new if new.startswith(("model.", "lm_head.")) else f"model.{new}"] = tensor
    return found


def names_of(layout: str) -> list[str]:
    """Return the folders that can be divided so: only mixtures have experts."""
    names = [
        f"{name}{how}" for name in wholes() for how in ("", "_published") if not (how and name in OF_TRANSFORMERS_5)
    ]
    return [name for name in names if layout != "EP2" or "moe" in name]


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([model(input_ids=document[None]).logits[0] for document in tiny_hf.documents()])


def load(folder: Path) -> torch.nn.Module:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


# what the ranks do


def convert(source: Path, results: Path, layouts: list[str]) -> None:
    enable_cpu()
    for layout in layouts:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        parallel.initialize(Layout(world_size=dist.get_world_size(), **LAYOUTS[layout]), seed=1)
        for folder in map(source.joinpath, names_of(layout)):
            target = results / layout / folder.name
            hf_config = load_hf_config(folder)
            sequence = layout == "TP2" and dimensions_of(hf_config).mixture is not None
            model = build_gpt(
                hf_config, Layout(world_size=dist.get_world_size(), sequence=sequence, **LAYOUTS[layout])
            )
            import_hf(model, folder)
            kept = results / layout / f"{folder.name}_kept"
            if dist.get_rank() == 0:
                kept.mkdir(parents=True)
                write_source_folder(kept, hf_config, model_folder=folder, tokenizer_folder=folder)
            dist.barrier()
            export_hf([model], hf_config, target, source_folder=kept)
            place, logits = parallel.position(), tiny_hf.packed_logits(model)
            if logits is not None and place.tp_rank == 0:
                torch.save(logits, target / "logits.pt")


def adapt(base: Path, adapter: Path, target: Path) -> tuple[LoRASettings, torch.Tensor]:
    """Import an adapter and export it again; return its settings and the logits with it."""
    enable_cpu()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel.initialize(Layout(world_size=1), seed=1)
    hf_config, settings = load_hf_config(base), read_adapter_settings(adapter)
    check_adapter(adapter, settings, hf_config)
    model = build_gpt(hf_config, Layout(world_size=1), unfused=True)
    import_hf(model, base)
    add_adapters(model, settings)
    import_adapter(model, adapter)
    kept = target.with_name("kept")
    kept.mkdir()
    (kept / "adapter_config.json").write_text(
        json.dumps(adapter_config(settings, base_folder=base, hf_config=hf_config))
    )
    export_adapter([model], kept, target)
    logits = tiny_hf.packed_logits(model)
    assert logits is not None
    return read_adapter_config(target, num_layers=hf_config.num_hidden_layers), logits


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with each model as published, and as transformers 5 calls its tensors."""
    root = tmp_path_factory.mktemp("source")
    for name, config in wholes().items():
        for published in (True, False) if name not in OF_TRANSFORMERS_5 else (False,):
            make_folder(root / (f"{name}_published" if published else name), config, published=published)
    return root


@pytest.fixture(scope="module")
def results(source: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]) -> Path:
    root = tmp_path_factory.mktemp("results")
    run_ranks(convert, 1, source, root, ["TP1"])
    run_ranks(convert, 2, source, root, ["TP2", "PP2", "EP2"])
    return root


every_case = pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout in LAYOUTS for name in names_of(layout)]
)


# what must come out


@every_case
def test_logits_equal_transformers(source: Path, results: Path, name: str, layout: str) -> None:
    expected = logits_of(load(source / name))
    torch.testing.assert_close(torch.load(results / layout / name / "logits.pt"), expected, rtol=0, atol=1e-5)


@every_case
def test_the_exported_folder_is_the_whole_model_bit_by_bit(
    source: Path, results: Path, name: str, layout: str
) -> None:
    given, back = source / name, results / layout / name
    expected = sorted(file.name for file in given.iterdir())
    assert sorted(file.name for file in back.iterdir() if file.name != "logits.pt") == expected
    for file in expected:
        if file.endswith(".safetensors"):
            theirs, ours = load_file(given / file), load_file(back / file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
        elif file != "model.safetensors.index.json":
            assert (back / file).read_text() == (given / file).read_text()


def test_layouts_are_judged_by_the_language_model(source: Path) -> None:
    assert sizes_of_folder(source / "mistral3") == sizes_of_folder_of_text("mistral", source)


def sizes_of_folder_of_text(name: str, folder: Path) -> Any:
    text = folder.parent / "text"
    TEXT[name].save_pretrained(text)
    return sizes_of_folder(text)


def leave_out(folder: Path, target: Path) -> None:
    enable_cpu()
    parallel.initialize(Layout(world_size=1), seed=1)
    config = load_hf_config(folder)
    model = build_gpt(config, Layout(world_size=1))
    import_hf(model, folder)
    export_hf([model], config, target, source_folder=folder)


def test_what_guesses_tokens_is_left_out_of_a_whole_too(tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    config, folder, target = wholes()["qwen3_5"], tmp_path / "model", tmp_path / "out"
    config.text_config.mtp_num_hidden_layers = 1
    guesses = {f"mtp.{name}": torch.ones(2) for name in ("norm.weight", "layers.0.input_layernorm.weight")}
    make_folder(folder, config, published=False)
    save_file(guesses, folder / "mtp.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(guesses, "mtp.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    run_ranks(leave_out, 1, folder, target)
    given, back = tiny_hf.stored_tensors(folder), tiny_hf.stored_tensors(target)
    assert back.keys() == given.keys() - guesses.keys()
    assert all(torch.equal(back[name], given[name]) for name in back)
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, target))
    before["text_config"]["mtp_num_hidden_layers"] = 0
    assert after == before


def test_it_is_said_once_what_is_not_trained(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    importing._warn_passed_on.cache_clear()
    check_weights(source / "gemma3", load_hf_config(source / "gemma3"))  # which may be given images
    folder = source / "mistral3_of_ministral"
    for _ in range(2):
        check_weights(folder, load_hf_config(folder))
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    number = sum("language_model" not in name for name in tiny_hf.stored_tensors(folder))
    assert f"of this mistral3 its language model is trained, on text; the {number} tensors of the rest" in line


def test_a_tensor_of_the_language_model_without_a_place_is_an_error(source: Path, tmp_path: Path) -> None:
    config = load_hf_config(source / "gemma3")
    save_file(
        {**tiny_hf.stored_tensors(source / "gemma3"), "model.language_model.layers.9.x": torch.ones(1)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"no place for: model\.language_model\.layers\.9\.x"):
        check_weights(tmp_path, config)


def test_a_language_model_of_another_family_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    whole = wholes()["mistral3"]
    whole.text_config = TEXT["llama"]
    whole.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'llama' of the language model of 'mistral3' is not supported"):
        load_hf_config(tmp_path)


@pytest.fixture
def one_rank() -> Any:
    with parallel.default_group():
        enable_cpu()
        parallel.initialize(Layout(world_size=1), seed=1)
        yield
        parallel_state.destroy_model_parallel()


def test_in_another_dtype_all_numbers_are_but_whole_ones(source: Path, tmp_path: Path, one_rank: None) -> None:
    folder, target = source / "gemma3_published", tmp_path / "out"
    config = load_hf_config(folder)
    model = build_gpt(config, Layout(world_size=1))
    import_hf(model, folder)
    export_hf([model], config, target, source_folder=folder, dtype=torch.bfloat16)
    given, back = tiny_hf.stored_tensors(folder), tiny_hf.stored_tensors(target)
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(back[name], tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor), name
    written = json.loads((target / "config.json").read_text())
    assert {written["dtype"], written["text_config"]["dtype"], written["vision_config"]["dtype"]} == {"bfloat16"}


def test_a_folder_that_is_gone_is_asked_for(source: Path, tmp_path: Path, one_rank: None) -> None:
    folder, kept = make_folder(tmp_path / "model", wholes()["gemma3"], published=True), tmp_path / "kept"
    config = load_hf_config(folder)
    model = build_gpt(config, Layout(world_size=1))
    import_hf(model, folder)
    kept.mkdir()
    write_source_folder(kept, config, model_folder=folder, tokenizer_folder=folder)
    folder.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=rf"this gemma3 that see images were in {folder}, .* Put that folder"):
        export_hf([model], config, tmp_path / "out", source_folder=kept)
    assert not (tmp_path / "out").exists()


RANKS = {"model.language_model.layers.1.self_attn.q_proj": 5, "o_proj": 2}
MAGNITUDES_AND_COPIES = {"use_dora": True, "modules_to_save": ["language_model.embed_tokens", "lm_head"]}


@pytest.mark.parametrize(
    ("name", "layers", "fields"),
    [
        ("gemma3", None, {}),
        ("llava", [1, 2], {"rank_pattern": RANKS}),
        ("qwen2_5_vl", None, {"use_dora": True}),
        ("gemma3", [1, 2], {"rank_pattern": RANKS, "use_dora": True}),
        ("qwen3_5_moe", None, {"rank_pattern": RANKS, **MAGNITUDES_AND_COPIES}),
        ("qwen3_5_moe", [1, 2], {}),
    ],
)
def test_adapters_of_peft_are_taken_over_and_given_back(
    source: Path,
    tmp_path: Path,
    run_ranks: Callable[..., Any],
    name: str,
    layers: list[int] | None,
    fields: dict[str, Any],
) -> None:
    """On the language model only: layers that see images have projections of the same names.

    Of a mixture they are those of shared experts; layers 1 and 3 have attention that is not linear.
    """
    base, adapter, target = source / name, tmp_path / "adapter", tmp_path / "out"
    numbers = "|".join(map(str, layers or range(4)))
    pattern = rf"model\.language_model\.layers\.({numbers})\..*\.(q_proj|o_proj|up_proj)"
    adapted = get_peft_model(load(base), LoraConfig(r=3, lora_alpha=4, target_modules=pattern, **fields)).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    adapted.save_pretrained(adapter)
    expected = logits_of(adapted)
    assert (expected - logits_of(load(base))).abs().max() > 0.01
    ((settings, logits),) = run_ranks(adapt, 1, base, adapter, target)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert settings == read_adapter_settings(adapter)
    given, back = load_file(adapter / "adapter_model.safetensors"), load_file(target / "adapter_model.safetensors")
    assert back.keys() == given.keys() and all(torch.equal(back[name], given[name]) for name in given)
    again = PeftModel.from_pretrained(load(base), target).eval()
    assert {name for name, _ in again.named_modules() if name.endswith("lora_A")} == {
        name for name, _ in adapted.named_modules() if name.endswith("lora_A")
    }
    torch.testing.assert_close(logits_of(again), expected, rtol=0, atol=1e-6)
