"""Tokens are made once, found again by content and settings, and whole, whoever starts at once or is killed."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_process import Killed, refuse_lock
from datasets import Dataset, DatasetDict

from nemo_kto.data.reading.parts import expected_rows
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import Source
from nemo_kto.data.tokens import cache as token_cache
from nemo_kto.data.tokens import content_memo
from nemo_kto.data.tokens.cache import TokenCache
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.store import TokenStore
from nemo_kto.data.tokens.tokenization import Encoder
from nemo_kto.errors import DataError
from tests.data.conftest import stored_samples, train_byte_level
from tests.waiting import HANG, wait_until

ROOT = Path(__file__).resolve().parents[3]
WAITING = "Waiting for another process that tokenizes"
"""What a process says of a lock that another one holds."""


def rows(count):
    return [{"prompt": f"say {i}", "completion": " yes" * (1 + i % 5), "label": i % 3 == 0} for i in range(count)]


@pytest.fixture(autouse=True)
def small_calls(monkeypatch):
    """Five calls for 5000 records, and several processes for any number of them."""
    monkeypatch.setattr(token_cache, "_ROWS", 1024)
    monkeypatch.setattr(token_cache, "_FEW", 2)


@pytest.fixture
def source(write_jsonl):
    """Five calls of the tokenizer's worth of records."""
    return Source(str(write_jsonl(*rows(5000))))


def cache(folder, *, workers=1, tokenizer=None, **settings):
    return TokenCache(
        folder, Encoder(tokenizer or train_byte_level(), TokenizationSettings(**settings)), workers=workers
    )


def finished(folder):
    return [child for child in folder.iterdir() if child.is_dir() and child.suffix != ".partial"]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_tokens_of_every_record_in_order(source, tmp_path, tokenizer, workers):
    store = cache(tmp_path / "tokens", workers=workers).tokens_of(source, skip_bad=False)
    backend = tokenizer.backend_tokenizer
    expected = [
        (
            backend.encode(row["prompt"]).ids,
            [*backend.encode(row["completion"]).ids, tokenizer.eos_token_id],
            row["label"],
        )
        for row in rows(5000)
    ]
    assert stored_samples(store) == expected
    assert isinstance(store.tokens, np.memmap) and isinstance(store.samples, np.memmap)
    assert not [child for child in (tmp_path / "tokens").iterdir() if child.suffix == ".partial"]


def test_what_is_there_is_not_made_again(source, tmp_path, monkeypatch):
    cache(tmp_path).tokens_of(source, skip_bad=False)
    monkeypatch.setattr(token_cache, "read_chunks", None)
    assert len(cache(tmp_path).tokens_of(source, skip_bad=False)) == 5000


def test_what_changes_tokens_makes_another_store(write_jsonl, tmp_path):
    path = write_jsonl(*rows(3))
    changed = train_byte_level()
    changed.chat_template += " "
    stores = set()
    cases = [
        {},
        {"append_eod": False},
        {"prompt_template": "Q: {prompt}"},
        {"special_tokens": "text"},
        {"tokenizer": changed},
        {"tokenizer": train_byte_level(bos=True)},
    ]
    for settings in cases:
        stores.add(cache(tmp_path / "t", **settings).tokens_of(Source(str(path)), skip_bad=False).folder)
    readers = [RowReader(format="trl"), RowReader(fields={"response": "completion"}), RowReader(desirable_if=">= 1")]
    for reader in readers:
        stores.add(cache(tmp_path / "t").tokens_of(Source(str(path), reader=reader), skip_bad=True).folder)
    write_jsonl(*rows(2), {**rows(1)[0], "label": False})
    stores.add(cache(tmp_path / "t").tokens_of(Source(str(path)), skip_bad=False).folder)
    assert len(stores) == len(finished(tmp_path / "t")) == len(cases) + len(readers) + 1
    # neither its name nor how often it is taken changes a file's tokens
    other = path.with_name("sub") / path.name
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    assert cache(tmp_path / "t").tokens_of(Source(str(other), weight=2), skip_bad=False).folder in stores


def test_splits_of_a_data_set_are_stores_of_their_own(tmp_path):
    parts = {name: Dataset.from_list([rows(9)[place]]) for place, name in enumerate(("train", "test"))}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    made = [
        stored_samples(cache(tmp_path / "t").tokens_of(Source(str(tmp_path / "saved"), split=name), skip_bad=False))
        for name in parts
    ]
    assert made[0] != made[1] and len(finished(tmp_path / "t")) == 2


def test_a_tokenizer_that_was_saved_in_use_has_one_key(source, tmp_path):
    """Truncation and padding, which its first call takes away, are no part of it."""
    used = train_byte_level()
    used.backend_tokenizer.enable_truncation(5)
    used.backend_tokenizer.enable_padding()
    for _ in range(2):
        cache(tmp_path, tokenizer=used).tokens_of(source, skip_bad=False)
    assert len(finished(tmp_path)) == 1


