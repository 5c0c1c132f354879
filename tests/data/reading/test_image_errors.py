"""What is wrong with images, each told in a sentence; and where images go, beside TRL."""

import base64
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_kto.data.reading.chunks import parse_chunk, read_chunks
from nemo_kto.data.reading.containers import Row
from nemo_kto.data.reading.conversations import checked_answer
from nemo_kto.data.reading.image_places import Listed
from nemo_kto.data.reading.records import BadRecord, RecordError
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.settling import SAMPLE
from nemo_kto.data.reading.sources import Source
from tests.data.drawings import png

REPOSITORY = Path(__file__).resolve().parents[3]
IMAGE = {"type": "image"}
PNG = base64.b64encode(png(1)).decode()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def error_of(row: dict[str, Any], tmp_path: Path) -> str:
    """What is said of a row in a file; a good one stands in the line before."""
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "folder").mkdir()
    good = row | {"prompt": "q", "completion": "a", "label": True, "images": None, "image": None}
    lines = [json.dumps({key: value for key, value in good.items() if value is not None}), json.dumps(row)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    records = [
        r for chunk in read_chunks(Source(str(tmp_path / "data.jsonl"), reader=CHAT), 9) for r in parse_chunk(chunk)
    ]
    (bad,) = [record for record in records if isinstance(record, BadRecord)]
    place = f"{tmp_path}/data.jsonl:2: "
    assert str(bad).startswith(place), bad
    return str(bad).removeprefix(place).replace(str(tmp_path), "HERE")


CHAT = RowReader(chat=True)
NEEDS = "must be the name of a file, a data URI, base64 or bytes, not a"
ADDRESS = "is an address, and training has no network: download the image, and name its file."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("b.png", "HERE/b.png is not there. Names are relative to the folder of the data."),
        ("./in/b.png", "HERE/in/b.png is not there. Names are relative to the folder of the data."),
        ("/none/b.png", "/none/b.png is not there."),
        ("file:///none/b%20c.png", "/none/b c.png is not there."),
        ("folder", "HERE/folder is no file. Names are relative to the folder of the data."),
        ("/dev/null", "/dev/null is no file."),
        ("a\0.png", "HERE/a\0.png is not there. Names are relative to the folder of the data."),
        ("\ud800.png", "HERE/\\ud800.png is not there. Names are relative to the folder of the data."),
        ("https://example.com/a.png", f'"https://example.com/a.png" {ADDRESS}'),
        ("HTTP://example.com/a.png", f'"HTTP://example.com/a.png" {ADDRESS}'),
        ("s3://bucket/a.png", f'"s3://bucket/a.png" {ADDRESS}'),
        ("zip://a.png::b.zip", f'"zip://a.png::b.zip" {ADDRESS}'),
        ("file://elsewhere/a.png", f'"file://elsewhere/a.png" {ADDRESS}'),
        ("", "is an empty string."),
        (" ", "is an empty string."),
        ("x" * 5000, "is neither the name of a file nor the base64 of an image."),
        (PNG[:-2], "is no base64 (Incorrect padding)."),
        (PNG[:40] + "*" + PNG[41:], "is no base64 (Only base64 data is allowed)."),
        ("data:image/png;base64,####", "is no base64 (Only base64 data is allowed)."),
        ("data:image/png;base64,ü", "is no base64 (string argument should contain only ASCII characters)."),
        ("data:image/png;base64,", "is empty."),
        ("data:image/png;base64", "is a data URI without base64; write data:image/png;base64,... ."),
        ("data:image/svg+xml,%3Csvg", "is a data URI without base64; write data:image/png;base64,... ."),
        ("data:application/pdf;base64,AAAA", 'is a data URI of type "application/pdf", and no image.'),
        (None, f"{NEEDS} null."),
        (3, f"{NEEDS} number."),
        (["a.png"], f"{NEEDS} list."),
        ({}, "is an object that holds no image."),
        ({"height": 3}, "is an object that holds no image."),
        ({"bytes": None, "path": None}, "is an object that holds no image."),
        ({"bytes": 3}, "must be bytes, or their base64, not a number."),
        ({"bytes": "####"}, "is no base64 (Only base64 data is allowed)."),
        ({"path": 3}, "must be the name of a file, not a number."),
        ({"path": PNG[:20]}, f"HERE/{PNG[:20]} is not there. Names are relative to the folder of the data."),
        (
            {"url": "a.png", "path": "a.png"},
            "is an object that says more than once where its image is, in 'url' and 'path'; keep one.",
        ),
    ],
)
def test_what_is_no_image(value, expected, tmp_path):
    row = {"prompt": "q", "completion": "a", "label": True, "images": ["a.png", value]}
    assert error_of(row, tmp_path) == f"field 'images', image 2: {expected}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "must be a list of images, or a single one, not a number."),
        (True, "must be a list of images, or a single one, not a boolean."),
        (
            "['a.png']",
            "is a string that is no JSON (Expecting value: line 1 column 2 (char 1)). Write lists and objects as JSON "
            "(json.dumps).",
        ),
    ],
)
def test_what_is_no_column_of_images(value, expected, tmp_path):
    row = {"prompt": "q", "completion": "a", "label": True, "images": value}
    assert error_of(row, tmp_path) == f"field 'images' {expected}"


