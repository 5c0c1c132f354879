"""The example on pictures: its drawn data, its shipped model, and the rules by which it judges answers."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

VISION = Path(__file__).parents[2] / "examples" / "nlp" / "kto" / "vision"
NEIGHBOURS = ("shared", "style", "teaching")
MODULES = ("shapes", "make_data", "make_model", "answers", "run")
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The example's scripts and what they import from the quickstart's folder."""
    before = list(sys.path)
    sys.path.insert(0, str(VISION))
    try:
        yield {name: importlib.import_module(name) for name in (*MODULES, *NEIGHBOURS)}
    finally:
        sys.path[:] = before
        for name in (*MODULES, *NEIGHBOURS):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn data."""
    folder = tmp_path_factory.mktemp("vision") / "data"
    scripts["make_data"].write_data(folder)
    return folder


def records_of(data: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]


def picture_of(data: Path, record: dict[str, Any]) -> Path:
    (message,) = record["prompt"]
    image, text = message["content"]
    assert message["role"] == "user"
    assert (image["type"], text) == ("image", {"type": "text", "text": "Which colour is the circle?"})
    return data / image["image"]


def seen(scripts: dict[str, ModuleType], picture: Path) -> tuple[str, str]:
    """Return the colours of circle and square as the pixels have them: a square fills its bounding box."""
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    shapes = {}
    for name, colour in scripts["shapes"].COLOURS.items():
        rows, columns = np.nonzero((pixels == colour).all(axis=-1))
        if rows.size:
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert height == width >= 12
            shapes["square" if rows.size == height * width else "circle"] = name
    return shapes["circle"], shapes["square"]


def test_labels_say_what_the_pixels_show(scripts: dict[str, ModuleType], data: Path) -> None:
    train, validation = records_of(data, "train.jsonl"), records_of(data, "validation.jsonl")
    assert len(train) >= 1000 and len(validation) >= 64
    for record in train + validation:
        circle, square = seen(scripts, picture_of(data, record))
        (answer,) = record["completion"]
        assert answer == {"role": "assistant", "content": f"The circle is {circle if record['label'] else square}."}
    for records in (train, validation):
        assert 0.4 < sum(record["label"] for record in records) / len(records) < 0.6


def test_held_out_pictures_show_other_pairs_of_colours(scripts: dict[str, ModuleType], data: Path) -> None:
    held_out = records_of(data, "prompts.jsonl")
    assert len(held_out) >= 100
    for record in held_out:
        assert (record["circle"], record["square"]) == seen(scripts, picture_of(data, record))
    pairs = {
        name: [frozenset(seen(scripts, picture_of(data, record))) for record in records_of(data, f"{name}.jsonl")]
        for name in ("train", "validation", "prompts")
    }
    assert [len(set(found)) for found in pairs.values()] == [9, 3, 3]  # of 15
    assert len(set().union(*pairs.values())) == 15
    # either way round, equally often: the colour alone tells nothing
    circles = [record["circle"] for record in held_out]
    assert {circles.count(colour) for colour in scripts["shapes"].COLOURS} == {len(held_out) // 6}


def test_pictures_differ_in_places_and_sizes(scripts: dict[str, ModuleType]) -> None:
    pictures = {scripts["shapes"].Scene("red", "blue", key=str(key)).draw().tobytes() for key in range(100)}
    assert len(pictures) > 95


def test_data_is_made_again_byte_for_byte(scripts: dict[str, ModuleType], data: Path, tmp_path: Path) -> None:
    """By another process, in another folder: nothing in it depends on where it is."""
    command = [sys.executable, str(VISION / "make_data.py"), str(tmp_path / "again")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    for folder in (data, tmp_path / "again"):
        assert str(folder) not in (folder / "train.jsonl").read_text(encoding="utf-8")
    files = {path.relative_to(data): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(tmp_path / "again"): path.read_bytes()
        for path in (tmp_path / "again").rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("The circle is red.", True, False),
        ("Red.", True, False),
        ("The circle is blue.", False, True),
        ("A red circle and a blue square.", False, False),  # names both
        ("The circle is green.", False, False),
        ("The circle is reddish.", False, False),
        ("", False, False),
    ],
)
def test_answers_are_judged_by_the_colour_they_name(
    scripts: dict[str, ModuleType], answer: str, right: bool, wrong: bool
) -> None:
    scene = scripts["shapes"].Scene("red", "blue", key="")
    assert (scene.is_right(answer), scene.swapped().is_right(answer)) == (right, wrong)


def test_the_two_answers_of_feedback_are_judged_as_meant(scripts: dict[str, ModuleType]) -> None:
    for scene in scripts["shapes"].scenes("train", 50):
        right, wrong = scene.answers
        assert scene.is_right(right) and not scene.is_right(wrong) and scene.swapped().is_right(wrong)


def test_model_folder_is_small_and_halves_evenly() -> None:
    folder = VISION / "model"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2.5 * MEGABYTE
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["text_config"]["model_type"]) == ("llava", "llama")
    assert config["vision_config"]["model_type"] == "siglip_vision_model"
    for size in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size"):
        assert config["text_config"][size] % 2 == 0, size


def test_processor_needs_no_torchvision_and_has_the_model_s_sizes(scripts: dict[str, ModuleType], data: Path) -> None:
    """The processor that transformers finds in the folder gives what the model was made with."""
    from transformers import AutoConfig, AutoProcessor, LlavaProcessor

    processor = AutoProcessor.from_pretrained(VISION / "model", local_files_only=True, backend="pil")
    config = AutoConfig.from_pretrained(VISION / "model", local_files_only=True)
    assert isinstance(processor, LlavaProcessor) and type(processor.image_processor).__name__.endswith("Pil")
    assert processor.image_token_id == config.image_token_id
    picture = picture_of(data, records_of(data, "prompts.jsonl")[0])
    message = scripts["answers"].prompt_of(picture, "Which colour?")
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    assert text == "<|user|><image>Which colour?<|end|><|assistant|>"
    inputs = processor.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == config.image_seq_length == 16
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 127.5 - 1  # SigLIP's: mean and deviation 0.5
    np.testing.assert_allclose(inputs["pixel_values"][0].permute(1, 2, 0).numpy(), pixels, atol=1e-6)
    text_only = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text_only == "<|user|>Hi<|end|><|assistant|>"


def test_shipped_model_is_right_half_of_the_time(scripts: dict[str, ModuleType], data: Path) -> None:
    asked = records_of(data, "prompts.jsonl")
    pictures = [str(picture_of(data, record)) for record in asked]
    before = scripts["run"].evaluate(VISION / "model", pictures, asked)
    right, wrong = before.shares.values()
    assert 0.4 <= right <= 0.6 and 0.4 <= wrong <= 0.6
    assert right + wrong >= 0.95


def test_shipped_model_sees_which_colour_is_whose(scripts: dict[str, ModuleType], data: Path) -> None:
    """What it has not to learn from the feedback."""
    asked = records_of(data, "prompts.jsonl")[:60]
    prompts = [scripts["answers"].prompt_of(picture_of(data, record), "Describe the picture.") for record in asked]
    described = scripts["answers"].sample_answers(VISION / "model", prompts, seed=1)
    expected = [f"A {record['circle']} circle and a {record['square']} square." for record in asked]
    assert sum(map(str.__eq__, described, expected)) >= 0.9 * len(asked)
