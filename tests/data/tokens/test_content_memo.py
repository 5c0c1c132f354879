"""Files that have not changed are read by one process of those that start at once, and by none of a later run."""

import os
from pathlib import Path
from unittest import mock

import torch

from nemo_kto.data.reading import containers, parts
from nemo_kto.data.reading.parts import content_digest
from nemo_kto.data.reading.sources import Source
from nemo_kto.data.tokens import content_memo
from nemo_kto.data.tokens.cache import TokenCache
from nemo_kto.data.tokens.content_memo import remembered_digest
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.tokenization import Encoder
from tests.data.conftest import train_byte_level

RANKS = 3


def tokens_on_rank(file: str, folder: str) -> tuple[str, int, int]:
    """What this rank finds of a file, and how often it has read it: for its digest, and for its rows."""
    read = {"bytes": 0, "rows": 0}

    def counted(name, original):
        def call(*args):
            read[name] += 1
            return original(*args)

        return call

    cache = TokenCache(Path(folder), Encoder(train_byte_level(), TokenizationSettings()), workers=1)
    with (
        mock.patch.object(content_memo, "_SETTLED", 0.0),
        mock.patch.object(parts, "_bytes_of", counted("bytes", parts._bytes_of)),
        mock.patch.object(containers, "_open", counted("rows", containers._open)),
    ):
        torch.distributed.barrier()  # all at once
        store = cache.tokens_of(Source(file), skip_bad=False)
    return store.folder.name, read["bytes"], read["rows"]


def test_one_rank_reads_and_a_change_is_noticed(run_ranks, write_jsonl, tmp_path):
    file = write_jsonl(*({"prompt": f"say {n}", "completion": " hello", "label": True} for n in range(9)))
    folder = str(tmp_path / "tokens")

    def start():
        found = run_ranks(tokens_on_rank, RANKS, str(file), folder)
        assert len({name for name, *_ in found}) == 1
        return found[0][0], sum(number for _, number, _ in found), sum(number for *_, number in found)

    first, *reads = start()
    assert reads == [1, 1]
    assert start() == (first, 0, 0)
    before = file.stat()
    file.write_text(file.read_text(encoding="utf-8").replace("hello", "world"), encoding="utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second, *reads = start()
    assert second != first and reads == [1, 1]
    assert start() == (second, 0, 0)


def memos(folder):
    return [*folder.glob("*.digest")]


def test_a_file_that_was_changed_just_now_is_not_remembered(write_jsonl, tmp_path):
    source = Source(str(write_jsonl({"prompt": "a", "completion": "b", "label": True})))
    assert remembered_digest(source, tmp_path / "memos") == content_digest(source)
    assert not memos(tmp_path / "memos")


def test_a_file_that_changes_while_it_is_read_is_not_remembered(write_jsonl, tmp_path, monkeypatch):
    file = write_jsonl({"prompt": "a", "completion": "b", "label": True})
    source = Source(str(file))
    monkeypatch.setattr(content_memo, "_SETTLED", 0.0)

    def changing(of):
        found = content_digest(of)
        file.write_bytes(file.read_bytes() + b"\n")
        return found

    with mock.patch.object(content_memo, "content_digest", changing):
        old = remembered_digest(source, tmp_path / "memos")
    assert not memos(tmp_path / "memos")
    assert remembered_digest(source, tmp_path / "memos") == content_digest(source) != old
    assert len(memos(tmp_path / "memos")) == 1


def test_a_folder_that_gets_another_file_while_it_is_read_is_not_remembered(write_jsonl, tmp_path, monkeypatch):
    record = {"prompt": "a", "completion": "b", "label": True}
    source = Source(str(write_jsonl(record).parent))
    monkeypatch.setattr(content_memo, "_SETTLED", 0.0)

    def joined(of):
        write_jsonl(record, name="more.jsonl")
        return content_digest(of)

    with mock.patch.object(content_memo, "content_digest", joined):
        remembered_digest(source, tmp_path / "memos")
    assert not memos(tmp_path / "memos")


def test_copies_on_disks_of_several_machines_do_not_wait_for_each_other(write_jsonl, tmp_path, monkeypatch):
    """Under one path, with their own times; the memos are in one folder."""
    file = write_jsonl({"prompt": "a", "completion": "b", "label": True})
    source = Source(str(file))
    monkeypatch.setattr(content_memo, "_SETTLED", 0.0)
    for second in (100, 200):
        os.utime(file, (second, second))
        remembered_digest(source, tmp_path / "memos")
    assert len(memos(tmp_path / "memos")) == len([*(tmp_path / "memos").glob("*.lock")]) == 2


def test_a_damaged_memo_is_made_anew(write_jsonl, tmp_path, monkeypatch):
    source = Source(str(write_jsonl({"prompt": "a", "completion": "b", "label": True})))
    monkeypatch.setattr(content_memo, "_SETTLED", 0.0)
    wanted = remembered_digest(source, tmp_path / "memos")
    (memo,) = memos(tmp_path / "memos")
    whole = memo.read_bytes()
    for content in (b"", b"[]", b'{"digest": 1}', whole[:-3], b"\xff"):
        memo.write_bytes(content)
        assert remembered_digest(source, tmp_path / "memos") == wanted
        assert memo.read_bytes() == whole


def test_what_is_in_a_folder_and_in_no_place_to_write(write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(content_memo, "_SETTLED", 0.0)
    folder = write_jsonl({"prompt": "a", "completion": "b", "label": True}).parent
    source = Source(str(folder))
    first = remembered_digest(source, tmp_path / "memos")
    write_jsonl({"prompt": "a", "completion": "c", "label": True}, name="more.jsonl")
    assert remembered_digest(source, tmp_path / "memos") == content_digest(source) != first
    blocked = tmp_path / "file"
    blocked.touch()
    assert remembered_digest(source, blocked / "memos") == content_digest(source)