def test_two_columns_of_images(tmp_path):
    row = {"prompt": "q", "completion": "a", "label": True, "images": ["a.png"], "image": "a.png"}
    assert error_of(row, tmp_path) == "field 'images' and 'image' both hold images; keep one of the two."


KIND = "field 'prompt', message 1: 'content' has a part of type"
ONE_EACH = "there must be one for each."


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([{"type": "image", "image": "b.png"}], "field 'prompt', image 2: HERE/b.png is not there."),
        ([{"type": "image", "base64": "##"}], "field 'prompt', image 2: is no base64 (Only base64 data is allowed)."),
        (
            [{"type": "image_url", "image_url": {"url": "https://a.com/b.png"}}],
            f"field 'prompt', image 2: \"https://a.com/b.png\" {ADDRESS}",
        ),
        (
            [{"type": "image", "source": {"type": "url", "url": "https://a.com/b.png"}}],
            f"field 'prompt', image 2: \"https://a.com/b.png\" {ADDRESS}",
        ),
        (
            [{"type": "image", "source": {"type": "file", "file_id": "f"}}],
            f'{KIND} "image" whose \'source\' is of type "file"; write the image\'s bytes as base64.',
        ),
        (
            [{"type": "input_image", "file_id": "f"}],
            f"{KIND} \"input_image\" whose 'file_id' names a file of a service; write the image's bytes.",
        ),
        ([{"type": "image_url"}], f'{KIND} "image_url" that holds no image.'),
        ([{"type": "input_image", "image_url": None}], f'{KIND} "input_image" that holds no image.'),
        ([{"type": "image_url", "image_url": {}}], f'{KIND} "image_url" that holds no image.'),
        ([{"type": "image_url", "image_url": {"uri": 1}}], f"{KIND} \"image_url\" whose 'image_url' has no 'url'."),
        (
            [{"type": "image", "image": "a.png", "url": "a.png"}],
            f"{KIND} \"image\" that says more than once where its image is, in 'image' and 'url'; keep one.",
        ),
        (
            [{"type": "image", "image": "a.png", "max_pixels": 9}],
            f"{KIND} \"image\" with 'max_pixels', which is not read: the model's preprocessor_config.json says it for "
            "all images.",
        ),
        ([{"type": "video", "video": "a.mp4"}], f'{KIND} "video"; only text and images are read.'),
        ([{"type": "input_audio", "input_audio": {}}], f'{KIND} "input_audio"; only text and images are read.'),
        (
            [IMAGE],
            "field 'prompt' has 1 part {\"type\": \"image\"} to be filled from 'images', which holds "
            f"0 images; {ONE_EACH}",
        ),
    ],
)
def test_bad_parts(parts, expected, tmp_path):
    prompt = [user([{"type": "image", "image": "a.png"}, text("q"), *parts])]
    found = error_of({"prompt": prompt, "completion": "a", "label": True}, tmp_path)
    assert found.removesuffix(" Names are relative to the folder of the data.") == expected


PART = '{"type": "image"}'


@pytest.mark.parametrize(
    ("prompt", "answer", "number", "expected"),
    [
        (
            [user([IMAGE, text("q"), IMAGE])],
            "a",
            1,
            f"field 'prompt' has 2 parts {PART} to be filled from 'images', which holds 1 image; {ONE_EACH}",
        ),
        (
            [user([{**IMAGE, "image": PNG}])],
            "a",
            1,
            f"field 'prompt' has 0 parts {PART} to be filled from 'images', which holds 1 image; {ONE_EACH}",
        ),
        (
            [user([{**IMAGE, "index": 1}, {**IMAGE, "index": 0}])],
            "a",
            2,
            "field 'prompt' has image 1 with 'index' 1; images are in the order of their parts.",
        ),
        ("<image> q", "a", 2, f"field 'images' holds 2 images, and the prompt has 1 mark <image>; {ONE_EACH}"),
        ("<image><image>", "a", 1, f"field 'images' holds 1 image, and the prompt has 2 marks <image>; {ONE_EACH}"),
        (
            "q",
            "a <image>",
            1,
            f"field 'images' holds 1 image, and the prompt has 0 marks <image> and the answer 1; {ONE_EACH}",
        ),
        (
            [user([text("q")])],
            "a",
            1,
            f"field 'images' holds 1 image, and nothing says where: put parts {PART} into the messages.",
        ),
        (
            [{"role": "tool", "content": "q"}],
            "a",
            2,
            f"field 'images' holds 2 images, and nothing says where: put parts {PART} into the messages.",
        ),
        (
            "q",
            [assistant([IMAGE, text("a")])],
            1,
            "field 'completion' has an image in the rated answer; images stand in the prompt only.",
        ),
        (
            "q",
            [assistant([{**IMAGE, "image": PNG}])],
            0,
            "field 'completion' has an image in the rated answer; images stand in the prompt only.",
        ),
    ],
)
def test_places_and_images_that_are_not_as_many(prompt, answer, number, expected, tmp_path):
    row = {"prompt": prompt, "completion": answer, "label": True, "images": ["a.png"] * number}
    assert error_of(row, tmp_path) == expected


