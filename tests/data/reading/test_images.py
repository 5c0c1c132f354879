"""Images, however they are written, are the same images of the same records.

The ten conversations of `writings.py`, each with an image in front of its first question, in every spelling, format
and kind of file; what is expected is the conversations themselves and the images that were drawn.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from nemo_kto import cli
from nemo_kto.data.reading import chunks, containers
from nemo_kto.data.reading.chunks import parse_chunk, read_chunks, read_feedback
from nemo_kto.data.reading.data_sets import dataset_rows
from nemo_kto.data.reading.records import BadRecord, FeedbackRecord, Image
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import Source
from tests.data.drawings import BYTES, BYTES_PARTS, FILE_PARTS, FILES, data_uri, png
from tests.data.writings import (
    CASES,
    CONTAINERS,
    CONVERSATIONS,
    WRITINGS,
    Conversation,
    assistant,
    in_order_of,
)

Records = list[tuple[Any, Any, bool, Any]]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """An image for each of the conversations."""
    (tmp_path / "pictures").mkdir()
    found = [tmp_path / "pictures" / f"{number} ü.png" for number in range(len(CONVERSATIONS))]
    for number, file in enumerate(found):
        file.write_bytes(png(number))
    return found


def read(path: Path, reader: RowReader) -> list[FeedbackRecord | BadRecord]:
    return [record for chunk in read_chunks(Source(str(path), reader=reader), 7) for record in parse_chunk(chunk)]


def seen(records: list[FeedbackRecord | BadRecord], *, by_name: bool = False) -> Records:
    """Records with what is in their images, or with their names."""
    assert not [record for record in records if isinstance(record, BadRecord)], records

    def content(image: Image) -> Any:
        if by_name:
            return image.file
        return Path(image.file).read_bytes() if image.data is None else image.data

    return [(r.prompt, r.response, r.desirable, [*map(content, r.images)]) for r in records]


def with_image(c: Conversation) -> list[dict[str, Any]]:
    """The messages with the place for an image in front of what the user says first."""
    first = next(place for place, message in enumerate(c.messages) if message["role"] == "user")
    parts = [{"type": "image"}, {"type": "text", "text": c.messages[first]["content"]}]
    return [{**m, "content": parts} if place == first else m for place, m in enumerate(c.messages)]


def expected(conversations: list[Conversation], *, images: list[Any]) -> Records:
    return [
        (with_image(c), [assistant(text)], good, [images[CONVERSATIONS.index(c)]])
        for c in conversations
        for text, good in ((c.good, True), (c.bad, False))
    ]


PNGS = [png(number) for number in range(len(CONVERSATIONS))]


def with_column(rows: list[dict[str, Any]], conversations: list[Conversation], column: str, images: list[Any]) -> Any:
    """Rows with an image in a column of its own; a format has one or two of them for a conversation."""
    each = len(rows) // len(conversations)
    return [
        {**row, column: images[CONVERSATIONS.index(conversations[number // each])]} for number, row in enumerate(rows)
    ]


OF_CONTAINERS = {
    "data.jsonl": ("images", lambda file: [f"pictures/{file.name}"]),
    "crlf.jsonl": ("image", lambda file: f"pictures/{file.name}"),
    "array.json": ("images", lambda file: [data_uri(file)]),
    "packed.jsonl.gz": ("image", data_uri),
    "packed.jsonl.zst": ("images", lambda file: [{"path": str(file)}]),
    "data.parquet": ("images", lambda file: [{"bytes": file.read_bytes(), "path": file.name}]),
    "saved": ("image", lambda file: {"bytes": file.read_bytes(), "path": None}),
    "data.csv": ("images", lambda file: [f"pictures/{file.name}"]),
    "data.tsv.gz": ("image", lambda file: f"pictures/{file.name}"),
}
"""Kind of file -> a column, and what is written into it."""


@pytest.mark.parametrize("marked", [False, True], ids=["in front", "marked"])
@pytest.mark.parametrize(("name", "container"), CASES)
def test_a_column_of_images_in_every_format_and_kind_of_file(name, container, marked, files, tmp_path):
    """TRL's column, whose images stand in front; and LLaMA-Factory's, with a mark in the text."""
    writing = WRITINGS[name]
    conversations = [c for c in CONVERSATIONS if writing.fits(c)]
    marks = [dataclasses.replace(c, turns=["<image>" + c.turns[0], *c.turns[1:]]) for c in conversations]
    column, written = OF_CONTAINERS[container]
    rows = writing.write(marks if marked else conversations)
    rows = with_column(rows, conversations, column, [written(file) for file in files])
    CONTAINERS[container](rows, tmp_path / container)
    # a column of images makes messages of strings, so that nothing needs to be set
    found = read(tmp_path / container, RowReader(**writing.reader))
    assert seen(found) == in_order_of(writing, expected(conversations, images=PNGS))


OF_TEXT = {name for name in WRITINGS if "alpaca" in name or "axolotl" in name or "strings" in name}
OF_TEXT |= {"NeMo-Aligner", "NeMo-Aligner DPO", "ultrafeedback_binarized"}
"""Writings whose prompts are strings."""


def with_part(c: Conversation, part: Any) -> Conversation:
    return dataclasses.replace(c, turns=[[part, {"type": "text", "text": c.turns[0]}], *c.turns[1:]])


@pytest.mark.parametrize("name", [name for name in WRITINGS if name not in OF_TEXT])
def test_parts_of_messages_in_every_format(name, files, tmp_path):
    writing = WRITINGS[name]
    conversations = [
        with_part(c, {"type": "image", "image": data_uri(f)}) for c, f in zip(CONVERSATIONS, files, strict=True)
    ]
    CONTAINERS["data.jsonl"](writing.write(conversations), tmp_path / "data.jsonl")
    found = read(tmp_path / "data.jsonl", RowReader(**writing.reader))
    assert seen(found) == in_order_of(writing, expected(CONVERSATIONS, images=PNGS))


def in_image(write: Any) -> Any:
    return lambda file: {"type": "image", "image": write(file)}


PARTS = {name: in_image(write) for name, write in (FILES | BYTES).items()} | FILE_PARTS | BYTES_PARTS


@pytest.mark.parametrize("spelling", PARTS)
def test_parts_of_messages_in_every_spelling(spelling, files, tmp_path):
    conversations = [with_part(c, PARTS[spelling](file)) for c, file in zip(CONVERSATIONS, files, strict=True)]
    CONTAINERS["data.jsonl"](WRITINGS["TRL"].write(conversations), tmp_path / "data.jsonl")
    found = read(tmp_path / "data.jsonl", RowReader())
    assert seen(found) == expected(CONVERSATIONS, images=PNGS)
    if spelling in FILES | FILE_PARTS:
        assert seen(found, by_name=True) == expected(CONVERSATIONS, images=[str(file) for file in files])
    else:
        assert all(image.file is None for record in found for image in record.images)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("spelling", FILES | BYTES)
def test_a_column_in_every_spelling(spelling, single, files, tmp_path):
    values = [(FILES | BYTES)[spelling](file) for file in files]
    rows = WRITINGS["TRL"].write(CONVERSATIONS)
    rows = with_column(rows, CONVERSATIONS, "image", values if single else [[value] for value in values])
    CONTAINERS["data.jsonl"](rows, tmp_path / "data.jsonl")
    assert seen(read(tmp_path / "data.jsonl", RowReader())) == expected(CONVERSATIONS, images=PNGS)


@pytest.mark.parametrize("index", [False, True])
def test_places_of_parts_for_a_column(index, files, tmp_path):
    """TRL's other form; some data sets say which image of the column a part is."""
    part = {"type": "image", "index": 0, "text": None} if index else {"type": "image"}
    rows = WRITINGS["ms-swift"].write([with_part(c, part) for c in CONVERSATIONS])
    rows = with_column(rows, CONVERSATIONS, "images", [[data_uri(file)] for file in files])
    CONTAINERS["data.jsonl"](rows, tmp_path / "data.jsonl")
    assert seen(read(tmp_path / "data.jsonl", RowReader())) == expected(CONVERSATIONS, images=PNGS)


