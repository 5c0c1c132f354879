"""What is said of disks: why something could not be written, that it takes long, and what will not fit."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.runtime import disk, space
from nemo_kto.runtime.disk import as_size, explained, free_bytes, reason_of
from nemo_kto.runtime.saving import SlowSaves
from nemo_kto.runtime.space import Plan


def usage(**values: int) -> Any:
    return lambda path: SimpleNamespace(
        **{"f_bavail": 1 << 20, "f_frsize": 4096, "f_files": 9, "f_favail": 5, **values}
    )


def chained(error: OSError) -> RuntimeError:
    outer = RuntimeError("Worker failure")
    outer.__cause__ = error
    return outer


TORCH = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


@pytest.mark.parametrize(
    ("error", "values", "said"),
    [
        (OSError(errno.ENOSPC, "x"), {}, "no space is left on its file system"),
        (OSError(errno.ENOSPC, "x"), {"f_favail": 0}, "no inode is left on its file system, which holds too many"),
        (OSError(errno.ENOSPC, "x"), {"f_favail": 0, "f_files": 0}, "no space is left on its file system"),  # btrfs
        (OSError(errno.EDQUOT, "x"), {}, "the quota of this user is used up there"),
        (OSError(errno.EROFS, "x"), {}, "its file system is read-only"),
        (OSError(errno.EIO, "x"), {}, "Input/output error"),
        (RuntimeError("Worker failure: [Errno 28] No space left on device"), {}, "no space is left"),
        (chained(OSError(errno.EROFS, "x")), {}, "its file system is read-only"),
        (TORCH, {"f_bavail": 0}, "no space is left on its file system"),
        (TORCH, {}, "PyTorch could not write a file of it to its end"),
        (RuntimeError("results_queue should not be empty"), {}, "a process that wrote a part of it has ended"),
        (RuntimeError("something else\nwith more"), {"f_bavail": 0}, "something else"),
        (RuntimeError(), {}, "RuntimeError"),
    ],
)
def test_why_it_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, values: dict[str, int], said: str
) -> None:
    monkeypatch.setattr(disk.os, "statvfs", usage(**values))
    reason = reason_of(error, tmp_path / "not" / "there")
    assert reason.startswith(said) and "\n" not in reason


def test_one_sentence_with_the_key_if_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"/x cannot be written: its file system is read-only\.$"):
        with explained(tmp_path / "x"):
            raise OSError(errno.EROFS, "x")
    with pytest.raises(ConfigError, match=r"Mend that, or name another place in a\.b\.$"):
        with explained(tmp_path / "x", "a.b"):
            raise OSError(errno.EROFS, "x")
    with pytest.raises(ConnectionError), explained(tmp_path):  # of no disk
        raise ConnectionRefusedError(errno.ECONNREFUSED, "x")


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (627_200, "627 kB"), (12e9, "12 GB"), (3.4e15, "3400 TB")],
)
def test_sizes(count: float, said: str) -> None:
    assert as_size(count) == said


def test_free_bytes_are_those_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(found.f_bavail * found.f_frsize, rel=0.1)


def test_slow_saves_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A run of 100 s between saves: quick ones, then some that take two minutes."""
    now = [0.0]
    saves = SlowSaves("/disk", lambda: now[0])
    said = []
    for taken in (5, 5, 120, 120, 120):
        now[0] += 100
        with caplog.at_level(logging.WARNING, logger="nemo_kto"), saves.measured():
            now[0] += taken
        said.append(len(caplog.records))
    assert said == [0, 0, 1, 1, 1]
    # 130 of 430 seconds
    assert "Writing checkpoints to /disk has taken 130 s, 30% of the time so far." in caplog.text
    assert "trainer.kto.save_interval" in caplog.text and "async_save=true" in caplog.text


def plan(folder: Path, **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "checkpoints": folder / "checkpoints",
        "at_once": 5,
        "params_dtype": torch.bfloat16,
        "export": folder / "hf",
        "export_dtype": torch.bfloat16,
        "whole_model": True,
    }
    return Plan(**values | changes)


def test_what_will_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8e9 parameters in bfloat16: 14 bytes each in a checkpoint, 2 in the export; with adapters, those only."""
    monkeypatch.setattr(space, "free_bytes", lambda path: 400 * 10**9)
    (text,) = plan(tmp_path).warnings(8 * 10**9, 8 * 10**9)
    assert "is going to write 576 GB" in text and "400 GB are free" in text  # 5 x 112 + 16
    assert "checkpoints, 112 GB each and up to 5 at a time and the exported model." in text
    assert plan(tmp_path, at_once=3).warnings(8 * 10**9, 8 * 10**9) == []  # 3 x 112 + 16
    assert plan(tmp_path, whole_model=False).warnings(8 * 10**9, 10**7) == []
    assert plan(tmp_path, checkpoints=None).warnings(8 * 10**9, 8 * 10**9) == []
    assert plan(tmp_path, params_dtype=torch.float32, at_once=1, export=None).needs(8, 8)[0][1] == 8 * 16


def test_checkpoints_that_are_there_already_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"x-step={step}").mkdir(parents=True)
    monkeypatch.setattr(space, "free_bytes", lambda path: 400 * 10**9)
    assert plan(tmp_path).warnings(8 * 10**9, 8 * 10**9) == []  # 3 x 112 + 16
