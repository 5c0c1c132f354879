"""What is in a checkpoint is never run, wherever it is put."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from nemo_kto.runtime.no_code import index_fault, nothing_executed


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process
        save({"weight": torch.arange(6.0), "extra": [1, 2]}, storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


def read(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = {"weight": torch.zeros(6), "extra": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def plant(folder: Path, payload: Payload, where: str) -> None:
    file = folder / ".metadata"
    index = pickle.loads(file.read_bytes())
    if where == "the whole index":
        index = payload
    elif where == "a field of it":
        index.planner_data = payload
    elif where == "a key":
        index.state_dict_metadata[payload] = index.state_dict_metadata["weight"]
    elif where == "a value of a class that is allowed":
        index.storage_meta.save_id = payload
    file.write_bytes(pickle.dumps(index))


PLACES = ["the whole index", "a field of it", "a key", "a value of a class that is allowed"]


@pytest.mark.parametrize("where", PLACES)
def test_an_index_with_a_payload_is_refused(checkpoint: Path, marker: Path, where: str) -> None:
    plant(checkpoint, Payload(marker), where)
    with nothing_executed(), pytest.raises(CheckpointException, match=r"it names \S+, which no checkpoint"):
        read(checkpoint)
    assert "it names" in str(index_fault(checkpoint))
    assert not marker.exists()
    try:
        read(checkpoint)  # as torch does
    except (AttributeError, CheckpointException):  # what is left of it may be no index any more
        assert where != "a field of it"
    assert marker.exists()


def test_bytes_with_a_payload_are_refused(tmp_path: Path, marker: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {"weight": torch.arange(6.0), "extra": Payload(marker)}
        save(state, storage_writer=FileSystemWriter(tmp_path / "checkpoint"), no_dist=True)
    with nothing_executed(), pytest.raises(CheckpointException, match="Weights only load failed"):
        read(tmp_path / "checkpoint")
    assert not marker.exists()
    read(tmp_path / "checkpoint")
    assert marker.exists()


@pytest.mark.parametrize("forced", ["1", None])
def test_an_environment_that_asks_for_pickles_is_not_obeyed(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, forced: str | None
) -> None:
    if forced is not None:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    torch.save({"global_step": Payload(marker)}, tmp_path / "common.pt")
    before = dict(os.environ)
    with nothing_executed(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "common.pt")
    assert not marker.exists() and dict(os.environ) == before


@pytest.mark.parametrize("place", ["../other", "/dev/zero", "a/b"])
def test_an_index_that_names_files_elsewhere_is_refused(checkpoint: Path, place: str) -> None:
    file = checkpoint / ".metadata"
    index = pickle.loads(file.read_bytes())
    for entry in index.storage_data.values():
        entry.relative_path = place
    file.write_bytes(pickle.dumps(index))
    with nothing_executed(), pytest.raises(CheckpointException, match=f"names {place}, which is outside"):
        read(checkpoint)


def test_an_honest_checkpoint_is_read_and_nothing_stays_changed(checkpoint: Path) -> None:
    from torch.distributed.checkpoint import filesystem

    with nothing_executed():
        state = read(checkpoint)
    assert state["weight"].equal(torch.arange(6.0)) and state["extra"] == [1, 2]
    assert filesystem.pickle is pickle  # type: ignore[attr-defined]