# Tables


def part_rows(files: list[Path], stored: Any) -> list[dict[str, Any]]:
    """Rows whose content is always a list of parts of one type, as a table needs it."""
    rows = []
    for c, file in zip(CONVERSATIONS, files, strict=True):
        messages = [{**m, "content": [{"type": "text", "text": m["content"], "image": None}]} for m in c.messages]
        first = next(m for m in messages if m["role"] == "user")
        first["content"].insert(0, {"type": "image", "text": None, "image": stored(file)})
        for text, good in ((c.good, True), (c.bad, False)):
            rows.append({"prompt": messages, "completion": [assistant(text)], "label": good})
    return rows


def test_parts_with_bytes_in_parquet(files, tmp_path):
    table = pyarrow.Table.from_pylist(part_rows(files, Path.read_bytes))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert seen(read(tmp_path / "a.parquet", RowReader())) == expected(CONVERSATIONS, images=PNGS)


TEXT = datasets.Value("string")
MESSAGES = [{"role": TEXT, "content": [{"type": TEXT, "text": TEXT, "image": datasets.Image()}]}]
ANSWER = [{"role": TEXT, "content": TEXT}]
FEATURES = {"prompt": MESSAGES, "completion": ANSWER, "label": datasets.Value("bool")}


@pytest.mark.parametrize("container", ["saved", "a.parquet"])
def test_features_of_images_inside_messages(container, files, tmp_path):
    rows = part_rows(files, lambda file: {"bytes": None, "path": str(file)})
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features(FEATURES))
    dataset.save_to_disk(tmp_path / container) if container == "saved" else dataset.to_parquet(tmp_path / container)
    assert seen(read(tmp_path / container, RowReader())) == expected(CONVERSATIONS, images=PNGS)


