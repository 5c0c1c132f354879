"""What messages about data tell people to set: each is provoked, followed to the letter, and has to help.

A message's settings are read out of it as a command line would read them. Afterwards the data is read, or the next
message is another one. No piece of advice in the source may be without a case here.
"""

import ast
import json
import logging
import re
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nemo_kto.config.compose import load_config
from nemo_kto.data.reading.paths import quoted
from nemo_kto.data.reading.records import FeedbackRecord, Image
from nemo_kto.data.reading.settling import SAMPLE
from nemo_kto.data.tokens import cache
from nemo_kto.data.tokens.pictures import ImageTokens
from nemo_kto.data.tokens.rendering import Renderer
from nemo_kto.errors import KTOError
from nemo_kto.runs import data as runs_data
from nemo_kto.runs.data import read_data
from tests.data.conftest import train_byte_level

SOURCE = Path(cache.__file__).resolve().parents[1]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@dataclass
class Case:
    """What provokes a message, and what comes of its advice.

    Attributes:
        rows: Of a JSON Lines file.
        says: Part of the message.
        after: For each setting that the message names, in order: part of the next message; "" if data is then read.
        fill: What a user puts in the places that the message leaves open, in order.
        given: Settings that are there before.
        prepare: Called with the fixture `monkeypatch` and the tokenizer, for what no file provokes.
    """

    rows: list[dict[str, Any]]
    says: str
    after: list[str] = field(default_factory=lambda: [""])
    fill: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    prepare: Any = None


TEXT = {"prompt": "hello", "completion": "world", "label": True}
SPELLED = TEXT | {"prompt": json.dumps([user("hello")])}
SPOKEN = {"prompt": [user("hello")], "completion": [assistant("world")], "label": True}
WITH_SYSTEM = SPOKEN | {"prompt": [{"role": "system", "content": "s"}, user("hello")]}
TRACE = {"input": [user("q")], "output": assistant("a"), "scores": [{"name": "user feedback", "value": 1}]}
RUN = {"inputs": {"input": "q"}, "outputs": {"output": "a"}, "feedback_stats": {"s": {"n": 1, "avg": 1.0}}}
SCORES = [*TRACE["scores"], {"name": "kind", "stringValue": "up", "dataType": "CATEGORICAL"}]
STATS = {"s": {"n": 1, "avg": 1.0}, "kind": {"n": 1, "avg": None, "values": {"up": 1}}}
MIXED_PROMPTS = "the prompt is a string, and in line"
LATE_PROMPT = ", where the rows before are"


