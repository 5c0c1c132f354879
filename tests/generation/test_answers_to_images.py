"""Answers to prompts that show images equal transformers' whole model's, with and without kept keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_kto.errors import DataError
from nemo_kto.generation.decoding import Sampling, _check_prompts, generate
from nemo_kto.generation.rows import Prompt
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.hf_config import load_hf_config, whole_config
from nemo_kto.network.vision import VisionSettings
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.import_hf import import_hf
from tests.network import tiny_vision
from tests.network.tiny_vision import IMAGE, Shown

MODELS = ("llava_clip", "qwen2_5_vl", "gemma3")
LAYOUTS: dict[str, dict[str, Any]] = {
    "ONE": {},
    "TP2SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "VPP2": {"pipeline": 2, "virtual": 2},
    "CP2": {"context": 2},
    "DP2": {},
}
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision.make_folders(tmp_path_factory.mktemp("images"), MODELS)


def shown(name: str) -> list[Shown]:
    """Return the documents whose prompts are answered: with no image, one, two, and of text alone."""
    return [document for row in tiny_vision.documents(tiny_vision.configs()[name]) for document in row]


@torch.no_grad()
def expected(folder: Path, name: str) -> list[list[int]]:
    """Return transformers' most probable tokens, each time of the whole text so far."""
    model = tiny_vision.load(folder / name)
    of_model = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids"}
    answers = []
    for document in shown(name):
        tokens = document.prompt
        names = list(document.pictures[0].inputs) if document.pictures else []
        inputs = {key: torch.cat([each.inputs[key] for each in document.pictures]) for key in names}
        for _ in range(NEW_TOKENS):
            if document.pictures and name in of_model:
                inputs[of_model[name]] = (tokens == IMAGE)[None].int()
            # the answer may hold the token of images, which stands for none there
            logits = model(input_ids=tokens[None], **inputs).logits[0, -1].index_fill(0, torch.tensor(IMAGE), -1e9)
            tokens = torch.cat([tokens, logits.argmax()[None]])
        answers.append(tokens[len(document.prompt) :].tolist())
    return answers


def answers(folder: Path, layout: str) -> dict[tuple[str, bool], list[list[int]]]:
    """Return the answers of each model, with keys and values kept and not."""
    enable_cpu()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    division = Layout(world_size=dist.get_world_size(), **LAYOUTS[layout])
    parallel.initialize(division, seed=1)
    found = {}
    for name in MODELS:
        whole = whole_config(folder / name)
        assert whole is not None
        chunks = [
            build_gpt(load_hf_config(folder / name), division, chunk=chunk, vision=VisionSettings(config=whole))
            for chunk in range(division.virtual)
        ]
        for chunk in chunks:
            import_hf(chunk, folder / name)
        prompts = [
            Prompt(document.prompt, document.pictures, IMAGE if document.pictures else None)
            for document in shown(name)
        ]
        for use_cache in (True, False):
            found[name, use_cache] = generate(
                chunks,
                prompts,
                Sampling(max_new_tokens=NEW_TOKENS),
                stop_token_ids=frozenset[int](),
                layout=division,
                place=parallel.position(),
                use_cache=use_cache,
            )
        assert all(chunk.vision is None or not chunk.vision._kept for chunk in chunks), "images are kept for ever"
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_those_of_transformers(folders: Path, run_ranks: Callable[..., Any], layout: str) -> None:
    for found in run_ranks(answers, 1 if layout == "ONE" else 2, folders, layout):
        for name in MODELS:
            wanted = expected(folders, name)
            assert len({tuple(answer) for answer in wanted}) > 1, "answers that tell nothing"
            assert found[name, True] == wanted, (name, "kept")
            assert found[name, False] == wanted, (name, "computed anew")


def test_what_stands_for_images_needs_no_embedding() -> None:
    beyond = torch.tensor([5, 70, 70, 6])
    _check_prompts([Prompt(beyond, image_token_id=70)], 64, 64)
    with pytest.raises(DataError, match="Prompt 1 holds the token number 70, which the model lacks"):
        _check_prompts([Prompt(beyond, image_token_id=IMAGE)], 64, 64)


def test_a_prompt_for_people_has_one_token_for_each_image() -> None:
    tokens = torch.tensor([IMAGE, IMAGE, 8, IMAGE, IMAGE, IMAGE, 9, IMAGE])
    assert Prompt(tokens, image_token_id=IMAGE).in_brief.tolist() == [IMAGE, 8, IMAGE, 9, IMAGE]
    assert Prompt(tokens).in_brief.tolist() == tokens.tolist()
