"""What `nemo-kto generate` makes of prompts, layouts and stop tokens."""

from __future__ import annotations

import json
from pathlib import Path

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
