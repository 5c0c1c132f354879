"""Every change of a checkpoint's files is noticed, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from nemo_kto.runtime.checkpoint_folders import checkpoints_in, fault_of, newest_whole, set_aside
from nemo_kto.runtime.checkpoint_manifest import MANIFEST_FILE, entry_of, first_fault, read_manifest, write_manifest

FILES = {
    "metadata.json": b"{}",
    ".metadata": b"index",
    "common.pt": b"plain",
    "__0_0.distcp": bytes(5000),
    "hf/config.json": b"{}",
}


def make(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, {})
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make(tmp_path / "checkpoints" / "run-step=4-last")


def test_the_manifest_names_every_file_with_its_size_and_checksum(checkpoint: Path) -> None:
    entries = read_manifest(checkpoint)
    assert entries == {
        name: {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)} for name, content in FILES.items()
    }
    assert first_fault(checkpoint) is None and fault_of(checkpoint, checksums=True) is None
    assert not (checkpoint / f"{MANIFEST_FILE}.partial").exists()


def test_entries_of_writers_are_taken_over(checkpoint: Path) -> None:
    """They are made of what was written, so that damage on the way to the disk is found too."""
    written = {"__0_0.distcp": {"size": 5000, "xxh3_128": xxhash.xxh3_128_hexdigest(bytes([1, *[0] * 4999]))}}
    write_manifest(checkpoint, written)
    assert first_fault(checkpoint) == "__0_0.distcp is not what was written: its checksum is another"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", [*FILES])
@pytest.mark.parametrize(
    ("change", "fault", "seen_by_size"),
    [
        (Path.unlink, "is missing", True),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes, not the", True),
        (lambda file: file.write_bytes(file.read_bytes() + b" "), "bytes, not the", True),
        (flip, "its checksum is another", False),
    ],
    ids=["removed", "cut", "longer", "flipped"],
)
def test_damage_is_named(
    checkpoint: Path, name: str, change: Callable[[Path], object], fault: str, seen_by_size: bool
) -> None:
    change(checkpoint / name)
    found = fault_of(checkpoint, checksums=True)
    assert found is not None and found.startswith(name) and fault in found
    assert (fault_of(checkpoint, checksums=False) is not None) == seen_by_size
    others = [other for other in FILES if other != name]
    assert first_fault(checkpoint, names=others) is None  # a rank that looks at its share


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"files": []}',
        b'{"files": {"a": {}}}',
        b'{"files": {"a": {"size": "x", "xxh3_128": ""}}}',
        b"[" * 10**5,
    ],
)
def test_a_damaged_manifest(checkpoint: Path, content: bytes) -> None:
    (checkpoint / MANIFEST_FILE).write_bytes(content)
    assert str(first_fault(checkpoint)).startswith("manifest.json is damaged")


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "hf/../../other"])
def test_a_manifest_names_nothing_outside(checkpoint: Path, name: str) -> None:
    entry = {"size": 0, "xxh3_128": ""}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps({"version": 1, "files": {name: entry}}))
    assert "outside of the checkpoint" in str(first_fault(checkpoint))


def test_a_checkpoint_of_a_version_that_wrote_no_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    assert read_manifest(checkpoint) is None and fault_of(checkpoint, checksums=True) is None
    (checkpoint / "common.pt").unlink()
    assert fault_of(checkpoint, checksums=False) == "common.pt is missing"


def test_a_checkpoint_of_a_megatron_that_writes_no_common_part(checkpoint: Path) -> None:
    """From 0.19 on it is an entry of the index."""
    (checkpoint / ".metadata").write_bytes(b"... X\x18\x00\x00\x00common_state/shard_0_1 ...")
    write_manifest(checkpoint, {})
    (checkpoint / "common.pt").unlink()
    assert fault_of(checkpoint, checksums=False) == "common.pt is missing"  # it is one of those in the manifest
    write_manifest(checkpoint, {})
    assert fault_of(checkpoint, checksums=True) is None
    (checkpoint / MANIFEST_FILE).unlink()
    assert fault_of(checkpoint, checksums=True) is None


def test_the_newest_whole_one_is_chosen_whatever_it_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    names = ["run-step=2-val_loss=0.5000", "run-step=4-last", "run-step=4-val_loss=0.4000", "run-step=10-last"]
    made = [make(folder / name) for name in names]
    (folder / "notes").mkdir()
    assert checkpoints_in(folder) == [made[3], made[1], made[2], made[0]]
    assert newest_whole(folder) == (made[3], [])
    flip(made[3] / "__0_0.distcp")
    assert newest_whole(folder) == (made[3], [])  # the size is right
    newest, (damaged,) = newest_whole(folder, checksums=True)
    assert newest == made[1] and damaged.folder == made[3] and "__0_0.distcp is not what was written" in damaged.fault
    (made[1].with_name(made[1].name + "-unfinished")).touch()
    assert newest_whole(folder, checksums=True)[0] == made[2]
    for checkpoint in made[2:0:-1]:
        (checkpoint / "common.pt").unlink()
    (made[0] / "common.pt").unlink()
    newest, damaged = newest_whole(folder, checksums=True)
    assert newest is None and [error.folder for error in damaged] == [made[3], made[2], made[0]]


def test_nothing_is_overwritten_where_damaged_ones_are_put(tmp_path: Path) -> None:
    places = []
    for number in range(3):
        checkpoint = make(tmp_path / "checkpoints" / "run-step=4-last")
        (checkpoint / "number").write_text(str(number))
        places.append(set_aside(checkpoint))
        assert not checkpoint.exists()
    assert [place.name for place in places] == ["run-step=4-last", "run-step=4-last.2", "run-step=4-last.3"]
    assert [(place / "number").read_text() for place in places] == ["0", "1", "2"]
    assert {place.parent for place in places} == {tmp_path / "damaged_checkpoints"}
    assert entry_of(places[0] / "number") == entry_of(places[0] / "number")