@pytest.fixture
def start(source, tmp_path):
    """Starts cache_process.py; processes of their own, as copies of this one could wait for its threads' locks."""
    started = []

    def run(number=1, *, kind="held", workers=1, locks=True):
        arguments = [source.path, tmp_path / "tokens", kind, workers, int(locks)]
        command = [sys.executable, Path(__file__).with_name("cache_process.py"), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        new = []
        for _ in range(number):
            output = tmp_path / f"output{len(started)}.txt"
            with output.open("w") as stream:
                process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=stream, text=True)
            process.output = output
            started.append(process)
            new.append(process)
        for process in new:
            wait_to_say(process, "ready")
        for process in new:
            go_on(process)
        return new

    yield run
    for process in started:
        process.kill()
        process.communicate(timeout=HANG)


def said(process, *beginnings):
    """The lines that a process has printed, or those of them that begin so."""
    return [line for line in process.output.read_text().splitlines() if line.startswith(beginnings or "")]


def wait_to_say(process, *beginnings, number=1):
    wait_until(lambda: len(said(process, *beginnings)) >= number, process=process)


def go_on(process):
    process.stdin.write("go on\n")
    process.stdin.flush()


def outcomes(processes):
    """Sorted (samples, calls of the tokenizer) of processes that end well, once they may go on."""
    for process in processes:
        go_on(process)
    assert [process.wait(HANG) for process in processes] == [0] * len(processes)
    return sorted(tuple(map(int, said(process)[-1].split())) for process in processes)


def test_processes_that_start_at_once_tokenise_once(start, source, tmp_path):
    processes = start(3)
    for process in processes:
        wait_to_say(process, "encoding", WAITING)
    assert outcomes(processes) == [(5000, 0), (5000, 0), (5000, 5)]
    (store,) = finished(tmp_path / "tokens")
    assert stored_samples(TokenStore(store)) == stored_samples(
        cache(tmp_path / "alone").tokens_of(source, skip_bad=False)
    )


def test_a_killed_writer_leaves_nothing_behind(start, source, tmp_path):
    """The one that waits goes on from the beginning, with a lock that died with its holder."""
    (victim,) = start()
    wait_to_say(victim, "encoding")
    assert list(tmp_path.glob("tokens/*.partial/tokens.bin"))
    (waiting,) = start()
    wait_to_say(waiting, WAITING)
    assert not finished(tmp_path / "tokens")
    victim.kill()
    victim.wait(HANG)
    assert outcomes([waiting]) == [(5000, 5)]
    assert not list(tmp_path.glob("tokens/*.partial"))
    assert stored_samples(TokenStore(*finished(tmp_path / "tokens"))) == stored_samples(
        cache(tmp_path / "alone").tokens_of(source, skip_bad=False)
    )


def test_workers_end_with_a_killed_parent(start):
    (parent,) = start(kind="endless", workers=2)
    wait_to_say(parent, "encoding", number=2)
    workers = [psutil.Process(int(line.split()[1])) for line in said(parent, "encoding")]
    assert len({parent.pid, *(worker.pid for worker in workers)}) == 3
    parent.kill()
    parent.wait(HANG)
    _, alive = psutil.wait_procs(workers, timeout=HANG)
    for worker in alive:
        worker.kill()
    assert not alive


def test_a_killed_worker_is_an_error_not_a_hang(source, tmp_path):
    encoder = Killed(train_byte_level(), TokenizationSettings())
    with pytest.raises(DataError, match="want of memory.*tokenize_workers"):
        TokenCache(tmp_path, encoder, workers=2).tokens_of(source, skip_bad=False)
    assert not finished(tmp_path)


def test_without_locks_the_first_complete_store_counts(start, tmp_path):
    processes = start(2, locks=False)
    for process in processes:
        wait_to_say(process, "encoding")
    assert outcomes(processes) == [(5000, 5), (5000, 5)]
    assert len(finished(tmp_path / "tokens")) == 1 and not list(tmp_path.glob("tokens/*.partial"))


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("name", ["tokens.bin", "samples.bin", "counts.json"])
def test_a_damaged_store_is_made_anew(write_jsonl, tmp_path, name, locks, caplog, monkeypatch):
    source = Source(str(write_jsonl(*rows(9))))
    store = cache(tmp_path).tokens_of(source, skip_bad=False)
    file = store.folder / name
    file.write_bytes(b"[]" if name == "counts.json" else file.read_bytes()[:-3])
    if not locks:
        monkeypatch.setattr(content_memo.fcntl, "flock", refuse_lock)
    again = cache(tmp_path).tokens_of(source, skip_bad=False)
    assert len(stored_samples(again)) == 9 and "damaged" in caplog.text
    assert finished(tmp_path) == [store.folder] and not list(tmp_path.glob("*.partial"))