@pytest.mark.parametrize("feature", [datasets.Image(), [datasets.Image()], datasets.Sequence(datasets.Image())])
def test_nothing_of_a_saved_data_set_is_decoded(feature, tmp_path):
    """What is no image is found by who opens it, and a relative name is beside the data set's own files."""
    many = not isinstance(feature, datasets.Image)
    (tmp_path / "saved" / "in").mkdir(parents=True)
    (tmp_path / "saved" / "in" / "b.png").write_bytes(b"no image")
    values = [{"bytes": b"no image either", "path": "a.png"}, {"bytes": None, "path": "in/b.png"}]
    rows = [{"prompt": "q", "completion": "a", "label": True, "images": [v] if many else v} for v in values]
    features = {"prompt": TEXT, "completion": TEXT, "label": datasets.Value("bool"), "images": feature}
    # as an Arrow file has it: saving would look for the files
    stored = pyarrow.Table.from_pylist(rows, schema=datasets.Features(features).arrow_schema)
    dataset = datasets.Dataset(stored)
    found = [row.values["images"] for row in dataset_rows(dataset, "d")]
    wanted = [values[0], {"path": "in/b.png"}]
    assert found == ([[value] for value in wanted] if many else wanted)
    reader = RowReader().settle([*dataset_rows(dataset, "d")])
    images = [reader.read(row)[0].images for row in dataset_rows(dataset, str(tmp_path / "saved"))]
    assert images == [(Image(data=b"no image either"),), (Image(file=str(tmp_path / "saved" / "in" / "b.png")),)]


def test_sounds_of_a_data_set_are_refused_by_name_and_not_decoded():
    features = {"prompt": TEXT, "completion": TEXT, "label": datasets.Value("bool"), "audios": [datasets.Audio()]}
    row = {"prompt": "q", "completion": "a", "label": True, "audios": [{"bytes": b"wav", "path": None}]}
    stored = pyarrow.Table.from_pylist([row], schema=datasets.Features(features).arrow_schema)
    (found,) = dataset_rows(datasets.Dataset(stored), "d")
    (bad,) = parse_chunk(chunks.Chunk(RowReader().settle([found]), [found]))
    assert str(bad) == "d:1: field 'audios' cannot be trained on; only text and images are read."


