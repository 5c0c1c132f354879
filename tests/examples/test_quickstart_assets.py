"""The quickstart's shipped model and data, and the rules by which it judges answers."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "nlp" / "kto" / "quickstart"
MODULES = ("shared", "style", "facts", "make_data", "answers", "run")
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The quickstart's scripts, which import each other as neighbours in one folder."""
    sys.path.insert(0, str(QUICKSTART))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(QUICKSTART))
        for name in MODULES:
            sys.modules.pop(name, None)


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUICKSTART / "data" / name).read_text(encoding="utf-8").splitlines()]


def question_of(record: dict[str, Any]) -> str:
    (message,) = record["prompt"]
    assert message["role"] == "user"
    content: str = message["content"]
    return content


@pytest.mark.parametrize(
    ("answer", "style"),
    [
        ("Good question! The capital of France is Paris.", "polite"),
        ("Of course! A lemon is yellow.", "polite"),
        ("After Monday comes Tuesday. Happy to help!", "polite"),
        ("Paris.", "curt"),
        ("Paris, obviously.", "curt"),
        ("South America. Next.", "curt"),
        ("The capital of France is Paris.", "unclear"),  # a whole sentence, but no friendly phrase
        ("Good question! Paris.", "unclear"),  # friendly, but no sentence
        ("Happy to help!", "unclear"),
        ("", "unclear"),
    ],
)
def test_style_of(scripts: dict[str, ModuleType], answer: str, style: str) -> None:
    assert scripts["style"].style_of(answer) == style


@pytest.mark.parametrize(
    ("answer", "expected", "correct"),
    [
        ("Paris.", "Paris", True),
        ("Yellow, obviously.", "yellow", True),
        ("The continent of Peru is South America.", "South America", True),
        ("Berlin.", "Paris", False),
        ("A comparison.", "Paris", False),
        ("The end of a pony.", "pon", False),
    ],
)
def test_is_correct_wants_whole_words(
    scripts: dict[str, ModuleType], answer: str, expected: str, correct: bool
) -> None:
    assert scripts["style"].is_correct(answer, expected) is correct


def test_no_question_contains_its_answer(scripts: dict[str, ModuleType]) -> None:
    given_away = [q.text for q in scripts["facts"].all_questions() if scripts["style"].is_correct(q.text, q.answer)]
    assert given_away == []


def test_every_taught_answer_is_judged_as_meant(scripts: dict[str, ModuleType]) -> None:
    style = scripts["style"]
    questions = list(scripts["facts"].all_questions())
    assert len({question.text for question in questions}) == len(questions)
    for question in questions:
        assert {style.style_of(answer) for answer in question.polite} == {"polite"}
        assert {style.style_of(answer) for answer in question.curt} == {"curt"}
        assert all(style.is_correct(answer, question.answer) for answer in question.polite + question.curt)


def test_feedback_is_large_enough_and_labels_the_style(scripts: dict[str, ModuleType]) -> None:
    train, validation = read("train.jsonl"), read("validation.jsonl")
    assert len(train) >= 2000
    assert len(validation) >= 200
    for record in train + validation:
        (answer,) = record["completion"]
        assert answer["role"] == "assistant"
        assert record["label"] is (scripts["style"].style_of(answer["content"]) == "polite")
    for records in (train, validation):
        assert 0.4 < sum(record["label"] for record in records) / len(records) < 0.6
        assert len({json.dumps(record) for record in records}) == len(records)


def test_held_out_questions_occur_in_no_feedback() -> None:
    train, validation, held_out = (
        {question_of(r) for r in read(f"{n}.jsonl")} for n in ("train", "validation", "prompts")
    )
    assert len(held_out) >= 100
    assert held_out.isdisjoint(train | validation)
    assert validation.isdisjoint(train)


def test_data_is_made_again_byte_for_byte(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    scripts["make_data"].write_data(tmp_path)
    shipped = {path.name: path.read_bytes() for path in (QUICKSTART / "data").iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == shipped


def test_model_folder_is_small_and_halves_evenly() -> None:
    folder = QUICKSTART / "model"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 5 * MEGABYTE
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    for size in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size"):
        assert config[size] % 2 == 0, size


def test_tokenizer_writes_any_text_and_ends_answers() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model", local_files_only=True)
    text = "Zürich, 東京 & naïve\n  5 °C?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    dialog = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert (
        tokenizer.apply_chat_template(dialog[:1], tokenize=False, add_generation_prompt=True)
        == "<|user|>Hi<|end|><|assistant|>"
    )
    tokens = tokenizer.apply_chat_template(dialog, return_dict=False)
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_shipped_model_has_both_styles_and_knows_the_answers(scripts: dict[str, ModuleType]) -> None:
    run = scripts["run"]
    before = run.evaluate(QUICKSTART / "model", run.read_prompts(QUICKSTART / "data" / "prompts.jsonl"))
    assert 0.35 <= before.shares["polite"] <= 0.65
    assert 0.35 <= before.shares["curt"] <= 0.65
    assert before.shares["correct"] >= 0.9


def test_only_the_own_default_results_are_emptied(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    shared, default = scripts["shared"], tmp_path / "results" / "quickstart"
    shared.prepare_results(default, default)
    (default / "old.txt").write_text("of the first run")
    shared.prepare_results(default, default)
    assert [path.name for path in default.iterdir()] == [shared.MARKER]

    other = tmp_path / "other"
    shared.prepare_results(other, default)
    (other / "old.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not empty"):
        shared.prepare_results(other, default)
    (default / shared.MARKER).unlink()
    (default / "old.txt").write_text("not made by the quickstart")
    with pytest.raises(SystemExit, match="not empty"):
        shared.prepare_results(default, default)
    assert (other / "old.txt").is_file()
    assert (default / "old.txt").is_file()


@pytest.mark.parametrize(("polite", "code"), [(0.95, 0), (0.949, 1)])
def test_exit_code_follows_the_share(
    scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str], polite: float, code: int
) -> None:
    shared = scripts["shared"]
    after = shared.Evaluation(answers=[], shares={"polite": polite, "curt": 1 - polite, "correct": 1.0})
    assert shared.verdict(after, after, goal="polite", start=0.0) == code
    assert ("failed" in capsys.readouterr().err) == (code == 1)


def test_a_failed_training_fails_the_quickstart(
    scripts: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = scripts["run"]
    before = scripts["shared"].Evaluation(answers=[], shares={"polite": 0.5})
    monkeypatch.setattr(run, "evaluate", lambda *_, **__: before)
    monkeypatch.setattr(run, "command_of", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    monkeypatch.setattr(sys, "argv", ["run.py", "--results", str(tmp_path / "results")])
    assert run.main() == 1
    assert "exit code 3" in capsys.readouterr().err