def late(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of which the last ones come when it is settled how the file is read."""
    return [rows[0]] * SAMPLE + [*rows[1:]]


def no_fast_tokenizer(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)


def no_eos(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    tokenizer.eos_token = None


def no_system(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template


def an_image(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """A system message that shows an image, and nobody who looks at it."""
    content = [{"type": "image"}, {"type": "text", "text": "s"}]
    prompt = [{"role": "system", "content": content}, user("hello")]
    record = FeedbackRecord(prompt, [assistant("world")], True, "f", 1, images=(Image(data=b""),))
    monkeypatch.setattr(cache, "parse_chunk", lambda chunk: [record])
    monkeypatch.setattr(Renderer, "see", lambda *_: ())


def an_image_token(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """A model that takes images, for which the end token stands."""
    tokens = ImageTokens("no folder", "LlavaProcessor", tokenizer.eos_token_id)
    monkeypatch.setattr(runs_data, "model_folder", lambda config: Path("no folder"))
    monkeypatch.setattr(runs_data, "image_tokens", lambda folder: tokens)


def no_memory(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr(cache, "_FEW", 1)
    monkeypatch.setattr(cache.loky.ProcessPoolExecutor, "submit", start)


CASES = {
    "no format": Case(
        [{"what is asked": "hello", "a": "world", "vote.up": 1}],
        "fit no known format",
        fill=["what is asked", "a", "vote.up"],
    ),
    "no label": Case(
        [{"prompt": "hello", "completion": "world", "vote": "up"}], "field 'label' is missing.", fill=["vote"]
    ),
    "no prompt": Case(
        [{"q": "hello", "chosen_response": "a", "rejected_response": "b"}], "'prompt' is missing.", fill=["q"]
    ),
    "a pair with a question": Case([{"question": "q?", "chosen": "a", "rejected": "b"}], "If 'question' holds it"),
    "a score and no label": Case([{"prompt": "hello", "response": "world", "score": 5}], "To make labels of 'score'"),
    "a rating for a label": Case([TEXT | {"label": 5}], "To make labels of ratings", ["", "", ""]),
    "a rating for a label, as text": Case([TEXT | {"label": "4.5"}], "To make labels of ratings", ["", "", ""]),
    "a word for a label": Case([TEXT | {"label": 'so "so" \\'}], "To say what this one means", ["", ""]),
    "-1 and words": Case(
        [TEXT | {"label": -1}],
        "got -1. To say what this one means",
        ["", ""],
        given=["model.data.labels={desirable: [good]}"],
    ),
    "messages as JSON and text": Case([SPELLED, TEXT], "is the JSON of messages, and in line 2", [MIXED_PROMPTS, ""]),
    "messages as JSON, late": Case(late(TEXT, SPELLED), "is the JSON of messages, where", [LATE_PROMPT, ""]),
    "text among JSON, late": Case(late(SPELLED, TEXT), "is text, where the file's other rows", [LATE_PROMPT, ""]),
    "messages as Python writes them": Case([TEXT | {"prompt": "[{'role': 'user'}]"}], "as Python writes them"),
    "strings and messages": Case([TEXT, SPOKEN], MIXED_PROMPTS),
    "strings among messages, late": Case(late(SPOKEN, TEXT), "is a string, where the rows before"),
    "a system prompt, late": Case(late(TEXT, TEXT | {"system": "s"}), "is a system prompt, and the rows before"),
    "scores": Case([TRACE | {"scores": SCORES}], "there are 2 scores", ["", ""]),
    "feedback": Case([RUN | {"feedback_stats": STATS}], "there are 2 scores", ["", ""]),
    "no scores": Case([{"input": "hello", "output": "a", "thumb": [1]}], "field 'scores' is missing", fill=["thumb"]),
    "an input of other keys": Case([TRACE | {"input": {"what is asked": "q"}}], "holds the prompt, set"),
    "an output of other keys": Case([RUN | {"outputs": {"answer": "a"}}], "holds the response, set"),
    "an answer in JSON": Case(
        [RUN | {"outputs": '{"answer": "a"}', "inputs": "q"}], "for text what spells no messages", ["", ""]
    ),
    "several answers": Case([RUN | {"outputs": {"generations": [[{"text": "a"}, {"text": "b"}]]}}], "holds 2 answers"),
    "a preference with a sign": Case(
        [{"prompt": "hello", "output_A": "a", "output_B": "b", "label": -2}],
        "must be 1 where 'output_A' is the better one",
    ),
    "one bad record": Case([TEXT, TEXT | {"completion": ""}], "is empty; there is nothing to learn from. Set"),
    "bad records": Case([TEXT, *[TEXT | {"completion": ""}] * 2], "2 records cannot be used"),
    "a tokenizer that is not fast": Case(
        [{**SPOKEN, "prompt": [user("</s>")]}],
        "Use a fast tokenizer",
        prepare=no_fast_tokenizer,
    ),
    "no end token": Case([TEXT], "has no EOS token", prepare=no_eos),
    "a folder that cannot be written": Case(
        [TEXT], "Name another folder", fill=["{tmp}/other"], given=["model.data.cache_dir={tmp}/data.jsonl/tokens"]
    ),
    "a process that ended": Case(
        [TEXT], "for want of memory", fill=["1"], given=["model.data.tokenize_workers=2"], prepare=no_memory
    ),
    "strings for a chat model": Case([TEXT], "although the tokenizer has a chat template"),
    "special tokens in strings": Case(
        [TEXT | {"prompt": "</s>"}],
        "strings that spell special tokens",
        ["", "although the tokenizer has a chat template"],
    ),
    "a part that the template leaves out": Case(
        [SPOKEN | {"completion": [assistant("world") | {"reasoning_content": "why"}]}], "leaves its reasoning out"
    ),
    "a system prompt that the template refuses": Case(
        [WITH_SYSTEM], "It takes them without the system message", ["", ""], prepare=no_system
    ),
    "a system prompt that cannot be merged": Case(
        [SPOKEN | {"prompt": [user("hello"), {"role": "system", "content": "s"}]}],
        "no user's message follows",
        ["", ""],
        given=["model.data.system=merge_into_user"],
    ),
    "a system prompt and nothing else": Case(
        [SPOKEN | {"prompt": [{"role": "system", "content": "s"}]}],
        "no prompt is left",
        given=["model.data.system=drop"],
    ),
    "special tokens in an answer": Case(
        [SPOKEN | {"completion": [assistant("</s> world")]}], "that an assistant's message spells"
    ),
    "a string that spells an image": Case(
        [TEXT | {"prompt": "</s> hello"}], "its text spells one", prepare=an_image_token
    ),
    "an image in a message that is dropped": Case(
        [WITH_SYSTEM], "left out, has an image", given=["model.data.system=drop"], prepare=an_image
    ),
    "all too long": Case([TEXT], "Raise model.data.seq_length", fill=["64"], given=["model.data.seq_length=2"]),
}

REFUSED = {
    "model.data.fields={prompts: q}": "model.data.fields: unknown name 'prompts'; use some of prompt,",
    "model.data.fields={prompt: 3}": "model.data.fields: prompt=3 must be the name of a column, or a path.",
    "model.data.fields={prompt: 'a[b'}": "model.data.fields: prompt='a[b' is neither a column of",
    "model.data.desirable_if=good": "model.data.desirable_if='good' must be a comparison with a number",
    "model.data.labels={good: [x]}": "model.data.labels={'good': ['x']} must be the words of both kinds",
    "model.data.labels={desirable: [null]}": "model.data.labels: desirable holds a null",
    "model.data.labels={desirable: [x], undesirable: [X]}": "model.data.labels: 'X' is in both lists",
    "model.data.data_prefix.train={path: x, json_strings: maybe}": "model.data.json_strings='maybe' must be auto or",
    "model.data.data_prefix.train={path: x, split: 3}": "model.data.data_prefix: in {'path': 'x', ",
}
"""Settings that are impossible -> what is said of them: there is nothing to follow but the rule that they break."""
WORDS_AND_RATINGS = ["model.data.labels={desirable: [good]}", "model.data.desirable_if='>= 4'"]


def outcome(path: Path, settings: list[str], tokenizer: Any, log: pytest.LogCaptureFixture) -> str:
    """What a user is told who trains on a file: the error, or the warnings; "" if all is well."""
    log.clear()
    named = [
        "model.global_batch_size=1",
        f"model.data.data_prefix.train={path}",
        f"exp_manager.explicit_log_dir={path.parent}/log{len(settings)}",
    ]
    with log.at_level(logging.INFO):
        try:
            read_data(load_config([*named, *settings]), tokenizer, max_positions=4096, vocab_size=1 << 20)
        except KTOError as error:
            return str(error)
    return " ".join(message for message in log.messages if "model.data." in message)


_SETTING = re.compile(r"model\.data\.[a-z_]+(?:=(?:\{(?:[^{}\"]|\"(?:[^\"\\]|\\.)*\")*\}|'[^']*'|[^\s{'][^\s,;)]*))?")


def settings_in(message: str, fill: list[str]) -> list[str]:
    """The settings that a message names, with what the user has to say put in."""
    words = iter(fill)
    found = []
    for setting in _SETTING.findall(message):
        setting = setting.rstrip(".")
        setting = re.sub("<[a-z]+>", lambda _: quoted(next(words)), setting)
        found.append(setting if "=" in setting else f"{setting}={next(words)}")
    if len(found) > 1 and found[-1] == "model.data.on_bad_record=skip":  # ends every message about bad records
        found.pop()
    return found


@pytest.mark.parametrize("name", CASES)
def test_advice_helps(name, tmp_path, monkeypatch, caplog, write_jsonl):
    case = CASES[name]
    tokenizer = train_byte_level()
    path = write_jsonl(*case.rows)
    if case.prepare is not None:
        case.prepare(monkeypatch, tokenizer)
    given = [setting.replace("{tmp}", str(tmp_path)) for setting in case.given]
    message = outcome(path, given, tokenizer, caplog)
    SAID.append(message)
    assert case.says in message
    settings = settings_in(message, [word.replace("{tmp}", str(tmp_path)) for word in case.fill])
    assert len(settings) == len(case.after), settings
    for number, (setting, after) in enumerate(zip(settings, case.after, strict=True)):
        # as a command line has it, where a key that is given again replaces what stood there
        kept = [one for one in given if one.partition("=")[0] != setting.partition("=")[0]]
        padding = ["model.seed=1"] * number  # another folder for the log
        found = outcome(path, [*kept, setting, *padding], tokenizer, caplog)
        assert after in found and found != message, (setting, found)
        if not after:
            assert not found or found.startswith("train data: prompts and responses are strings"), found


SAID: list[str] = []
"""All messages that the tests above have provoked."""


@pytest.mark.parametrize("setting", REFUSED)
def test_impossible_settings_are_refused(setting, write_jsonl, caplog, tokenizer):
    message = outcome(write_jsonl(TEXT), [setting], tokenizer, caplog)
    SAID.append(message)
    assert REFUSED[setting] in message


def test_words_and_ratings_exclude_each_other(write_jsonl, caplog, tokenizer):
    path = write_jsonl(TEXT | {"label": "good"}, TEXT | {"label": "up"})
    message = outcome(path, WORDS_AND_RATINGS, tokenizer, caplog)
    SAID.append(message)
    assert "model.data.desirable_if which ratings are desirable; set one of the two." in message
    for setting in WORDS_AND_RATINGS:
        assert "one of the two" not in outcome(path, [setting], tokenizer, caplog)


def texts(tree: ast.AST) -> list[str]:
    """Strings of a module that are no docstrings, as patterns of what they become."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
        if part is not node
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in bare | inner:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            found.append(".*".join(re.escape(part) if part is not None else "" for part in parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"%\w", ".*", re.escape(node.value)))
    return found


def test_every_advice_in_the_source_has_a_case():
    """Runs behind the tests above, in the same process: they note what they were told."""
    if len(SAID) < len(CASES) + len(REFUSED) + 1:
        pytest.skip("only where all cases of this file have run")
    advice = [
        (file.relative_to(SOURCE), text)
        for file in sorted(SOURCE.rglob("*.py"))
        for text in texts(ast.parse(file.read_text(encoding="utf-8")))
        if "model\\.data\\." in text
    ]
    assert len(advice) >= 25
    without = [(str(file), text) for file, text in advice if not any(re.search(text, one, re.DOTALL) for one in SAID)]
    assert without == []
