"""Training of a model that sees images is that of its language model alone, and ends in a model that still sees."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, Gemma3Config, SiglipVisionConfig

from tests.distributed_harness import free_port
from tests.integration.assets import make_model_folder, read_series, settings, train_on_rank, write_feedback
from tests.network.tiny_hf import stored_tensors
from tests.weights import test_models_with_images

LORA = {
    "model__peft__peft_scheme": "lora",
    "model__peft__lora_tuning__adapter_dim": 4,
    "model__peft__lora_tuning__target_modules": ["all"],
}
SCHEMES: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}
LANGUAGE = "model.language_model."


def make_whole(folder: Path, text: Path) -> None:
    """Save a model with images whose language model is the one in the folder `text`."""
    whole = Gemma3Config(
        text_config=AutoConfig.from_pretrained(text),
        vision_config=SiglipVisionConfig(**test_models_with_images.EYES),
        mm_tokens_per_image=4,
        image_token_index=1,
        tie_word_embeddings=False,
    )
    language = stored_tensors(text)
    language = {name.replace("model.", LANGUAGE, 1): tensor for name, tensor in language.items()}
    test_models_with_images.make_folder(folder, whole, published=True, language=language)
    AutoTokenizer.from_pretrained(text).save_pretrained(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]) -> Path:
    """Return a folder with what training made of both models, in full and with adapters."""
    folder = tmp_path_factory.mktemp("whole")
    make_model_folder(folder / "text", kind="gemma3")
    make_whole(folder / "whole", folder / "text")
    write_feedback(folder / "train.jsonl", number=20, seed=1)
    for scheme, changes in SCHEMES.items():
        for model in ("text", "whole"):
            run = settings(
                folder,
                folder / f"{model}_{scheme}",
                pretrained_checkpoint__restore_from_path=str(folder / model),
                trainer__kto__max_steps=4,
                export__enabled=True,
                **changes,
            )
            run_ranks(train_on_rank, 1, free_port(), run)
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_series_is_that_of_the_language_model(root: Path, scheme: str) -> None:
    text, whole = (read_series(root / f"{model}_{scheme}") for model in ("text", "whole"))
    for name in ("train/loss", "train/kl", "train/rewards/margins", "train/grad_norm"):
        assert whole[name] == text[name] and len(whole[name]) == 4


def test_the_language_model_is_trained_and_the_rest_is_what_it_was(root: Path) -> None:
    before, after = stored_tensors(root / "whole"), stored_tensors(root / "whole_full" / "hf")
    alone = stored_tensors(root / "text_full" / "hf")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if name.startswith("language_model."):
            assert torch.equal(tensor, alone[name.removeprefix("language_model.")])
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_example_of_the_card_loads_it(root: Path, scheme: str) -> None:
    folder = root / f"whole_{scheme}" / "hf"
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    places = {"path/to/this/folder": str(folder), "path/to/the/base/model": str(root / "whole")}
    for shown, place in places.items():
        code = code.replace(shown, place)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]
    model = names["model"]
    if scheme == "lora":
        expected = load_file(folder / "adapter_model.safetensors")
        loaded = {name.replace(".default.", "."): value for name, value in model.named_parameters() if "lora_" in name}
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
    else:
        layer = model.model.language_model.layers[0].mlp.up_proj.weight
        assert torch.equal(layer, stored_tensors(folder)["language_model.model.layers.0.mlp.up_proj.weight"])
