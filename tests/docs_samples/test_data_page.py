"""docs/data.md says what is true: each sample is read as it is meant, each command prints what the page shows."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml

from nemo_kto import cli
from nemo_kto.config.schema import DataConfig, DataPrefixConfig
from nemo_kto.data.reading import containers, labels, sources
from nemo_kto.data.reading.chunks import read_feedback
from nemo_kto.data.reading.formats import FIELDS, FORMATS
from nemo_kto.data.reading.records import Image
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import parse_source
from tests.data.drawings import png

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- (sample|file): (\S+)((?: \S+)*) -->\n```json\n(.*?)```\n", re.DOTALL)
CONSOLE = re.compile(r"```console\n\$ nemo-kto (.*?)\n(.*?)```\n", re.DOTALL)


def blocks(kind):
    """File name -> (keys, text) of the blocks that a comment precedes."""
    found = {}
    for block_kind, name, keys, text in BLOCK.findall(PAGE):
        if block_kind == kind:
            assert name not in found
            found[name] = (dict(key.split("=", 1) for key in keys.split()), text)
    return found


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


CAT, DOG = "pictures/cat.png", "pictures/dog.png"
IMAGE = {"type": "image"}
IMAGES = {
    "image_parts.jsonl": [CAT, DOG],
    "image_column.jsonl": [CAT],
    "image_marks.jsonl": [CAT, DOG],
    "image_in_front.jsonl": [CAT],
}
"""File -> the images of its records."""


def text(content):
    return {"type": "text", "text": content}


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


INTEGERS = {"a": {"type": "integer"}, "b": {"type": "integer"}}
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": INTEGERS}},
}
PLAIN_ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
ADDITION = "Question: What is 2 + 2?\nAnswer:"
COLOUR = [user("Name a colour.")]
SUM = [user("2 + 2?")]
SHORT = [system("Be brief."), user("Hi."), assistant("Hello."), user("2 + 2?")]

# file -> (line, prompt, response, desirable, tools, variables for the chat template) of every record
EXPECTED = {
    "nemo_aligner.jsonl": [(1, ADDITION, " 4", True, None, None), (2, ADDITION, " 5", False, None, None)],
    "trl.jsonl": [
        (1, "The sky is", " blue.", True, None, None),
        (2, "The sky is", " green.", False, None, None),
    ],
    "trl_messages.jsonl": [
        (1, [user("What is 1 + 2?")], [call("add", a=1, b=2)], True, [ADD], {"enable_thinking": False}),
        (2, [system("Be brief."), user("Hi.")], [assistant("Hello.")], True, None, None),
    ],
    "halos.jsonl": [(1, COLOUR, [assistant("Seven.")], False, None, None)],
    "pairs.jsonl": [
        (1, "The sky is", " blue.", True, None, None),
        (1, "The sky is", " green.", False, None, None),
    ],
    "pairs_implicit.jsonl": [
        (1, "\n\nHuman: Hi\n\nAssistant:", " Hello, how are you?", True, None, None),
        (1, "\n\nHuman: Hi\n\nAssistant:", " Go away.", False, None, None),
    ],
    "pairs_implicit_messages.jsonl": [
        (1, [user("Hi")], [assistant("Hello.")], True, None, None),
        (1, [user("Hi")], [assistant("Go away.")], False, None, None),
    ],
    "nemo_aligner_pairs.jsonl": [(1, ADDITION, " 4", True, None, None), (1, ADDITION, " 5", False, None, None)],
    "halos_pairs.jsonl": [
        (1, COLOUR, [assistant("Seven.")], False, None, None),
        (1, COLOUR, [assistant("Blue.")], True, None, None),
    ],
    "helpsteer3.jsonl": [
        (1, COLOUR, [assistant("Seven.")], False, None, None),
        (1, COLOUR, [assistant("Blue.")], True, None, None),
    ],
    "signed_pairs.jsonl": [
        (1, "The sky is", " blue.", True, None, None),
        (1, "The sky is", " green.", False, None, None),
    ],
    "openai_dpo.jsonl": [
        (1, SUM, [assistant("4")], True, None, None),
        (1, SUM, [assistant("5")], False, None, None),
    ],
    "langfuse.jsonl": [(1, SUM, [assistant("4")], True, None, None)],
    "langfuse_page.jsonl": [(1, SUM, [assistant("5")], False, None, None)],
    "langsmith.jsonl": [
        (1, SUM, [assistant("4")], True, None, None),
        (2, SUM, [assistant("5")], False, None, None),
    ],
    "chatui.jsonl": [
        (1, [system("Be brief."), user("Hi.")], [assistant("Hello.")], True, None, None),
        (1, SHORT, [assistant("5")], False, None, None),
    ],
    "nested.jsonl": [(1, SUM, [assistant("4")], True, None, None)],
    "words.jsonl": [
        (1, "The sky is", " blue.", True, None, None),
        (2, "The sky is", " green.", False, None, None),
    ],
    "messages.jsonl": [(1, SHORT, [assistant("4")], True, None, None)],
    "sharegpt.jsonl": [
        (1, SHORT, [assistant("5")], False, None, None),
        (
            2,
            [user("What is 1 + 2?"), call("add", a=1, b=2), {"role": "tool", "content": "3"}],
            [assistant("It is 3.")],
            True,
            [PLAIN_ADD],
            None,
        ),
    ],
    "message_pairs.jsonl": [
        (1, [user("2 + 2?")], [assistant("4")], True, None, None),
        (1, [user("2 + 2?")], [assistant("5")], False, None, None),
    ],
    "alpaca.jsonl": [
        (
            1,
            [system("Be brief."), user("Hi."), assistant("Hello."), user("Sum up.\nIt rained all day.")],
            [assistant("Rain.")],
            True,
            None,
            None,
        )
    ],
    "alpaca_pairs.jsonl": [
        (1, [user("Say hi.")], [assistant("Hi!")], True, None, None),
        (1, [user("Say hi.")], [assistant("Why?")], False, None, None),
    ],
    "axolotl_argilla.jsonl": [
        (1, [system("Be brief."), user("Say hi.")], [assistant("Hi!")], True, None, None),
    ],
    "axolotl_intel.jsonl": [(1, [user("Say hi.")], [assistant("Why?")], False, None, None)],
    "axolotl_user_defined.jsonl": [
        (1, [system("Be brief."), user("Say hi.")], [assistant("Hi!")], True, None, None),
    ],
    "ratings.jsonl": [
        (1, "The sky is", " blue.", True, None, None),
        (2, "The sky is", " green.", False, None, None),
    ],
    "image_parts.jsonl": [
        (1, [user([text("Which is older,"), IMAGE, IMAGE])], [assistant("The dog.")], True, None, None)
    ],
    "image_column.jsonl": [(1, [user([IMAGE, text("Is it asleep?")])], [assistant("Yes.")], True, None, None)],
    "image_marks.jsonl": [
        (
            1,
            [user([IMAGE, text("Is it asleep? And this one? "), IMAGE])],
            [assistant("Both are.")],
            False,
            None,
            None,
        )
    ],
    "image_in_front.jsonl": [(1, [user([IMAGE, text("Is it asleep?")])], [assistant("Yes.")], True, None, None)],
    "weights.jsonl": [(1, "2+2?", " 4", True, None, None)],
}


def test_every_sample_is_known_here_and_every_format_has_one():
    samples = blocks("sample")
    assert {*samples} == {*EXPECTED}
    assert {keys["format"] for keys, _ in samples.values()} == {*FORMATS}


@pytest.mark.parametrize("detected", [True, False])
@pytest.mark.parametrize("name", EXPECTED)
def test_sample(name, detected, tmp_path):
    keys, text = blocks("sample")[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "pictures").mkdir()
    for file in (CAT, DOG):
        (tmp_path / file).write_bytes(png(1))
    detected = detected and "detect" not in keys
    records = read_feedback(
        [tmp_path / name],
        format="auto" if detected else keys.pop("format"),
        fields={key.removeprefix("fields."): column for key, column in keys.items() if key.startswith("fields.")},
        desirable_if=keys.get("desirable_if"),
        labels=yaml.safe_load(keys.get("labels", "null")),
    )
    found = [(r.line, r.prompt, r.response, r.desirable, r.tools, r.template_kwargs) for r in records]
    assert found == EXPECTED[name]
    wanted = [Image(file=str(tmp_path / file)) for file in IMAGES.get(name, [])]
    assert [[*record.images] for record in records] == [wanted] * len(records)
    assert [record.weight for record in records] == [2.0 if name == "weights.jsonl" else 1.0] * len(records)


@pytest.mark.parametrize(("arguments", "output"), CONSOLE.findall(PAGE), ids=["check", "show", "convert"])
def test_commands_print_what_is_shown(arguments, output, tmp_path, monkeypatch, capsys):
    for name, (_, text) in blocks("file").items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    code = 0
    try:
        cli.main(shlex.split(arguments))
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    found = [line.rstrip() for line in (printed.err + printed.out).splitlines()]
    assert found == output.splitlines()
    assert code == (1 if arguments.startswith("data check") else 0)


def test_what_convert_writes_is_read_as_the_same_records(tmp_path):
    ((name, (_, text)),) = blocks("file").items()
    lines = text.splitlines(keepends=True)
    (tmp_path / name).write_text("".join(lines[:-1]), encoding="utf-8")  # the last one is bad
    cli.main(["data", "convert", str(tmp_path / name), "-o", str(tmp_path / "out.jsonl")])
    before, after = read_feedback([tmp_path / name]), read_feedback([tmp_path / "out.jsonl"])
    assert len(before) == 10
    for old, new in zip(before, after, strict=True):
        assert dataclasses.replace(old, source="") == dataclasses.replace(new, source="")


def section(title):
    """What is below a heading, up to the next one."""
    (text,) = re.findall(rf"^#+ {title}\n(.*?)(?=^#+ )", PAGE, re.DOTALL | re.MULTILINE)
    return text


def test_labels_of_the_page_mean_what_it_says_and_are_all_there_are():
    rows = re.findall(r"^\| (`.*`) \| (`.*`) \|$", section("Labels"), re.MULTILINE)
    up = [label for row in rows for label in re.findall("`(.*?)`", row[0])]
    down = [label for row in rows for label in re.findall("`(.*?)`", row[1])]
    assert len(up) == len(down) == 11
    bare = {"true": True, "false": False, "1": 1, "0": 0}
    for written, desirable in [*((label, True) for label in up), *((label, False) for label in down)]:
        value = written[1:-1] if written.startswith('"') else bare[written]
        assert labels.parse_label(value, "label") is desirable
    assert {label.strip('"') for label in [*up, *down]} == {*labels._LABELS}


@pytest.mark.parametrize("label", [" Thumbs-Up ", "thumbs_up", "CHOSEN", "👍🏽", "👍️"])
def test_spellings_of_labels_that_do_not_matter(label):
    assert labels.parse_label(label, "label") is True


ELSEWHERE = {"data_prefix", "shuffle", "num_workers", "append_eod", "seq_length"}
"""Keys of model.data that only docs/configuration.md needs to explain."""


def test_every_key_is_on_the_page():
    keys = {field.name for field in dataclasses.fields(DataConfig)} - ELSEWHERE
    assert len(keys) >= 10
    assert not [key for key in keys if f"model.data.{key}" not in PAGE and f"`{key}`" not in PAGE]
    for split in dataclasses.fields(DataPrefixConfig):
        assert f"data_prefix.{split.name}" in PAGE


def test_every_key_of_an_entry_is_on_the_page_and_there_are_no_others():
    table = re.findall(r"^\| (`.*`) \| ", section("Files"), re.MULTILINE)
    named = {name for cell in table for name in re.findall("`([a-z_]+)`", cell)}
    assert named == {*sources._KINDS, "reader"} - {"path"}
    entries = yaml.safe_load(re.search(r"^'model\.data\.data_prefix\.train=(\[.*\])'$", PAGE, re.MULTILINE)[1])
    found = [parse_source(entry, RowReader()) for entry in entries]
    assert [(source.path, source.weight, source.max_records) for source in found] == [
        ("logs/*.jsonl", 2, None),
        ("trl-lib/kto-mix-14k", 1, 5000),
    ]


def test_every_kind_of_file_and_every_name_of_a_column_is_on_the_page():
    files = re.findall(r"^\| (`\..*`) \| ", section("Files"), re.MULTILINE)
    assert {name for cell in files for name in re.findall("`(.*?)`", cell)} == {*containers._READERS}
    sentence = re.search(r"says which column holds what: (.*?)\.", PAGE, re.DOTALL)[1]
    assert {*re.split(r",\s+", sentence)} == {*FIELDS}
