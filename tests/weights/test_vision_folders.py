"""What sees images, read, kept or trained, and written: transformers loads what comes out."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from nemo_kto.config.compose import parse_config
from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.network.gpt import VISION_PREFIX
from nemo_kto.network.hf_config import load_hf_config, whole_config
from nemo_kto.network.sharded import sharded_leaves
from nemo_kto.network.vision import VisionSettings
from nemo_kto.runs.model import hf_config_of, vision_for
from nemo_kto.runtime.checkpoint import sharded_trained, sharding_metadata
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights import import_hf as importing
from nemo_kto.weights.export_hf import export_hf
from nemo_kto.weights.import_hf import check_weights
from tests.network import tiny_hf, tiny_vision
from tests.weights import test_models_with_images as wholes

MODELS = tuple(tiny_vision.configs())
NAMINGS = {"": False, "_published": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with each model, under both kinds of names."""
    root = tmp_path_factory.mktemp("source")
    for naming, published in NAMINGS.items():
        for name, config in tiny_vision.configs().items():
            wholes.make_folder(root / f"{name}{naming}", config, published=published)
    return root


# what the ranks do


def convert(source: Path, results: Path, layout: str) -> None:
    """Read each model with its frozen eyes, and write it."""
    division = Layout(world_size=dist.get_world_size(), **tiny_vision.LAYOUTS[layout])
    for folder in sorted(source.iterdir()):
        chunks = tiny_vision.chunks_of(folder, division)
        for chunk in chunks:
            assert not any(leaf.key.startswith(VISION_PREFIX) for leaf in sharded_leaves(chunk))
        export_hf(chunks, load_hf_config(folder), results / layout / folder.name, source_folder=folder)