@pytest.mark.parametrize("value", ["a.png", {"path": "a.png"}])
def test_a_relative_name_beside_nothing(value):
    """Of a data set of the hub."""
    row = Row("owner/name", 3, {"prompt": "q", "completion": "a", "label": True, "image": value})
    with pytest.raises(RecordError) as caught:
        RowReader().settle([row]).read(row)
    assert str(caught.value) == (
        "field 'image', image 1: \"a.png\" is relative, and owner/name is no file that it could lie beside; name it "
        "from the root."
    )


def test_images_that_come_when_strings_are_settled(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    row = {"prompt": "q", "completion": "a", "label": True}
    rows = [row] * SAMPLE + [{**row, "images": ["a.png"]}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    *_, last = [r for chunk in read_chunks(Source(str(tmp_path / "data.jsonl")), 99) for r in parse_chunk(chunk)]
    assert str(last).startswith(
        f"{tmp_path}/data.jsonl:1001: field 'images' holds images, and the rows before had none and are strings. A "
        "string may be a prompt as it stands, or what a user says: set model.data.prompt_template=chat"
    )


# Where images go, beside TRL

A, B = {"type": "image", "image": "a"}, {"type": "image", "image": "b"}
SYSTEM = {"role": "system", "content": "s"}
PLACES: list[tuple[list[dict[str, Any]], list[str], list[dict[str, Any]] | None]] = [
    ([user("q")], ["a"], [user([A, text("q")])]),
    ([SYSTEM, user("q"), assistant("x"), user("r")], ["a", "b"],
     [SYSTEM, user([A, B, text("q")]), assistant("x"), user("r")]),
    ([user("")], ["a"], [user([A, text("")])]),
    ([user([text("q"), IMAGE, text("r"), IMAGE])], ["a", "b"], [user([text("q"), A, text("r"), B])]),
    ([user([IMAGE, text("q")]), assistant("x"), user([text("r"), IMAGE])], ["a", "b"],
     [user([A, text("q")]), assistant("x"), user([text("r"), B])]),
    ([user([text("q"), B])], [], [user([text("q"), B])]),
    ([user([text("q"), B, IMAGE])], ["a"], [user([text("q"), B, A])]),
    # the first of the user's messages that is a string
    ([user([text("q")]), assistant("x"), user("r")], ["a"], [user("q"), assistant("x"), user([A, text("r")])]),
    ([user([text("q")])], ["a"], None),
    ([user([IMAGE, text("q")])], ["a", "b"], None),
    ([user([IMAGE, text("q")])], [], None),
]  # fmt: skip
"""Messages, images of a column, and the messages with both; None where there are not as many places as images."""


def ours(messages: list[dict[str, Any]], images: list[str]) -> Any:
    try:
        prompt, _ = checked_answer(messages, "a", names=("prompt", "completion"), images=Listed("images", images))
    except RecordError:
        return None
    shown = []
    for message in prompt:
        content = message["content"]
        if isinstance(content, list):
            content = [p | {"image": p["image"].value} if p["type"] == "image" else p for p in content]
        shown.append({**message, "content": content})
    return shown


@pytest.mark.parametrize(("messages", "images", "expected"), PLACES)
def test_places_by_hand(messages, images, expected):
    assert ours(messages, images) == expected


def trl() -> Any:
    """TRL's functions for data, of the environment that `make bench` makes."""
    found = [*REPOSITORY.glob(".venv-trl/lib/python3*/site-packages/trl/data_utils.py")]
    if not found:
        pytest.skip("TRL is not installed: make bench puts it into .venv-trl")
    spec = importlib.util.spec_from_file_location("trl_data_utils", found[0])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_places_are_those_of_trl():
    prepare = trl().prepare_multimodal_messages

    def joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """TRL makes lists of all content; ours are strings where there is no image."""
        return [
            {
                **m,
                "content": m["content"]
                if any(p["type"] == "image" for p in m["content"])
                else m["content"][0]["text"],
            }
            for m in messages
        ]

    for messages, images, expected in PLACES:
        try:
            found = joined(prepare(messages, images))
        except ValueError:
            found = None
        assert found == expected, messages
