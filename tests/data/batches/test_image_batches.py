"""Images on their way from a store to packed rows."""

import base64
import io
import json
import os
import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from nemo_kto.data.batches.collate import collate_item
from nemo_kto.data.batches.datamodule import DataSettings, KTODataModule
from nemo_kto.data.batches.dataset import KTODataset, collate_documents
from nemo_kto.data.batches.dealing import Dealer, Division, DocumentIndex
from nemo_kto.data.batches.packed_rows import PackedRow, pack_documents
from nemo_kto.data.batches.row_images import Picture
from nemo_kto.data.batches.samples import fit, split_by_prompt
from nemo_kto.data.batches.sampling import mismatch_permutation
from nemo_kto.data.reading.records import Image
from nemo_kto.data.reading.sources import Source
from nemo_kto.data.tokens import cache as cache_module
from nemo_kto.data.tokens.cache import TokenCache
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.store import StoreWriter, TokenStore, make_chunk
from nemo_kto.data.tokens.tokenization import Encoder, token_key
from nemo_kto.data.tokens.tokenizer import load_tokenizer
from nemo_kto.errors import DataError
from nemo_kto.runs.records import image_tokens
from tests.data.drawings import BYTES, FILES
from tests.data.tiny_processors import KINDS, picture_record, png, write_folder

A, B, C = png(30, 20), png(23, 61), png(50, 40)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            folder = write_folder(name, tmp_path_factory.mktemp(name))
            made[name] = Encoder(load_tokenizer(folder), TokenizationSettings(), image_tokens(folder))
        return made[name]

    return of


def user(*parts):
    return {"role": "user", "content": [*parts]}


def assistant(text):
    return {"role": "assistant", "content": text}


def stored(encoder, records, folder, *, chunk=2, base=None):
    """A store of records, written in chunks."""
    with StoreWriter(folder, base) as writer:
        for start in range(0, len(records), chunk):
            writer.add(make_chunk(encoder.encode(records[start : start + chunk])))
    return TokenStore(folder, base)


def samples_of(store, *, max_length=10_000, overlong="drop"):
    return fit(store, max_length=max_length, overlong=overlong, bos_token_id=None)


def records(*images):
    return [picture_record(list(of), "what", f"answer {number}") for number, of in enumerate(images)]


def batch_of(dataset, documents):
    return collate_documents(dataset.__getitems__(documents))


@pytest.fixture(scope="module", params=[*KINDS])
def data(request, encoders, tmp_path_factory):
    """(encoder, samples) of six records: one, two and no images, some of them the same."""
    encoder = encoders(request.param)
    shown = ([A], [B, A], [], [A], [C, C], [B])
    store = stored(encoder, records(*shown), tmp_path_factory.mktemp("store") / "s")
    return encoder, samples_of(store)


def test_a_store_keeps_each_image_once(data):
    encoder, samples = data
    store = samples.stores[0]
    assert (store.folder / "image_contents.bin").read_bytes() == A + B + C
    assert store.samples["images"].tolist() == [1, 2, 0, 1, 2, 1]
    found = [[image.read() for image in samples[number].images] for number in range(6)]
    assert found == [[A], [B, A], [], [A], [C, C], [B]]
    for number in range(6):
        images, prompt = samples[number].images, samples[number].prompt.tolist()
        token = encoder.images.tokens.image_token_id
        assert prompt.count(token) == sum(image.num_tokens for image in images)
        assert store.samples["image_start"][number] == (prompt.index(token) if images else 0)
    assert [(image.width, image.height) for image in samples[1].images] == [(23, 61), (30, 20)]
    again = pickle.loads(pickle.dumps(store))
    assert [image.read() for image in again.images_of(4)] == [C, C]


def test_stores_without_images_have_none(encoders, tmp_path):
    store = stored(encoders("llava"), records([], []), tmp_path / "s")
    assert len(store.images) == 0 and samples_of(store)[1].images == ()
    assert store.samples["prompt_key"][0] == token_key(samples_of(store)[0].prompt.tolist())


