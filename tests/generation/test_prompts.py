"""What `nemo-kto generate` makes of prompts, layouts and stop tokens."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_kto.commands.generate import _layout
from nemo_kto.data.tokens.rendering import CHAT, TokenizationSettings
from nemo_kto.data.tokens.tokenizer import load_tokenizer
from nemo_kto.errors import ConfigError, DataError
from nemo_kto.generation.prompts import prompt_tokens, read_prompts, stop_token_ids
from tests.integration.assets import make_model_folder, make_tokenizer

QUICKSTART = Path(__file__).parents[2] / "examples" / "nlp" / "kto" / "quickstart"
QUESTION = "On which continent is Malaysia?"


def test_prompts_are_those_of_training() -> None:
    """A text through the chat template, the same as messages, a text in a run's own template, and one as it is."""
    tokenizer = load_tokenizer(QUICKSTART / "model")
    messages = [{"role": "user", "content": QUESTION}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    cases = [(QUESTION, CHAT, chat), (messages, None, chat), (QUESTION, "Q: {prompt} A:", f"Q: {QUESTION} A:")]
    for prompt, template, expected in [*cases, (QUESTION, None, QUESTION)]:
        settings = TokenizationSettings(append_eod=False, prompt_template=template)
        (found,) = prompt_tokens([prompt], tokenizer, settings)
        assert found.tokens.tolist() == tokenizer(expected, add_special_tokens=False)["input_ids"], template


def test_a_prompt_that_cannot_be_used_is_named() -> None:
    with pytest.raises(DataError, match="Prompt 2 cannot be used"):
        prompt_tokens(["red", [{"role": "user"}]], make_tokenizer(), TokenizationSettings(append_eod=False))


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text(
        json.dumps({"prompt": "a", "label": True}) + "\n" + json.dumps({"prompt": [{"role": "user"}]}) + "\n"
    )
    assert read_prompts(file) == ["a", [{"role": "user"}]]
    file.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(DataError, match=r"asked.jsonl:2: field 'prompt' must be a text or a list of messages"):
        read_prompts(file)


def test_stop_tokens_are_of_the_first_folder_that_says_some(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    assert stop_token_ids(tokenizer, tmp_path, None) == {0}
    for name, ids in (("one", 5), ("several", [2, 3])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert stop_token_ids(tokenizer, tmp_path, tmp_path / "several", tmp_path / "one") == {0, 2, 3}
    assert stop_token_ids(tokenizer, None, tmp_path / "one") == {0, 5}


def test_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are shared with sequence parallelism; a wrong number of processes is refused."""
    dense, sparse = make_model_folder(tmp_path / "dense"), make_model_folder(tmp_path / "sparse", kind="experts")
    assert _layout(dense, tensor=1, pipeline=1).world_size == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    layout = _layout(dense, tensor=2, pipeline=1)
    assert (layout.world_size, layout.data, layout.sequence) == (4, 2, False)
    assert _layout(sparse, tensor=2, pipeline=2).sequence
    with pytest.raises(ConfigError, match="need 3 processes, or a multiple, and there are 4"):
        _layout(dense, tensor=3, pipeline=1)


def test_prompts_that_spell_messages(tmp_path: Path) -> None:
    """A table has them as text; what a file's prompts are is one for all of them."""
    messages = [{"role": "user", "content": "hi"}]
    cell = '"' + json.dumps(messages).replace('"', '""') + '"'
    file = tmp_path / "a.csv"
    file.write_text(f"prompt,label\n{cell},1\n{cell},0\n")
    assert read_prompts(file) == [messages, messages]
    file.write_text(f"prompt,label\n{cell},1\nhi,0\n")
    with pytest.raises(DataError, match=r"a\.csv: some prompts are messages as JSON and others text"):
        read_prompts(file)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "column", "words", "json column"])
def test_images_of_a_file_lie_beside_it(tmp_path: Path, kind: str) -> None:
    """However messages and images are written; names that are read are from the root, so that any folder will do."""
    image = tmp_path / "a.png"
    image.write_bytes(b"of what is in it nothing is asked here")
    text = {"type": "text", "text": QUESTION}
    messages = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, text]}]
    empty = [{"role": "user", "content": [{"type": "image"}, text]}]
    file = tmp_path / f"asked.{'csv' if kind in ('csv', 'column') else 'jsonl'}"
    if file.suffix == ".csv":
        row = (
            {"prompt": json.dumps(messages)} if kind == "csv" else {"prompt": json.dumps(empty), "images": '["a.png"]'}
        )
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, [*row])
            writer.writeheader()
            writer.writerow(row)
    else:
        rows: dict[str, Any] = {
            "jsonl": {"prompt": messages},
            "words": {"prompt": QUESTION, "image": "a.png"},
            "json column": {"prompt": json.dumps(empty), "images": ["a.png"]},
        }
        file.write_text(json.dumps(rows[kind]) + "\n")
    assert read_prompts(file) == [[{"role": "user", "content": [{"type": "image", "path": str(image)}, text]}]]
    image.unlink()
    with pytest.raises(DataError, match=rf"{file.name}:[12]: field '.*', image 1: {image} is not there"):
        read_prompts(file)