def train(source: Path, results: Path, layout: str, trained: str, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Change what is trained, as training does; write each model, and return the log-probs with it."""
    division = Layout(world_size=dist.get_world_size(), **tiny_vision.LAYOUTS[layout])
    found = []
    for name in MODELS:
        for naming in NAMINGS:
            folder = source / f"{name}{naming}"
            chunks = tiny_vision.chunks_of(folder, division, train=trained)
            generator = torch.Generator().manual_seed(5)
            for chunk in chunks:
                if chunk.vision is None:
                    continue
                of_checkpoint = sharded_trained(chunk, sharding_metadata()).keys()
                for key, parameter in chunk.named_parameters():
                    assert (key in of_checkpoint) is parameter.requires_grad
                    if key.startswith(VISION_PREFIX) and parameter.requires_grad:
                        with torch.no_grad():
                            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            target = results / f"{name}{naming}"
            export_hf(chunks, load_hf_config(folder), target, source_folder=folder, dtype=dtype)
            if not naming:
                found.append(tiny_vision.logps_of(folder, chunks, division))
    return found


# what must come out


@pytest.mark.parametrize("layout", ["TP1", "TP2_SP", "PP2_VPP2"])
def test_what_is_frozen_is_written_bit_by_bit(
    source: Path, tmp_path: Path, run_ranks: Callable[..., Any], layout: str
) -> None:
    run_ranks(convert, tiny_vision.world_of(layout), source, tmp_path, layout)
    for folder in source.iterdir():
        back = tmp_path / layout / folder.name
        for file in folder.glob("*.safetensors"):
            given, written = load_file(file), load_file(back / file.name)
            assert given.keys() == written.keys()
            assert all(torch.equal(given[name], written[name]) for name in given)


@pytest.mark.parametrize(("layout", "trained"), [("TP1", "all"), ("TP2", "projector"), ("PP2", "all")])
def test_transformers_loads_what_was_trained(
    source: Path, tmp_path: Path, run_ranks: Callable[..., Any], layout: str, trained: str
) -> None:
    """All that is trained has changed, nothing else, and log-probs are ours."""
    ranks = run_ranks(train, tiny_vision.world_of(layout), source, tmp_path, layout, trained, None)
    last = ranks[-1]
    for index, name in enumerate(MODELS):
        for naming in NAMINGS:
            given, back = (tiny_hf.stored_tensors(root / f"{name}{naming}") for root in (source, tmp_path))
            assert given.keys() == back.keys()
            changed = {each for each in given if not torch.equal(given[each], back[each])}
            projector = {each for each in given if "multi_modal_projector" in each or "visual.merger" in each}
            assert projector and (changed == projector if trained == "projector" else changed > projector)
            # CLIP's last layer, and what is behind it, is not looked at
            assert not any("vision" in each and ".layers.2." in each for each in changed if name == "llava_clip")
        model = tiny_vision.load(tmp_path / name)
        shown = [each for row in tiny_vision.documents(model.config) for each in row]
        with torch.no_grad():
            logps = torch.stack([tiny_vision.whole_logps(model, each) for each in shown])
        torch.testing.assert_close(last[index], logps, rtol=0, atol=1e-5)


def test_what_was_trained_is_written_in_another_dtype(
    source: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    run_ranks(train, 1, source, tmp_path, "TP1", "all", torch.bfloat16)
    for folder in tmp_path.iterdir():
        for name, tensor in tiny_hf.stored_tensors(folder).items():
            assert not tensor.is_floating_point() or tensor.dtype == torch.bfloat16, name


def settings_of(folder: Path) -> VisionSettings:
    whole = whole_config(folder)
    assert whole is not None
    return VisionSettings(config=whole)


def without(folder: Path, target: Path, left_out: str, put_in: dict[str, torch.Tensor]) -> Path:
    """Copy a folder in one file, without a tensor and with others."""
    target.mkdir()
    tensors = tiny_hf.stored_tensors(folder)
    del tensors[left_out]
    save_file({**tensors, **put_in}, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("name", MODELS)
def test_a_tensor_that_sees_images_is_missed(source: Path, tmp_path: Path, name: str) -> None:
    """By the name that the folder has; where the model is trained on text, it is no matter."""
    folder = source / f"{name}_published"
    names = sorted(tiny_hf.stored_tensors(folder))
    lost = next(each for each in names if each.startswith(("visual.blocks.1", "vision_tower.vision_model.encoder")))
    copy = without(folder, tmp_path / "lacks", lost, {})
    check_weights(folder, load_hf_config(folder), vision=settings_of(folder))
    check_weights(copy, load_hf_config(copy))
    with pytest.raises(CheckpointError, match=f"lacks {lost}"):
        check_weights(copy, load_hf_config(copy), vision=settings_of(copy))
    other = without(folder, tmp_path / "differs", lost, {lost: torch.ones(5)})
    with pytest.raises(CheckpointError, match=rf"{lost} has the shape \[5\], config.json says \["):
        check_weights(other, load_hf_config(other), vision=settings_of(other))


def test_it_is_said_what_has_no_place(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Buffers of transformers 4, which are passed on."""
    importing._warn_once.cache_clear()
    folder = source / "gemma3_published"
    for _ in range(2):
        check_weights(folder, load_hf_config(folder), vision=settings_of(folder))
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "has no place for vision_tower.position_ids: exported as it is" in line


def test_other_eyes_are_refused_by_name(tmp_path: Path) -> None:
    config = wholes.wholes()["mistral3"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"a mistral3 with a pixtral cannot be given images. Supported are gemma3, "):
        check_weights(tmp_path, load_hf_config(tmp_path), vision=settings_of(tmp_path))


def test_a_configuration_with_all_fields_side_by_side_is_read(source: Path, tmp_path: Path) -> None:
    """As Qwen2.5-VL is published, with `type: mrope`."""
    nested = json.loads((source / "qwen2_5_vl" / "config.json").read_text())
    text = nested.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {**text, **nested, "rope_theta": rope["rope_theta"]}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    read, plain = load_hf_config(tmp_path), load_hf_config(source / "qwen2_5_vl")
    assert {key: read.rope_parameters[key] for key in rope} == plain.rope_parameters
    assert wholes.sizes_of_folder(tmp_path) == wholes.sizes_of_folder(source / "qwen2_5_vl") is not None


def test_sections_have_all_angles(source: Path, tmp_path: Path) -> None:
    fields = json.loads((source / "qwen2_5_vl" / "config.json").read_text())
    fields["text_config"]["rope_parameters"]["mrope_section"] = [1, 1, 1]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"mrope_section is not supported with the value \[1, 1, 1\]"):
        load_hf_config(tmp_path)


def test_text_asks_for_nothing_that_sees(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder without an eye is as good as before for data of text, and no line says what is not so of images."""
    shutil.copytree(source / "gemma3", tmp_path / "model")
    lost = next(name for name in tiny_hf.stored_tensors(source / "gemma3") if name.endswith("fc1.bias"))
    for file in (tmp_path / "model").glob("*.safetensors"):
        tensors = {name: tensor for name, tensor in load_file(file).items() if name != lost}
        save_file(tensors, file, metadata={"format": "pt"})
    index = tmp_path / "model" / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"].pop(lost)
        index.write_text(json.dumps(content))
    values = {
        "pretrained_checkpoint.restore_from_path": str(tmp_path / "model"),
        "exp_manager.explicit_log_dir": str(tmp_path / "log"),
        "model.data.data_prefix.train": "feedback.jsonl",
    }
    config, tokenizer = parse_config(values), SimpleNamespace()
    hf_config = hf_config_of(config, tokenizer)
    text, images = SimpleNamespace(has_images=False), SimpleNamespace(has_images=True)
    assert vision_for(config, hf_config, text, trains=True) is None
    assert "are not loaded" not in caplog.text
    with pytest.raises(CheckpointError, match="lacks .*bias"):
        vision_for(config, hf_config, images, trains=True)
    with pytest.raises(CheckpointError, match="lacks .*bias"):
        hf_config_of(parse_config(values | {"model.vision.train": "projector"}), tokenizer)