def test_large_images_are_read_a_few_at_a_time(files, tmp_path, monkeypatch):
    rows = with_column(WRITINGS["TRL"].write(CONVERSATIONS), CONVERSATIONS, "image", PNGS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    whole = seen(read(tmp_path / "a.parquet", RowReader()))
    assert whole == expected(CONVERSATIONS, images=PNGS)
    monkeypatch.setattr(containers, "_MOST_BYTES", 1000)
    monkeypatch.setattr(chunks, "_MOST_HELD", 300)
    for name in ("a.parquet", "saved"):
        found = [*read_chunks(Source(str(tmp_path / name)), 7)]
        assert {len(chunk.rows) for chunk in found} <= {1, 2, 3} and len(found) > 6
        assert seen([record for chunk in found for record in parse_chunk(chunk)]) == whole


# Several images, and other rows


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


IMAGE = {"type": "image"}


def one(row: dict[str, Any], tmp_path: Path) -> FeedbackRecord:
    (tmp_path / "one.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (record,) = read_feedback([tmp_path / "one.jsonl"])
    return record


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}


def test_images_in_every_turn_and_in_results_of_tools(files, tmp_path):
    own = [{"type": "image", "image": str(file)} for file in files]
    messages = [
        {"role": "system", "content": [text("s"), text("t")]},
        user([text("a"), own[0], own[1], text("b ")]),
        {"role": "assistant", "content": [own[2], "said"]},
        user("c"),
        CALL,
        {"role": "tool", "content": [text("found"), own[3]]},
    ]
    record = one({"prompt": messages, "completion": [assistant([text("x"), text("y")])], "label": True}, tmp_path)
    assert record.prompt == [
        {"role": "system", "content": "st"},
        user([text("a"), IMAGE, IMAGE, text("b ")]),
        {"role": "assistant", "content": [IMAGE, text("said")]},
        user("c"),
        CALL,
        {"role": "tool", "content": [text("found"), IMAGE]},
    ]
    assert record.response == [assistant("xy")]
    assert [image.file for image in record.images] == [*map(str, files[:4])]


def test_images_of_parts_and_of_a_column_are_in_the_order_of_their_parts(files, tmp_path):
    own = {"type": "image", "path": str(files[0])}
    messages = [user([IMAGE, own, text("q")]), assistant("a"), user([text("r"), IMAGE])]
    row = {"prompt": messages, "completion": "b", "label": True, "images": [str(files[1]), str(files[2])]}
    record = one(row, tmp_path)
    assert [image.file for image in record.images] == [str(files[n]) for n in (1, 0, 2)]
    assert record.prompt == [user([IMAGE, IMAGE, text("q")]), assistant("a"), user([text("r"), IMAGE])]


def test_marks_anywhere_in_the_prompt(files, tmp_path):
    names = [str(file) for file in files[:4]]
    turns = [("system", "See <image>."), ("human", "<image>a<image>\nb"), ("gpt", "c"), ("human", "d <image>")]
    row = {"conversations": [{"from": f, "value": v} for f, v in [*turns, ("gpt", "e <image>")]], "kto_tag": True}
    record = one(row | {"images": names}, tmp_path)
    assert record.prompt == [
        {"role": "system", "content": [text("See "), IMAGE, text(".")]},
        user([IMAGE, text("a"), IMAGE, text("\nb")]),
        assistant("c"),
        user([text("d "), IMAGE]),
    ]
    assert record.response == [assistant("e <image>")]  # all images are in the prompt, so this is what was said
    assert [image.file for image in record.images] == names


def test_a_mark_is_text_where_there_is_no_image_or_where_parts_say_where_images_are(files, tmp_path):
    row = {"prompt": [user("What is <image>?")], "completion": "A tag: <image>.", "label": True}
    for nothing in ({}, {"images": []}, {"image": None}, {"images": "", "image": {}}):
        record = one(row | nothing, tmp_path)
        assert record.prompt == row["prompt"] and record.images == ()
        assert record.response == [assistant("A tag: <image>.")]
    parts = [text("What is <image>?"), {"type": "image", "path": str(files[0])}]
    record = one(row | {"prompt": [user(parts)]}, tmp_path)
    assert record.prompt == [user([parts[0], IMAGE])] and len(record.images) == 1


def test_rows_of_text_between(files, tmp_path):
    """One column of images makes messages of all strings of a file; a file of text alone has strings."""
    rows = [{"prompt": "q", "completion": "a", "label": True, "images": images} for images in ([], [str(files[0])])]
    CONTAINERS["data.jsonl"](rows, tmp_path / "data.jsonl")
    plain, shown = read_feedback([tmp_path / "data.jsonl"])
    assert (plain.prompt, plain.images) == ([user("q")], ())
    assert shown.prompt == [user([IMAGE, text("q")])] and shown.images == (Image(file=str(files[0])),)
    CONTAINERS["data.jsonl"](rows[:1], tmp_path / "data.jsonl")
    assert read_feedback([tmp_path / "data.jsonl"])[0].prompt == "q"


def test_a_pair_shares_its_images(files, tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "images": [str(files[0]), str(files[1])]}
    (tmp_path / "pair.jsonl").write_text(json.dumps(row), encoding="utf-8")
    good, bad = read_feedback([tmp_path / "pair.jsonl"])
    assert good.prompt == bad.prompt == [user([IMAGE, IMAGE, text("q")])]
    assert good.images == bad.images == tuple(Image(file=str(file)) for file in files[:2])


def test_names_of_files(files, tmp_path, monkeypatch):
    """Relative to the file that names them, wherever one starts from; `~` is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    below = tmp_path / "data"
    below.mkdir()
    (below / "b.png").write_bytes(png(1))
    CONTAINERS["data.jsonl"](
        [
            {"prompt": "q", "completion": "a", "label": True, "images": [name]}
            for name in ("b.png", f"../pictures/{files[0].name}", f"~/pictures/{files[1].name}", "file:b.png")
        ],
        below / "a.jsonl",
    )
    wanted = [below / "b.png", below / ".." / "pictures" / files[0].name, files[1], below / "b.png"]
    for folder, path in ((tmp_path, "data/a.jsonl"), (below, "a.jsonl"), (tmp_path, "data"), (below, "*.jsonl")):
        monkeypatch.chdir(folder)
        found = read(Path(path), RowReader())
        assert seen(found, by_name=True) == [
            ([user([IMAGE, text("q")])], [assistant("a")], True, [str(file)]) for file in wanted
        ]


def test_a_file_whose_name_is_base64_of_an_image_too(tmp_path):
    """A name that is there is that file's."""
    name = "iVBORw0KGgoAAAANSUhEUgAA"  # what the base64 of a PNG file begins with
    (tmp_path / name).write_bytes(png(3))
    assert one({"prompt": "q", "completion": "a", "label": 1, "image": name}, tmp_path).images == (
        Image(file=str(tmp_path / name)),
    )


def test_images_of_a_field_of_another_name(files, tmp_path):
    row = {"prompt": "q", "completion": "a", "label": True, "shown": {"first": str(files[0])}, "image": 3}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (record,) = read_feedback([tmp_path / "a.jsonl"], fields={"images": "shown.first"})
    assert record.images == (Image(file=str(files[0])),)
    (record,) = read_feedback([tmp_path / "a.jsonl"], fields={"images": "none"})
    assert record.images == () and record.prompt == "q"


# Writing, and functions of other people


def test_a_record_as_a_row_reads_back_to_itself(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = (Image(file=str(files[0])), Image(data=png(1)), Image(data=b"of no known kind"))
    prompt = [user([IMAGE, text("<image>"), IMAGE]), assistant("a"), user([IMAGE])]
    record = FeedbackRecord(prompt, [assistant("b")], True, f"{tmp_path}/one.jsonl", 1, images=images)
    assert record.row()["images"] == [
        str(files[0]),
        data_uri(files[1]),
        "data:application/octet-stream;base64,b2Ygbm8ga25vd24ga2luZA==",
    ]
    assert one(record.row(), tmp_path) == record
    relative = dataclasses.replace(record, images=(Image(file=f"pictures/{files[0].name}"), *images[1:]))
    assert one(relative.row(), tmp_path) == record


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (png(0), "png"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "jpeg"),
        (b"GIF89a\1\0\1\0", "gif"),
        (b"RIFF\x24\0\0\0WEBPVP8 ", "webp"),
        (b"BM\x3a\0\0\0\0\0\0\0\x36\0", "bmp"),
        (b"II*\0\x08\0\0\0", "tiff"),
        (b"MM\0*\0\0\0\x08", "tiff"),
    ],
)
def test_kinds_of_images_by_which_bare_base64_is_told_from_a_name(data, kind, tmp_path):
    record = FeedbackRecord([user([IMAGE])], [assistant("a")], True, "f", 1, images=(Image(data=data * 9),))
    (uri,) = record.row()["images"]
    assert uri.startswith(f"data:image/{kind};base64,")
    row = {"prompt": [user([{"type": "image", "image": uri.partition(",")[2]}])], "completion": "a", "label": True}
    assert one(row, tmp_path).images == record.images