def test_what_others_are_writing_stays(write_jsonl, tmp_path):
    """Locks of some file systems hold for one machine only: what another one writes, and what is alive here, stays."""
    source = Source(str(write_jsonl(*rows(9))))
    name = cache(tmp_path).tokens_of(source, skip_bad=False).folder.name
    host, dead = socket.gethostname(), subprocess.Popen(["true"])
    dead.wait(HANG)
    left = {
        "elsewhere": tmp_path / f"{name}-other-machine-{dead.pid}-0.partial",
        "alive": tmp_path / f"{name}-{host}-{os.getpid()}-0.partial",
        "dead": tmp_path / f"{name}-{host}-{dead.pid}-0.partial",
    }
    for folder in left.values():
        folder.mkdir()
    shutil.rmtree(tmp_path / name)
    cache(tmp_path).tokens_of(source, skip_bad=False)
    assert {key for key, folder in left.items() if folder.exists()} == {"elsewhere", "alive"}


def test_bad_records_are_an_error_unless_they_are_skipped(write_jsonl, tmp_path, monkeypatch):
    source = Source(str(write_jsonl(*rows(3), "{", {"prompt": "p", "completion": "c", "label": "?"})))
    expected = r"(?s)2 records cannot be used.*data.jsonl:4.*data.jsonl:5: field 'label'"
    with pytest.raises(DataError, match=expected):
        cache(tmp_path / "t").tokens_of(source, skip_bad=False)
    monkeypatch.setattr(token_cache, "read_chunks", None)  # what was made of the others is kept
    store = cache(tmp_path / "t").tokens_of(source, skip_bad=True)
    assert (len(store), store.num_bad) == (3, 2)
    assert [(bad.line, bad.field) for bad in store.bad_records()] == [(4, None), (5, "label")]
    assert len(store.bad_records(1)) == 1
    with pytest.raises(DataError, match=expected):
        cache(tmp_path / "t").tokens_of(source, skip_bad=False)


def test_many_bad_records_end_it_early(write_jsonl, tmp_path):
    source = Source(str(write_jsonl(*["{"] * 11, *rows(3000))))
    with pytest.raises(DataError, match="More than 10 records"):
        cache(tmp_path / "t").tokens_of(source, skip_bad=False)
    assert not finished(tmp_path / "t") and not list(tmp_path.glob("t/*.partial"))


def test_a_file_of_bad_records_only(write_jsonl, tmp_path):
    store = cache(tmp_path / "t").tokens_of(Source(str(write_jsonl("{"))), skip_bad=True)
    assert (len(store), store.num_bad, stored_samples(store)) == (0, 1, [])


def test_a_file_in_the_place_of_the_folder(source, tmp_path):
    (tmp_path / "t").write_text("")
    with pytest.raises(DataError, match=r"cannot be written to .*model\.data\.cache_dir"):
        cache(tmp_path / "t").tokens_of(source, skip_bad=False)


def test_a_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: the file cannot be read"):
        cache(tmp_path / "t").tokens_of(Source(str(path)), skip_bad=True)


@pytest.mark.parametrize(("name", "total"), [("a.jsonl", 3), ("a.json", None), ("a.parquet", 3)])
def test_what_the_progress_bar_counts_to(tmp_path, name, total):
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows(3)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(3)))
    assert expected_rows(Source(str(path))) == total


def test_a_store_travels_by_name(source, tmp_path):
    store = cache(tmp_path).tokens_of(source, skip_bad=False)
    maker, arguments = store.__reduce__()
    assert arguments[0] == store.folder and stored_samples(maker(*arguments)) == stored_samples(store)


def test_pairs_become_two_samples(write_jsonl, tmp_path):
    path = write_jsonl({"prompt": "say", "chosen": " yes", "rejected": " no"})
    store = cache(tmp_path).tokens_of(Source(str(path)), skip_bad=False)
    (chosen, rejected) = stored_samples(store)
    assert chosen[0] == rejected[0] and chosen[1] != rejected[1] and (chosen[2], rejected[2]) == (True, False)
    keys = store.samples["prompt_key"], store.samples["response_key"]
    assert keys[0][0] == keys[0][1] and keys[1][0] != keys[1][1]


def test_counts_are_those_of_the_files(source, tmp_path):
    store = cache(tmp_path).tokens_of(source, skip_bad=False)
    counts = json.loads(Path(store.folder, "counts.json").read_text())
    assert counts == {"tokens": len(store.tokens), "samples": 5000, "bad": 0, "notes": {}} | {
        "images": 0,
        "contents": 0,
        "unusable": {},
    }
