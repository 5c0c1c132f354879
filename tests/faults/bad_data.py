"""Data files that cannot be used, as people have them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

GOOD: dict[str, Any] = {"prompt": "red sea", "completion": " green tree", "label": True}


def lines(*rows: Any) -> bytes:
    """Return JSON Lines: good rows around each that is given, which may be text."""
    texts = [row if isinstance(row, str) else json.dumps(row) for row in (GOOD, *rows, {**GOOD, "label": False})]
    return "".join(text + "\n" for text in texts).encode()


def but(**changes: Any) -> bytes:
    """Return JSON Lines with a row that is good but for some fields; None as a value leaves the field out."""
    return lines({name: value for name, value in {**GOOD, **changes}.items() if value is not ...})


def messages(*turns: Any) -> bytes:
    """Return JSON Lines with one conversation."""
    return (json.dumps({"messages": list(turns), "label": True}) + "\n").encode()


USER = {"role": "user", "content": "red"}
ASSISTANT = {"role": "assistant", "content": "sea"}
SENTENCE = "red green blue " * 40

CONVERSATIONS: dict[str, tuple[str, bytes, str]] = {
    "no messages": ("a.jsonl", messages(), "messages"),
    "messages that are text": ("a.jsonl", b'{"messages": "red", "label": true}\n', "messages"),
    "messages of texts": ("a.jsonl", messages("red", "sea"), "messages"),
    "a message without a role": ("a.jsonl", messages({"content": "red"}, ASSISTANT), "role"),
    "a message without content": ("a.jsonl", messages({"role": "user"}, ASSISTANT), "content"),
    "no answer": ("a.jsonl", messages(USER), "at least two messages"),
    "no question": ("a.jsonl", messages(ASSISTANT), "at least two messages"),
    "an answer that is empty": ("a.jsonl", messages(USER, {"role": "assistant", "content": ""}), "empty"),
    "a picture": (
        "a.jsonl",
        messages({"role": "user", "content": [{"type": "image_url", "image_url": "x.png"}]}, ASSISTANT),
        "image",
    ),
    "no answer at the end": ("a.jsonl", messages(ASSISTANT, USER), "assistant"),
}
"""The same of `FILES`, where the tokenizer has a chat template."""

FILES: dict[str, tuple[str, bytes, str]] = CONVERSATIONS | {
    # the file
    "an empty file": ("a.jsonl", b"", "holds no record"),
    "blank lines": ("a.jsonl", b"\n \n\n", "holds no record"),
    "an empty array": ("a.json", b"[]", "holds no record"),
    "only a header": ("a.csv", b"prompt,completion,label\n", "holds no record"),
    "no ending": ("data", lines(), "kind"),
    "a spreadsheet": ("a.xlsx", b"PK\3\4", "kind"),
    "text": ("a.txt", b"red\n", "kind"),
    "an archive": ("a.tar.gz", gzip.compress(b"red"), "kind"),
    "a zip": ("a.zip", b"PK\3\4", "kind"),
    "bytes that are no text": ("a.jsonl", lines()[:-3] + b"\xff\xfe\n", ":2"),
    "UTF-16": ("a.jsonl", lines().decode().encode("utf-16"), ":1"),
    "Latin-1": ("a.csv", "prompt,completion,label\ncafé,sea,true\n".encode("latin-1"), "UTF-8"),
    "no gzip by its name": ("a.jsonl.gz", lines(), "Not a gzipped file"),
    "gzip that ends early": ("a.jsonl.gz", gzip.compress(lines(*[GOOD] * 99))[:60], "ended before the end"),
    "gzip without the ending": ("a.jsonl", gzip.compress(lines()), ":1"),
    "no zstd": ("a.jsonl.zst", lines(), "ZSTD decompress failed"),
    "no parquet": ("a.parquet", lines(), "magic bytes"),
    "an empty parquet file": ("a.parquet", b"", "0 bytes"),
    "HTML of a login page": ("a.jsonl", b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", ":1"),
    "a pointer of Git LFS": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS"),
    "a pointer of Git LFS, parquet": (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "LFS",
    ),
    # JSON
    "broken JSON": ("a.jsonl", lines("{oops"), ":2"),
    "a line cut off": ("a.jsonl", lines()[:-20], ":2"),
    "single quotes": ("a.jsonl", lines("{'prompt': 'red'}"), ":2"),
    "a comma too many": ("a.jsonl", lines('{"prompt": "red",}'), ":2"),
    "two objects in a line": ("a.jsonl", lines(json.dumps(GOOD) * 2), ":2"),
    "an array in a line": ("a.jsonl", lines("[1, 2]"), ":2"),
    "a number in a line": ("a.jsonl", lines("7"), ":2"),
    "null in a line": ("a.jsonl", lines("null"), ":2"),
    "an array that does not end": ("a.json", b"[" + json.dumps(GOOD).encode(), "does not end"),
    "an array of texts": ("a.json", b'["red", "sea"]', "a JSON string"),
    "an object over several lines": ("a.json", json.dumps(GOOD, indent=1).encode(), "over several lines"),
    "an object of arrays": ("a.json", json.dumps({"data": [GOOD, GOOD]}).encode(), "'data'"),
    "deep nesting": ("a.jsonl", lines('{"prompt": ' + "[" * 100_000), ":2"),
    "deep nesting that ends": ("a.jsonl", lines('{"x": ' + "[" * 5000 + "]" * 5000 + "}"), ":2"),
    "deep nesting in an array": ("a.json", b"[" * 100_000, "recursion"),
    "a number of many digits": ("a.jsonl", lines('{"label": ' + "9" * 5000 + "}"), ":2"),
    "NaN": ("a.jsonl", lines('{"prompt": "red", "completion": "sea", "label": NaN}'), ":2"),
    "a name twice": ("a.jsonl", lines('{"prompt": "a", "prompt": "b", "completion": "c", "label": true}'), ":2"),
    "half a surrogate pair": ("a.jsonl", lines({**GOOD, "prompt": "\ud83d"}), ":2"),
    "a NUL byte in text": ("a.jsonl", lines().replace(b"sea", b"se\x00"), ":1"),
    # fields
    "no prompt": ("a.jsonl", but(prompt=...), "prompt"),
    "no completion": ("a.jsonl", but(completion=...), "completion"),
    "no label": ("a.jsonl", but(label=...), "label"),
    "a misspelt field": ("a.jsonl", but(label=..., lable=True), "label"),
    "fields nobody knows": ("a.jsonl", b'{"q": "red", "a": "sea"}\n', "q"),
    "an empty object": ("a.jsonl", b"{}\n{}\n", ":1"),
    "a prompt that is null": ("a.jsonl", but(prompt=None), "prompt"),
    "a prompt that is a number": ("a.jsonl", but(prompt=7), "prompt"),
    "a prompt that is empty": ("a.jsonl", but(prompt=""), "prompt"),
    "a completion that is null": ("a.jsonl", but(completion=None), "completion"),
    "a completion that is empty": ("a.jsonl", but(completion=""), "completion"),
    "a completion that is a list": ("a.jsonl", but(completion=["sea"]), "completion"),
    "a label that is null": ("a.jsonl", but(label=None), "label"),
    "a label that is a word": ("a.jsonl", but(label="maybe"), "maybe"),
    "a label that is 2": ("a.jsonl", but(label=2), "label"),
    "a label that is 0.5": ("a.jsonl", but(label=0.5), "label"),
    "a label that is a list": ("a.jsonl", but(label=[True]), "label"),
    "a pair without the rejected": ("a.jsonl", b'{"prompt": "red", "chosen": "sea"}\n', "rejected"),
    "ratings without a threshold": ("a.jsonl", b'{"prompt": "a", "completion": "b", "score": 4}\n', "label"),
    "conversations without a chat template": ("a.jsonl", messages(USER, ASSISTANT), "chat template"),
    # tables
    "a table without a header": ("a.csv", b"red,sea,true\ngreen,tree,false\n", "('red', 'sea', 'true')"),
    "a row that is too short": ("a.csv", b"prompt,completion,label\nred,sea\n", ":2"),
    "a row that is too long": ("a.csv", b"prompt,completion,label\nred,sea,true,7\n", ":2"),
    "semicolons": ("a.csv", b"prompt;completion;label\nred;sea;true\n", "columns are separated by commas"),
    "a quote that does not end": ("a.csv", b'prompt,completion,label\n"red,sea,true\n', "no valid CSV"),
    "a column twice": ("a.csv", b"prompt,prompt,completion,label\na,b,c,true\n", "prompt"),
    # nothing is left
    "all too long": ("a.jsonl", (json.dumps({**GOOD, "prompt": SENTENCE}) + "\n").encode() * 9, "seq_length"),
}
"""What is wrong -> name of the file, its content, and what the message has to say besides where it is."""


def parquet(file: Path, columns: dict[str, list[Any]]) -> Path:
    """Write a table."""
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def linked(file: Path) -> Path:
    """Make a link to itself."""
    file.symlink_to(file.name)
    return file


def pipe(file: Path) -> Path:
    """Make a pipe that nobody writes to."""
    os.mkfifo(file)
    return file


def saved_data_set(folder: Path, name: str) -> Path:
    """Make a folder with a file of those that `datasets` writes, and nothing else."""
    folder.mkdir()
    (folder / name).write_text("{}")
    return folder


PLACES: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "no such file": (lambda folder: folder / "none.jsonl", "no such file"),
    "no such folder": (lambda folder: folder / "none" / "a.jsonl", "no such file"),
    "an empty folder": (lambda folder: folder, "folder"),
    "a folder by a file's name": (lambda folder: _made(folder / "a.jsonl"), "a.jsonl"),
    "a link to itself": (lambda folder: linked(folder / "a.jsonl"), "a.jsonl"),
    "a link to nowhere": (lambda folder: _link(folder / "a.jsonl", folder / "gone"), "a.jsonl"),
    "a pipe": (lambda folder: pipe(folder / "a.jsonl"), "a.jsonl"),
    "a device": (lambda folder: _link(folder / "a.jsonl", Path("/dev/zero")), "a.jsonl"),
    "a name that is too long": (lambda folder: folder / ("a" * 300 + ".jsonl"), "aaa"),
    "an address": (lambda folder: "https://example.com/a.jsonl", "https://example.com/a.jsonl"),
    "a home that the shell did not fill in": (lambda folder: "~/none.jsonl", "none.jsonl"),
    "a data set whose parts are gone": (lambda folder: saved_data_set(folder / "s", "dataset_info.json"), "/s"),
    "a data set's index that is gone": (lambda folder: saved_data_set(folder / "s", "dataset_dict.json"), "/s"),
    "parquet without a label": (
        lambda folder: parquet(folder / "a.parquet", {"prompt": ["a"], "completion": ["b"]}),
        "label",
    ),
    "parquet with bytes": (
        lambda folder: parquet(folder / "a.parquet", {"prompt": [b"a\xff"], "completion": ["b"], "label": [True]}),
        "prompt",
    ),
    "parquet without rows": (
        lambda folder: parquet(folder / "a.parquet", {"prompt": [], "completion": [], "label": []}),
        "a.parquet",
    ),
}
"""What is wrong -> function of an empty folder that returns what is named as the data, and what is said."""


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _link(link: Path, target: Path) -> Path:
    link.symlink_to(target)
    return link
