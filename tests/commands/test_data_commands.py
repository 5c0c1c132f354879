"""`nemo-kto data`: what it prints, writes and returns, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nemo_kto.cli import main
from nemo_kto.data.reading.chunks import read_feedback
from tests.waiting import HANG

MODEL = Path(__file__).resolve().parents[2] / "examples" / "nlp" / "kto" / "quickstart" / "model"
ROWS = [
    {"prompt": "What is 2 + 2?", "completion": " 4", "label": True},
    {"prompt": "What is 2 + 2?", "completion": " 5", "label": False},
    {"prompt": "What is 3 + 3?", "completion": " 6", "label": True},
]


def write(file: Path, *rows: dict[str, Any] | str) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in this process; return (exit code, stdout)."""
    from nemo_kto import errors

    monkeypatch.setenv("COLUMNS", "200")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(errors, "_leave", leave)  # a real one ends this process

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = 0
        try:
            main(["data", *map(str, arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def test_check_prints_what_is_in_the_data(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *ROWS, ROWS[0])
    code, output, _ = run("check", path, "--tokenizer", MODEL, "--global-batch-size", "2")
    assert code == 0
    lines = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in output.splitlines() if "│" in line]
    table = {name: value for name, value in lines}
    assert table["samples"] == "4" and table["desirable / undesirable"] == "3 / 1"
    assert table["duplicates"] == "1"
    assert table["different prompts"] == "2, 1 of them with several samples (at most 3)"
    assert table["model.kto.undesirable_loss_weight"] == "2.25"  # 3 / 2.25 = 4/3


def test_check_fails_on_bad_records(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *ROWS, {**ROWS[0], "completion": ""}, "{", {**ROWS[0], "label": "good"})
    code, output, _ = run("check", path, "--tokenizer", MODEL)
    assert code == 1
    assert "3 bad records:" in output and f"{path}:4: field 'completion' is empty" in output
    assert f"{path}:6: field 'label' must be" in output

    code, output, _ = run("check", path, "--tokenizer", MODEL, "--json")
    report = json.loads(output)
    assert code == 1 and report["ok"] is False
    assert (report["statistics"]["bad"], report["statistics"]["empty_responses"]) == (3, 1)
    assert [bad["line"] for bad in report["bad_records"]] == [4, 5, 6]


def test_check_as_json(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *ROWS)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = sum(len(tokenizer.encode(row["prompt"] + row["completion"])) + 1 for row in ROWS)
    code, output, _ = run("check", path, "--tokenizer", MODEL, "--json")
    assert code == 0 and json.loads(output)["statistics"]["tokens"] == tokens
    code, output, _ = run("check", tmp_path / "none.jsonl", "--tokenizer", MODEL, "--json")
    assert code == 1 and "no such file" in json.loads(output)["error"]


def test_check_when_nothing_is_left(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *ROWS)
    code, output, _ = run("check", path, "--tokenizer", MODEL, "--seq-length", "2")
    assert code == 1 and "No sample is left" in output


def test_check_keeps_tokens_where_training_finds_them(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *ROWS)
    assert run("check", path, "--tokenizer", MODEL, "--cache-dir", tmp_path / "tokens")[0] == 0
    assert len(list((tmp_path / "tokens").glob("*/tokens.bin"))) == 1


def test_fields_and_ratings(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"q": "2 + 2?", "a": " 4", "stars": 5}, {"q": "2 + 2?", "a": " 5", "stars": 1})
    fields = ["--field", "prompt=q", "--field", "response=a", "--field", "label=stars", "--desirable-if", ">= 4"]
    code, output, _ = run("check", path, "--tokenizer", MODEL, "--json", *fields)
    found = json.loads(output)["statistics"]
    assert code == 0 and (found["desirable"], found["undesirable"]) == (1, 1)
    assert run("check", path, "--tokenizer", MODEL, "--field", "prompt")[0] == 1


def test_convert_and_read_again(run: Any, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [{"role": "user", "content": "hé\u2028"}, {"role": "assistant", "content": "yes"}]
    path = write(
        tmp_path / "a.jsonl",
        {"messages": messages, "label": 1, "tools": json.dumps(tools), "chat_template_kwargs": {"x": 1}},
        {"messages": messages, "label": "rejected", "weight": 0.5},
    )
    said = {"prompt": messages[:1], "chosen": messages[1], "rejected": "no"}
    pairs = write(tmp_path / "b.jsonl", said)
    out = tmp_path / "out.jsonl"
    code, output, _ = run("convert", path, pairs, "--output", out)
    assert code == 0 and output == f"Wrote 4 records to {out}\n"
    rows = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert rows[0] == {
        "prompt": messages[:1],
        "completion": messages[1:],
        "label": True,
        "tools": tools,
        "chat_template_kwargs": {"x": 1},
    }
    no = [{"role": "assistant", "content": "no"}]
    assert rows[3] == {"prompt": messages[:1], "completion": no, "label": False}
    before, after = read_feedback([path, pairs]), read_feedback([out])
    values = [
        [(r.prompt, r.response, r.desirable, r.tools, r.template_kwargs, r.weight) for r in found]
        for found in (before, after)
    ]
    assert values[0] == values[1]
    code, _, error = run("convert", path, "--output", out)
    assert code == 1 and "exists" in error


def test_convert_writes_one_kind_into_a_file(run: Any, tmp_path: Path) -> None:
    """A file with strings and messages could be read in two ways, and is refused when it is read."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    files = [write(tmp_path / "a.jsonl", *ROWS), write(tmp_path / "b.jsonl", {"messages": messages, "label": True})]
    out = tmp_path / "out.jsonl"
    code, _, error = run("convert", *files, "--output", out)
    assert code == 1 and f"{files[1]}:1: some records are strings and others messages" in error and not out.exists()
    code, _, _ = run("convert", *files, "--output", out, "--prompt-template", "chat")
    assert code == 0 and [type(record.prompt) for record in read_feedback([out])] == [list] * 4
    assert read_feedback([out])[0].response == [{"role": "assistant", "content": " 4"}]


def test_convert_says_that_text_spells_messages(run: Any, tmp_path: Path) -> None:
    text = json.dumps([{"role": "user", "content": "hi"}])
    path, out = write(tmp_path / "a.jsonl", {**ROWS[0], "prompt": text}, *ROWS), tmp_path / "out.jsonl"
    code, _, error = run("convert", path, "--output", out, "--json-strings", "text")
    assert code == 0 and error.startswith("1 records have text that spells messages as JSON; read the file with model")
    assert read_feedback([out], json_strings="text")[0].prompt == text


def test_paths_labels_and_json_in_strings(run: Any, tmp_path: Path) -> None:
    row = {"call": {"asked": json.dumps([{"role": "user", "content": "2 + 2?"}]), "said": ["4"]}}
    rows = [row | {"vote": {"word": word}} for word in ("Good", "like", "meh", "bad")]
    path, out = write(tmp_path / "a.jsonl", *rows), tmp_path / "out.jsonl"
    fields = ["--field", "prompt=call.asked", "--field", "response=call.said[0]", "--field", "label=vote.word"]
    words = ["--labels", "desirable=good,like", "--labels", "undesirable=bad", "--labels", "undesirable=meh"]
    code, output, _ = run("check", path, "--tokenizer", MODEL, "--json", *fields, *words)
    found = json.loads(output)["statistics"]
    assert code == 0 and (found["desirable"], found["undesirable"]) == (2, 2)
    assert run("convert", path, "-o", out, *fields, *words)[0] == 0
    assert {type(record.prompt) for record in read_feedback([out])} == {list}
    text = tmp_path / "text.jsonl"
    assert run("convert", path, "-o", text, *fields, *words, "--json-strings", "text")[0] == 0
    assert {type(record.prompt) for record in read_feedback([text], json_strings="text")} == {str}


def test_convert_with_bad_records(run: Any, tmp_path: Path) -> None:
    path, out = write(tmp_path / "a.jsonl", *ROWS, "{"), tmp_path / "out.jsonl"
    code, _, error = run("convert", path, "--output", out)
    assert code == 1 and f"{path}:4" in error and "--on-bad-record skip" in error and not out.exists()
    assert list(tmp_path.iterdir()) == [path]
    code, output, error = run("convert", path, "--output", out, "--on-bad-record", "skip")
    assert code == 0 and "skipped 1" in output and f"skipped: {path}:4" in error
    assert len(out.read_text().splitlines()) == 3


def test_show_prints_what_the_model_sees(run: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi </s>"}, {"role": "assistant", "content": "No.\nNever."}]
    path = write(tmp_path / "a.jsonl", *ROWS, {"messages": messages, "label": False})
    path.write_text(path.read_text().splitlines()[3])
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    code, output, _ = run("show", 1, path, "--tokenizer", MODEL)
    assert code == 0 and f"{path}:1, undesirable" in output
    assert prompt.replace("\n", "↵\n").rstrip() in output
    assert "No.↵\nNever." in output and tokenizer.eos_token in output.split("Never.")[1]


@pytest.mark.parametrize(("number", "message"), [("0", "counted from 1"), ("4", "no record 4"), ("3", "data.jsonl:3")])
def test_show_of_a_record_that_is_not_there(run: Any, tmp_path: Path, number: str, message: str) -> None:
    path = write(tmp_path / "data.jsonl", *ROWS[:2], "{")
    code, _, error = run("show", number, path, "--tokenizer", MODEL)
    assert code == 1 and message in error


def test_what_the_chat_template_leaves_out(run: Any, tmp_path: Path) -> None:
    """A part of an answer makes a bad record, or a note if one says so; a part of a prompt makes a note."""
    question = {"role": "user", "content": "1 + 2?"}  # the quickstart's template knows no tools and no reasoning
    thought = {"role": "assistant", "content": "3", "reasoning_content": "one and two"}
    call = {"role": "assistant", "content": "I add.", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    conversations = [question, thought], [question, call, question, {"role": "assistant", "content": "3"}]
    path = write(tmp_path / "a.jsonl", *({"messages": messages, "label": True} for messages in conversations))
    code, output, _ = run("check", path, "--tokenizer", MODEL)
    assert code == 1 and f"{path}:1: the chat template leaves its reasoning out of the answer" in output
    assert "a tool call of an earlier answer" in output and "responses end with" in output
    code, output, _ = run("check", path, "--tokenizer", MODEL, "--template-losses", "warn", "--json")
    report = json.loads(output)
    assert code == 0 and report["last_tokens"] == {"<|end|>": 2}
    assert report["notes"] == [
        {"kind": f"the chat template leaves out {part}", "records": 1, "example": f'{path}:{line}: "{text}"'}
        for part, line, text in (
            ("its reasoning", 1, "one and two"),
            ("a tool call of an earlier answer", 2, "add"),
        )
    ]
    code, output, _ = run("show", 1, path, "--tokenizer", MODEL, "--template-losses", "warn")
    assert code == 0 and "The response ends with <|end|>" in output
    assert f'Note: the chat template leaves out its reasoning, {path}:1: "one and two"' in output


def test_the_command_itself(tmp_path: Path) -> None:
    """A process of its own: quiet on stderr, and the exit code a shell sees."""
    path = write(tmp_path / "a.jsonl", *ROWS)
    command = [Path(sys.executable).with_name("nemo-kto"), "data", "check", path, "--tokenizer", MODEL]
    good = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
    assert (good.returncode, good.stderr) == (0, "") and "samples" in good.stdout
    write(path, *ROWS, "{")
    assert subprocess.run(command, capture_output=True, check=False, timeout=HANG).returncode == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--overlong", "keep"], "truncate_prompt_left"),
        (["--special-tokens", "yes"], "auto or text or control"),
        (["--prompt-template", "Q:"], "must have {prompt} in it"),
        (["--format", "xml"], "nemo_aligner"),
        (["--desirable-if", "good"], "'>= 4'"),
        (["--system", "merge"], "keep or merge_into_user or drop"),
        (["--template-losses", "skip"], "error or warn"),
        (["--field", "reply=x"], "'reply'"),
        (["--field", "label=x["], "neither a column"),
        (["--labels", "good"], "write KIND=WORDS"),
        (["--labels", "good=x"], "must be the words of both kinds"),
        (["--labels", "desirable=x", "--labels", "undesirable=X"], "in both lists"),
        (["--labels", "desirable=x", "--desirable-if", ">= 4"], "one of the two"),
        (["--json-strings", "yes"], "auto or messages or text"),
    ],
)
def test_impossible_options(run: Any, tmp_path: Path, option: list[str], message: str) -> None:
    path = write(tmp_path / "a.jsonl", *ROWS)
    code, _, error = run("check", path, "--tokenizer", MODEL, *option)
    assert code == 1 and error.startswith("error: ") and message in error


def test_special_tokens_that_stand_for_an_image_are_counted_not_shown():
    from nemo_kto.commands.data import _visible

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    user, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    tokens = [user, *[end] * 1300, user, user, user, *tokenizer("What", add_special_tokens=False)["input_ids"]]
    assert str(_visible(tokens, tokenizer, "cyan")) == "<|user|><|end|> x 1,300<|user|><|user|><|user|>What"