def test_files_are_named_relative_to_the_data(encoders, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        (folder / "pictures").mkdir(parents=True)
        (folder / "pictures" / "a.png").write_bytes(A)
    (tmp_path / "outside.png").write_bytes(B)
    record = picture_record([A, B])
    named = (Image(file=str(here / "pictures" / "a.png")), Image(file=str(tmp_path / "outside.png")))
    record = type(record)(**{f.name: getattr(record, f.name) for f in fields(record)} | {"images": named})
    store = stored(encoders("llava"), [record], tmp_path / "s", base=here)
    names = [image.place for image in TokenStore(store.folder, there).images_of(0)]
    assert names == [str(there / "pictures" / "a.png"), str(tmp_path / "outside.png")]
    assert [image.read() for image in pickle.loads(pickle.dumps(store)).images_of(0)] == [A, B]
    (here / "pictures" / "a.png").write_bytes(C)
    with pytest.raises(DataError, match=rf"a.png is not what it was when its tokens were made. Remove {store.folder}"):
        store.images_of(0)[0].read()
    (here / "pictures" / "a.png").unlink()
    with pytest.raises(DataError, match=rf"a.png cannot be read .No such file.*, or remove {store.folder}"):
        store.images_of(0)[0].read()


def test_caches_tell_processors_apart_and_keep_images(encoders, tmp_path, monkeypatch, write_jsonl):
    made = records([A], [B, A], [])
    monkeypatch.setattr(cache_module, "parse_chunk", lambda chunk: made)
    source = Source(str(write_jsonl({"prompt": "a", "completion": "b", "label": True})))
    encoder = encoders("llava")
    store = TokenCache(tmp_path / "tokens", encoder, workers=1).tokens_of(source, skip_bad=False)
    again = TokenCache(tmp_path / "tokens", encoder, workers=1).tokens_of(source, skip_bad=False)
    assert again.folder == store.folder and [image.read() for image in again.images_of(1)] == [B, A]
    folder = write_folder("llava", tmp_path / "other", crop_size={"height": 14, "width": 28})
    other = Encoder(load_tokenizer(folder), TokenizationSettings(), image_tokens(folder))
    changed = TokenCache(tmp_path / "tokens", other, workers=1).tokens_of(source, skip_bad=False)
    assert changed.folder != store.folder
    assert (changed.images["tokens"] * 2 == store.images["tokens"]).all()


def test_other_images_are_another_prompt(encoders, tmp_path):
    """LLaVA takes as many tokens for each image, so that the ids of these prompts are the same."""
    samples = samples_of(stored(encoders("llava"), records([A], [A], [B], [B], [A, B], [B, A]), tmp_path / "s"))
    keys = samples.prompt_keys.tolist()
    assert torch.equal(samples[0].prompt, samples[2].prompt) and torch.equal(samples[4].prompt, samples[5].prompt)
    assert keys[0] == keys[1] and keys[2] == keys[3] and len(set(keys)) == 4
    partner = mismatch_permutation(keys[:4])
    assert all(keys[place] != keys[other] for place, other in enumerate(partner))
    train, validation = split_by_prompt(samples, 0.5, seed=1)
    assert not {*train.prompt_keys.tolist()} & {*validation.prompt_keys.tolist()}
    swapped = samples_of(stored(encoders("llava"), records([A], [B], [B], [B], [A, B], [B, A]), tmp_path / "t"))
    assert samples.digest(weights=False) != swapped.digest(weights=False)


def test_nothing_is_cut_out_of_an_image(data):
    _, samples = data
    store = samples.stores[0]
    start, lengths = store.samples["image_start"], samples.lengths
    for number in np.flatnonzero(store.samples["images"]):
        cuts = start[number] - 2  # so many tokens can go
        for cut in (cuts, cuts + 1):
            kept = samples_of(store, max_length=int(lengths[number] - cut), overlong="truncate_prompt_left")
            assert (number in kept.place) == (cut == cuts or cut <= 0), (number, cut)
    shortened = samples_of(store, max_length=int(lengths.max()) - 1, overlong="truncate_response")
    assert len(shortened) == 6 and all(
        torch.equal(shortened[number].prompt, samples[number].prompt) for number in range(6)
    )


def test_dropped_for_images_counts_as_too_long(encoders, tmp_path):
    store = stored(encoders("qwen2_5_vl"), records([C], []), tmp_path / "s")
    length = int(store.samples["response"].max()) + 1
    kept = samples_of(store, max_length=length, overlong="truncate_prompt_left")
    assert kept.place.tolist() == [1] and kept.num_overlong == 1


def test_image_tokens_count_where_documents_are_dealt_by_length(encoders, tmp_path):
    samples = samples_of(stored(encoders("qwen2_5_vl"), records([C], [], [], [C]), tmp_path / "s"))
    documents = [DocumentIndex(number, number, number) for number in range(4)]
    shares = [
        Dealer(
            Division(dp_rank=rank, dp_size=2, micro_batch_size=2), samples.prompt_kept, samples.response_kept
        ).share(documents)
        for rank in (0, 1)
    ]
    assert [{sum(samples[d.prompt].images != () for d in share)} for share in shares] == [{1}, {1}]


DOCUMENTS = [
    DocumentIndex(0, 0, 0, row=0),
    DocumentIndex(2, 2, 1, row=0),
    DocumentIndex(1, 1, 2, row=1),
    DocumentIndex(2, 2, 3, row=2),
    DocumentIndex(0, 1, 0, in_kl_set=True, row=0),
    DocumentIndex(1, 2, 1, in_kl_set=True, row=0),
    DocumentIndex(2, 0, 2, in_kl_set=True, row=1),
]


def check_row(row, shown, encoder):
    """Whether a row's images are those of its documents' prompts."""
    if not any(shown):
        assert row.images is None and row.rotary_positions is None
        return
    token = encoder.images.tokens.image_token_id
    assert row.images.places.tolist() == (row.tokens == token).nonzero().flatten().tolist()
    total = sum(picture.num_tokens for picture in row.images.pictures)
    assert row.images.features.tolist() == [*range(total)]
    for picture, start in zip(row.images.pictures, row.images.starts, strict=True):
        assert (row.tokens[start : start + picture.num_tokens] == token).all()
    assert len({*row.images.starts}) == len(row.images.pictures)
    wanted = [encoder.images.inputs(one)["pixel_values"] for of in shown for one in of]
    assert len(row.images.pictures) == len(wanted)
    assert all(
        torch.equal(picture.inputs["pixel_values"], one)
        for picture, one in zip(row.images.pictures, wanted, strict=True)
    )
    assert (row.rotary_positions is not None) == encoder.images.tokens.counts_grid


def test_batches_carry_the_images_of_their_prompts(data):
    encoder, samples = data
    dataset = KTODataset(samples, images=encoder.images)
    batch = batch_of(dataset, DOCUMENTS)
    assert {*batch.images} == {0, 1} and batch.images[0][0] is batch.images[1][1]
    for rows, shown in (
        (batch.sample_rows(), [[[A], []], [[B, A]], [[]]]),
        (batch.kl_rows(), [[[A], [B, A]], [[]]]),
    ):
        for row, of_row in zip(rows, shown, strict=True):
            check_row(row, of_row, encoder)
    assert batch.kl_rows()[0].images.pictures[0] is batch.sample_rows()[0].images.pictures[0]


def test_images_are_decoded_once_for_a_batch(data, monkeypatch):
    encoder, samples = data
    decoded = []
    inputs = encoder.images.inputs
    monkeypatch.setattr(encoder.images, "inputs", lambda of: decoded.append(of) or inputs(of))
    batch_of(KTODataset(samples, images=encoder.images), DOCUMENTS)
    assert sorted(decoded) == sorted([A, B])
    without = batch_of(KTODataset(samples, images=encoder.images, pixels=False), DOCUMENTS)
    assert len(decoded) == 2 and without.images[1][0].inputs == {}
    assert without.images[1][0].num_tokens == samples[1].images[0].num_tokens


@pytest.mark.parametrize("pixels", [True, False])
def test_batches_travel_as_bytes(data, pixels):
    encoder, samples = data
    batch = batch_of(KTODataset(samples, images=encoder.images, pixels=pixels), DOCUMENTS)
    kinds = []

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            kinds.append(type(value))
            return NotImplemented

    Pickler(io.BytesIO()).dump(batch)
    assert Picture in kinds and torch.Tensor not in kinds and kinds.count(Picture) == 2
    again = pickle.loads(pickle.dumps(batch))
    assert again.image_token_id == batch.image_token_id and again.images[0][0] is again.images[1][1]
    for found, wanted in zip(
        again.sample_rows() + again.kl_rows(), batch.sample_rows() + batch.kl_rows(), strict=True
    ):
        assert_same_rows(found, wanted)
    moved = batch.to("cpu")
    assert moved.images is batch.images


def assert_same_rows(found: PackedRow, wanted: PackedRow):
    for field in fields(PackedRow):
        one, other = getattr(found, field.name), getattr(wanted, field.name)
        if field.name == "images":
            assert (one is None) == (other is None)
            if one is not None:
                assert torch.equal(one.places, other.places) and torch.equal(one.features, other.features)
                for picture, same in zip(one.pictures, other.pictures, strict=True):
                    assert (picture.key, picture.num_tokens, picture.grid) == (same.key, same.num_tokens, same.grid)
                    assert picture.inputs.keys() == same.inputs.keys()
                    assert all(torch.equal(picture.inputs[name], same.inputs[name]) for name in same.inputs)
        elif isinstance(one, torch.Tensor):
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name


def test_workers_read_pixels(data):
    encoder, samples = data
    dataset = KTODataset(samples, images=encoder.images)
    loader = DataLoader(dataset, batch_sampler=[DOCUMENTS] * 2, collate_fn=collate_documents, num_workers=1)
    wanted = batch_of(dataset, DOCUMENTS)
    for batch in loader:
        for found, row in zip(batch.sample_rows(), wanted.sample_rows(), strict=True):
            assert_same_rows(found, row)


def test_a_worker_says_which_image_is_gone(encoders, tmp_path):
    (tmp_path / "a.png").write_bytes(A)
    encoder = encoders("llava")
    record = picture_record([A])
    record = type(record)(record.prompt, record.response, True, "f", 1, images=(Image(file=str(tmp_path / "a.png")),))
    samples = samples_of(stored(encoder, [record], tmp_path / "s"))
    (tmp_path / "a.png").write_bytes(B)
    dataset = KTODataset(samples, images=encoder.images)
    loader = DataLoader(dataset, batch_sampler=[[DocumentIndex(0, 0, 0)]], collate_fn=collate_documents, num_workers=1)
    with pytest.raises(DataError) as error:
        next(iter(loader))
    image, store = tmp_path / "a.png", tmp_path / "s"
    assert str(error.value) == (
        f"The image {image} is not what it was when its tokens were made. Remove {store}, so that they are made anew."
    )


def test_kl_responses_are_cut_behind_images(data):
    encoder, samples = data
    prompt = samples[1].prompt
    dataset = KTODataset(samples, images=encoder.images, max_positions=prompt.numel() + 1)
    item = dataset[DocumentIndex(1, 0, 0, in_kl_set=True)]
    assert torch.equal(item.prompt, prompt) and item.response.numel() == 1 and len(item.pictures) == 2


def test_padded_form_refuses_images(data):
    _, samples = data
    with pytest.raises(DataError, match="no place for images, and the prompt of a sample shows 2"):
        collate_item(samples[1])
    assert collate_item(samples[2])["sample_length"] == samples.lengths[2]


@pytest.fixture(scope="module")
def qwen():
    """Transformers' model, for its rule of positions only."""
    config = Qwen2_5_VLConfig(
        text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
        | {"intermediate_size": 8, "vocab_size": 32},
        vision_config={"depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "out_hidden_size": 8}
        | {"spatial_merge_size": 2},
    )
    with torch.device("meta"):
        return Qwen2_5_VLModel(config)


IMAGE = 7
LAYOUTS = {
    "one": [(3, (2, 4), 5)],
    "two": [(1, (3, 2), 2), (0, (1, 5), 4)],
    "first": [(0, (2, 2), 1)],
    "adjacent runs": [(2, (4, 1), 1), (0, (2, 3), 1)],
    "none": [(0, None, 6)],
}


def document_of(layout):
    """Prompt, response and pictures of (tokens before, grid, tokens behind)..."""
    tokens, pictures = [], []
    for before, grid, behind in layout:
        tokens += [1] * before
        if grid:
            tokens += [IMAGE] * (grid[0] * grid[1])
            pictures.append(Picture(len(pictures), grid[0] * grid[1], grid))
        tokens += [2] * behind
    return (torch.tensor(tokens), torch.tensor([3, 4])), pictures


def test_rotary_positions_are_those_of_transformers(qwen):
    documents, pictures = zip(*(document_of(layout) for layout in LAYOUTS.values()), strict=True)
    row = pack_documents(documents, pictures, image_token_id=IMAGE)
    wanted = []
    for (prompt, response), shown in zip(documents, pictures, strict=True):
        ids = torch.cat([prompt, response])[None]
        grids = torch.tensor([[1, 2 * of.grid[0], 2 * of.grid[1]] for of in shown]) if shown else None
        positions, _ = qwen.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=grids)
        wanted.append(positions[:, 0])
    assert row.rotary_positions.dtype == torch.int64
    assert torch.equal(row.rotary_positions, torch.cat(wanted, dim=1))


def test_a_row_without_grids_has_no_rotary_positions():
    prompt = torch.tensor([1, IMAGE, IMAGE, 2])
    row = pack_documents([(prompt, torch.tensor([3]))], [[Picture(0, 2)]], image_token_id=IMAGE)
    assert row.rotary_positions is None and row.images.places.tolist() == [1, 2]
    with pytest.raises(AssertionError):
        pack_documents([(prompt, torch.tensor([3]))], [[Picture(0, 3)]], image_token_id=IMAGE)


@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_a_row_have_their_own_images(size):
    documents, pictures = zip(*(document_of(layout) for layout in LAYOUTS.values()), strict=True)
    whole = pack_documents(documents, pictures, image_token_id=IMAGE)
    row = whole.padded(8)
    missing = row.tokens.numel() - whole.tokens.numel()
    assert missing and torch.equal(row.rotary_positions[:, -missing:], torch.arange(missing).expand(3, -1))
    assert torch.equal(row.images.places, whole.images.places)
    length = row.tokens.numel() // size
    parts = [row.shard(rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([part.rotary_positions for part in parts], dim=1), row.rotary_positions)
    places = torch.cat([part.images.places + rank * length for rank, part in enumerate(parts)])
    assert torch.equal(places, row.images.places)
    assert torch.equal(torch.cat([part.images.features for part in parts]), row.images.features)
    for part in parts:
        assert (part.tokens[part.images.places] == IMAGE).all() and part.images.pictures == row.images.pictures
        assert part.images.starts == row.images.starts
        assert (part.tokens == IMAGE).sum() == part.images.places.numel()


def test_places_move_with_their_row():
    (document, pictures) = document_of(LAYOUTS["two"])
    row = pack_documents([document], [pictures], image_token_id=IMAGE).to("meta")
    assert row.images.places.is_meta and row.images.features.is_meta and row.rotary_positions.is_meta
    assert row.images.pictures == tuple(pictures)


def test_documents_that_show_nothing_make_rows_without_images():
    row = pack_documents([(torch.tensor([1, 2]), torch.tensor([3]))], [()])
    assert row.images is None and row.rotary_positions is None


def test_names_that_lead_out_of_the_data_are_those_of_each_copy(encoders, tmp_path):
    """What is behind a link is not above it, so that `..` says something only where it stands."""
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "far" / "c.png").write_bytes(C)
    for name, content in (("here", A), ("there", B)):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(content)
        (tmp_path / name / "data" / "link").symlink_to(tmp_path / "far" / "inner")
    base = tmp_path / "here" / "data"
    record = picture_record([A, C])
    named = (Image(file=f"{base}/../a.png"), Image(file=f"{base}/link/../c.png"))
    record = type(record)(**{f.name: getattr(record, f.name) for f in fields(record)} | {"images": named})
    store = stored(encoders("llava"), [record], tmp_path / "s", base=base)
    assert [image.read() for image in store.images_of(0)] == [A, C]
    with pytest.raises(DataError, match=r"there/data/../a.png is not what it was"):
        TokenStore(store.folder, tmp_path / "there" / "data").images_of(0)[0].read()


@pytest.mark.parametrize("skip_bad", [False, True])
def test_an_image_that_was_bad_is_looked_at_again_when_it_has_changed(encoders, tmp_path, write_jsonl, skip_bad):
    part = {"type": "image", "image": "a.png"}
    source = Source(str(write_jsonl({"prompt": [user(part)], "completion": [assistant("yes")], "label": True})))
    file, folder = Path(source.path).parent / "a.png", tmp_path / "tokens"

    def numbers():
        try:
            store = TokenCache(folder, encoders("llava"), workers=1).tokens_of(source, skip_bad=skip_bad)
        except DataError as error:
            assert "a.png" in str(error)
            return 0
        return len(store)

    assert numbers() == numbers() == 0
    made = [place.stat().st_ino for place in folder.iterdir() if place.is_dir()]
    file.write_bytes(b"no image")
    assert numbers() == 0
    file.write_bytes(A)
    assert numbers() == numbers() == 1
    assert len(made) == 1 == sum(place.is_dir() for place in folder.iterdir())
    file.unlink()
    assert numbers() == 0


def test_an_image_that_has_changed_is_noticed_when_a_run_begins(encoders, tmp_path, write_jsonl):
    part = {"type": "image", "image": "a.png"}
    source = Source(str(write_jsonl({"prompt": [user(part)], "completion": [assistant("yes")], "label": True})))
    file = Path(source.path).parent / "a.png"

    def opened():
        store = TokenCache(tmp_path / "tokens", encoders("llava"), workers=1).tokens_of(source, skip_bad=False)
        return store.folder / "mark", store.images_of(0)[0].read()

    file.write_bytes(A)
    mark, content = opened()
    assert content == A
    mark.touch()
    os.utime(file, ns=(1, 1))
    assert opened() == (mark, A)
    assert mark.exists(), "the same image, written again, is made anew"
    file.write_bytes(B)
    assert opened() == (mark, B)
    assert not mark.exists()


def feedback(folder, number):
    """A file of feedback on images of three kinds: files beside it, in it, and none; and the images."""
    (folder / "pictures").mkdir(parents=True)
    images = [png(20 + place, 30) for place in range(3)]
    (folder / "pictures" / "0.png").write_bytes(images[0])
    uris = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    kinds = ["pictures/0.png", uris[1], uris[2], None]
    rows = []
    for place in range(number):
        image = kinds[place % 4]
        row = {"prompt": f"question {place}", "completion": f"answer {place}", "label": place % 3 > 0}
        rows.append(row | ({} if image is None else {"images": [image]}))
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, images


@pytest.mark.parametrize("workers", [1, 2])
def test_several_processes_make_the_same_store(encoders, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(cache_module, "_FEW", 2)
    monkeypatch.setattr(cache_module, "_ROWS", 3)
    file, images = feedback(tmp_path / "data", 20)
    encoder = encoders("qwen2_5_vl")
    store = TokenCache(tmp_path / "tokens", encoder, workers=workers).tokens_of(Source(str(file)), skip_bad=False)
    assert len(store) == 20 and store.samples["images"].tolist() == [1, 1, 1, 0] * 5
    found = [[image.read() for image in store.images_of(number)] for number in range(4)]
    assert found == [[images[0]], [images[1]], [images[2]], []]
    contents = (store.folder / "image_contents.bin").read_bytes()
    assert sorted([contents.count(images[1]), contents.count(images[2]), contents.count(b"pictures/0.png")]) == [1] * 3
    assert len(contents) == len(images[1]) + len(images[2]) + len("pictures/0.png")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_sees_images(encoders, tmp_path, workers, caplog):
    caplog.set_level("INFO", logger="nemo_kto")
    file, images = feedback(tmp_path / "data", 8)
    encoder = encoders("qwen2_5_vl")
    settings = DataSettings(
        train=[Source(str(file))],
        tokenization=TokenizationSettings(prompt_template="chat"),
        images=encoder.images.tokens,
        max_length=200,
        cache_dir=tmp_path / "tokens",
        global_batch_size=4,
        seed=1,
        shuffle=False,
        num_workers=workers,
    )
    module = KTODataModule(settings, encoder.tokenizer)
    module.prepare()
    assert "train data: 6 of the samples show images" in caplog.messages
    position = {"dp_rank": 0, "dp_size": 1, "num_steps": 2, "steps_per_epoch": 2, "start_step": lambda: 0}
    module.set_position(**position)
    batch = next(iter(module.train_dataloader()))
    assert {*batch.images} == {0, 1, 2} and batch.image_token_id == encoder.images.tokens.image_token_id
    for record, (picture,) in batch.images.items():
        assert torch.equal(picture.inputs["pixel_values"], encoder.images.inputs(images[record])["pixel_values"])
    by_hand = module.rank_batch("train", next(iter(module.global_batches("train"))))
    for rows in ("sample_rows", "kl_rows"):
        for found, wanted in zip(getattr(batch, rows)(), getattr(by_hand, rows)(), strict=True):
            assert_same_rows(found, wanted)
    module.set_position(**position, pixels=False)
    blind = next(iter(module.train_dataloader()))
    assert all(picture.inputs == {} for shown in blind.images.values() for picture in shown)
    for found, wanted in zip(blind.sample_rows()[:3], batch.sample_rows()[:3], strict=True):
        assert torch.equal(found.images.places, wanted.images.places)
        assert torch.equal(found.rotary_positions, wanted.rotary_positions)


def test_bad_images_are_bad_records(encoders, tmp_path):
    file, _ = feedback(tmp_path / "data", 4)
    (tmp_path / "data" / "pictures" / "0.png").write_bytes(png(9, 7)[:-30])
    cache = TokenCache(tmp_path / "tokens", encoders("llava"), workers=1)
    store = cache.tokens_of(Source(str(file)), skip_bad=True)
    assert len(store) == 3
    (bad,) = store.bad_records()
    picture = tmp_path / "data" / "pictures" / "0.png"
    assert str(bad).startswith(f"{file}:1: image 1 ({picture}) cannot be decoded (image file is truncated")
    with pytest.raises(DataError, match=r"data.jsonl:1: image 1 \("):
        cache.tokens_of(Source(str(file)), skip_bad=False)


@pytest.mark.parametrize("name", [*FILES, *BYTES])
def test_every_spelling_is_the_same_prompt(name, encoders, tmp_path):
    (tmp_path / "pictures").mkdir()
    picture = tmp_path / "pictures" / "a.png"
    picture.write_bytes(A)
    part = {"type": "image", "image": (FILES | BYTES)[name](picture)}
    prompt = [{"role": "user", "content": [part, {"type": "text", "text": "what"}]}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "answer 0"}], "label": True}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    encoder = encoders("qwen2_5_vl")
    store = TokenCache(tmp_path / "tokens", encoder, workers=1).tokens_of(
        Source(str(tmp_path / "data.jsonl")), skip_bad=False
    )
    (wanted,) = encoder.encode(records([A]))
    sample = samples_of(store)[0]
    assert sample.prompt.tolist() == wanted.prompt and sample.images[0].read() == A