def test_an_image_is_a_file_or_bytes():
    for given in ({}, {"file": "a.png", "data": b"x"}):
        with pytest.raises(ValueError, match="either a file or data"):
            Image(**given)


def test_convert_keeps_images(files, tmp_path, capsys):
    rows = with_column(WRITINGS["LLaMA-Factory openai"].write(CONVERSATIONS), CONVERSATIONS, "images", PNGS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    named = with_column(
        WRITINGS["TRL"].write(CONVERSATIONS), CONVERSATIONS, "image", [f"pictures/{f.name}" for f in files]
    )
    CONTAINERS["data.jsonl"](named, tmp_path / "b.jsonl")
    inputs = [tmp_path / "a.parquet", tmp_path / "b.jsonl"]
    (tmp_path / "elsewhere").mkdir()
    output = tmp_path / "elsewhere" / "out.jsonl"
    cli.main(["data", "convert", *map(str, inputs), "-o", str(output)])
    assert "Wrote 40 records" in capsys.readouterr().out
    before, after = read_feedback(inputs), read_feedback([output])
    for old, new in zip(before, after, strict=True):
        assert new == dataclasses.replace(old, source=new.source, line=new.line)
    assert {image.file is None for record in after[:20] for image in record.images} == {True}
    assert {image.data is None for record in after[20:] for image in record.images} == {True}


def test_records_of_a_function(files, tmp_path):
    """A mapping with bytes, and a record; both are found again by what they hold."""

    def function(number: int) -> Any:
        def records(path: str) -> Any:
            yield {"prompt": "q", "response": "a", "label": 1, "image": bytearray(png(number))}
            yield {"prompt": "q", "response": "a", "label": 1, "images": [memoryview(png(number))]}
            yield {"prompt": "q", "response": "a", "label": 1, "images": [files[0].name]}
            yield FeedbackRecord(
                [user([text("q"), IMAGE])], [assistant("a")], True, path, 4, images=(Image(data=png(number)),)
            )

        return records

    from nemo_kto.data.reading.parts import content_digest

    sources = [Source(str(tmp_path / "pictures"), function=function(number)) for number in (5, 6)]
    found = [record for chunk in read_chunks(sources[0], 3) for record in parse_chunk(chunk)]
    front, behind = [user([IMAGE, text("q")])], [user([text("q"), IMAGE])]
    assert seen(found) == [
        (front, [assistant("a")], True, [png(5)]),
        (front, [assistant("a")], True, [png(5)]),
        (front, [assistant("a")], True, [png(0)]),
        (behind, [assistant("a")], True, [png(5)]),
    ]
    digests = [content_digest(source) for source in (*sources, sources[0])]
    assert digests[0] == digests[2] != digests[1]
