"""Disks that are full, read-only or gone: nothing good is lost, it is said in a sentence, and the run goes on.

Files that may not become larger than so many bytes (RLIMIT_FSIZE) stand for a full disk where nothing can be mounted:
writing fails in the same places, with another number. Where something can be, a small file system is filled up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch import Callback
from megatron.core import __version__ as megatron_version
from packaging.version import Version

from nemo_kto.runtime.checkpoint_folders import checkpoints_in, is_finished, newest_whole, step_of
from tests.distributed_harness import free_port, heard
from tests.integration.assets import read_series, settings, train_on_rank

TP2 = {"model__tensor_model_parallel_size": 2}  # both ranks have something to write
SAVING = {
    "exp_manager__create_checkpoint_callback": True,
    "trainer__kto__save_interval": 1,
    "trainer__kto__max_steps": 4,
}
ASYNC = {"exp_manager__checkpoint_callback_params__async_save": True}
ENDLESS = resource.getrlimit(resource.RLIMIT_FSIZE)[1]


def limit(size: int | None) -> None:
    """Let files of this process, and of those it starts, not become larger; None for no limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (ENDLESS if size is None else size, ENDLESS))


class Disk(Callback):
    """Does something to a disk before some steps, counted from 1, and undoes it before others.

    Args:
        do: Called before those in `steps`.
        undo: Called before all others.
        steps: The steps.
        ranks: The ranks that do so.
        folder: Of the checkpoints: which are whole is noted before each step.
    """

    def __init__(
        self, do: Callable[[], Any], undo: Callable[[], Any], steps: set[int], ranks: set[int], folder: Path
    ) -> None:
        self.do, self.undo, self.steps, self.ranks, self.folder = do, undo, steps, ranks, folder
        self.whole: list[list[str]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Do it."""
        self.whole.append(
            [path.name[len("megatron_gpt-") :] for path in checkpoints_in(self.folder) if is_finished(path)]
        )
        if dist.get_rank() in self.ranks:
            (self.do if trainer.global_step + 1 in self.steps else self.undo)()


def troubled_run(
    port: int, overrides: dict[str, Any], disk: Callable[[Path], Disk], patches: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """Train with a disk that is trouble; return the error, what was said, and the checkpoints before each step."""
    from nemo_kto.errors import KTOError
    from nemo_kto.runtime import saving

    saving.PAUSE = 0.0
    said = heard(logging.WARNING)
    callback = disk(Path(overrides["exp_manager.explicit_log_dir"]) / "checkpoints")
    if patches is not None:
        patches()
    error = None
    try:
        train_on_rank(port, overrides, callbacks=[callback])
    except KTOError as raised:
        error = str(raised)
    finally:
        limit(None)
        callback.undo()
    return {"error": error, "said": said, "whole": callback.whole}


class Limited:
    """Makes a `Disk` whose files stay small in some steps; a class, so that it travels to the ranks."""

    def __init__(self, steps: set[int], *, ranks: set[int] = frozenset({0, 1}), size: int = 20_000) -> None:  # type: ignore[assignment]
        self.steps, self.ranks, self.size = steps, ranks, size

    def __call__(self, folder: Path) -> Disk:
        if self.size == 0:  # what is printed goes to a file, too
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        return Disk(lambda: limit(self.size), lambda: limit(None), self.steps, self.ranks, folder)


class LimitedWriters:
    """Lets the processes that write the checkpoints of some steps make small files only."""

    def __init__(self, steps: set[int], *, ranks: set[int] = frozenset({0, 1})) -> None:  # type: ignore[assignment]
        self.steps, self.ranks = steps, ranks

    def __call__(self) -> None:
        from nemo_kto.runtime import checkpoint

        original = checkpoint._write

        def write(function: Any, folder: Path, *arguments: Any, **keywords: Any) -> None:
            limit(20_000 if step_of(folder) in self.steps and dist.get_rank() in self.ranks else None)
            try:
                original(function, folder, *arguments, **keywords)
            finally:
                limit(None)

        checkpoint._write = write


NOTHING = Limited(set())

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def troubled(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> Run:
    """Return `troubled(world_size, disk, patches, log_dir=..., **changes)`: what `troubled_run` returns by rank."""

    def run(world_size: int, disk: Any, patches: Any = None, **changes: Any) -> list[dict[str, Any]]:
        values = settings(root, changes.pop("log_dir", tmp_path / "log"), **{**SAVING, **changes})
        return run_ranks(troubled_run, world_size, free_port(), values, disk, patches)

    return run


def last(*steps: int) -> list[list[str]]:
    """Return which checkpoint is there before each step."""
    return [[f"step={step}-last"] if step else [] for step in steps]


REASON = "no file may become as large there"


@pytest.mark.parametrize("ranks", [{1}, pytest.param({0, 1}, marks=pytest.mark.slow)], ids=["one", "all"])
def test_a_save_that_fails_is_said_and_the_run_goes_on(troubled: Run, tmp_path: Path, ranks: set[int]) -> None:
    folder = tmp_path / "log" / "checkpoints"
    first, second = troubled(2, NOTHING, LimitedWriters({2}, ranks=ranks), **TP2)
    assert first["error"] is second["error"] is None
    (text,) = first["said"]
    assert f"The checkpoint {folder}/megatron_gpt-step=2-last could not be written: " in text
    assert "Nothing is left of it, and training goes on" in text
    assert first["whole"] == last(0, 1, 1, 3)
    assert [path.name for path in folder.iterdir()] == ["megatron_gpt-step=4-last"]


@pytest.mark.parametrize(
    "changes", [pytest.param({}, marks=pytest.mark.slow), ASYNC], ids=["at once", "in the background"]
)
def test_three_in_a_row_end_it_with_the_last_good_one_kept(
    troubled: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    answers = troubled(2, NOTHING, LimitedWriters({2, 3, 4}), **TP2, **changes, trainer__kto__max_steps=6)
    folder = tmp_path / "log" / "checkpoints"
    for answer in answers:
        assert "step=4-last could not be written: " in answer["error"]
        assert "So it was at steps 2, 3, 4." in answer["error"]
        assert answer["error"].endswith(f"it goes on from {folder}/megatron_gpt-step=1-last.")
    assert newest_whole(folder, checksums=True)[0] == folder / "megatron_gpt-step=1-last"
    assert [path.name for path in folder.iterdir()] == ["megatron_gpt-step=1-last"]


def test_in_the_background_what_it_was_to_replace_stays(troubled: Run, tmp_path: Path) -> None:
    """The failure is known a step later, when NeMo's callback believes it to have gone well."""
    answers = troubled(2, NOTHING, LimitedWriters({3}), **TP2, **ASYNC, trainer__kto__max_steps=5)
    assert [answer["error"] for answer in answers] == [None, None]
    assert len(answers[0]["said"]) == 1 and "step=3-last could not be written" in answers[0]["said"][0]
    kept = [names[-1] for names in answers[0]["whole"] if names]
    assert "step=3-last" not in sum(answers[0]["whole"], [])
    assert kept[0] == "step=1-last" and kept == sorted(kept)
    assert [path.name for path in (tmp_path / "log" / "checkpoints").iterdir()] == ["megatron_gpt-step=5-last"]


def test_the_best_ones_are_kept_as_if_nothing_had_been_tried(troubled: Run, root: Path, tmp_path: Path) -> None:
    """Three validations, each better than the one before; the second one's checkpoints cannot be written."""
    validated = {
        "model__data__data_prefix__validation": str(root / "validation.jsonl"),
        "trainer__kto__val_check_interval": 2,
        "trainer__kto__save_interval": 0,
        "trainer__kto__max_steps": 6,
        "exp_manager__checkpoint_callback_params__save_top_k": 1,
        "exp_manager__checkpoint_callback_params__mode": "max",  # the loss of other records grows
    }
    for name, changes in (("log", {}), ("background", ASYNC)):
        (answer,) = troubled(1, NOTHING, LimitedWriters({4}), log_dir=tmp_path / name, **validated, **changes)
        assert answer["error"] is None
        assert all("step=4" in text for text in answer["said"]) and len(answer["said"]) == 2
        assert [[path.split("_")[0] for path in sorted(names)] for names in answer["whole"][4:]] == [
            ["step=2-last", "step=2-val"]
        ] * 2
        names = sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
        assert [each.split("_loss")[0] for each in names] == ["megatron_gpt-step=6-last", "megatron_gpt-step=6-val"]


# what rank 0 alone writes, while the others wait for it

_MEGATRON = Version(megatron_version).release[:2]
_COMMON = "megatron.core.dist_checkpointing." + (
    "strategies.common.TorchCommonSaveStrategy" if _MEGATRON == (0, 16) else "serialization"
)
PARTS = {
    "the folder": ("nemo_kto.runtime.checkpoint.ShardedCheckpointIO", "_make_room"),
    "common.pt": (_COMMON, "save_common"),
    ".metadata": ("torch.distributed.checkpoint.FileSystemWriter", "finish"),
    "metadata.json": ("megatron.core.dist_checkpointing.serialization", "save_config"),
    "manifest.json": ("nemo_kto.runtime.checkpoint", "write_manifest"),
}
if _MEGATRON >= (0, 19):
    del PARTS["common.pt"]  # it is written as tensors are


class WithoutRoom:
    """Lets one part of a checkpoint find a full disk in each of some saves: number of the save, from 1 -> part."""

    def __init__(self, parts: dict[int, str]) -> None:
        self.parts = parts

    def __call__(self) -> None:
        saves = [0]
        for part in PARTS:
            place, name = PARTS[part]
            setattr(_found(place), name, self._short(part, saves, getattr(_found(place), name)))

    def _short(self, part: str, saves: list[int], original: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **keywords: Any) -> Any:
            if part == next(iter(PARTS)):
                saves[0] += 1
            limit(0 if self.parts.get(saves[0]) == part else None)
            try:
                return original(*arguments, **keywords)
            finally:
                limit(None)

        return write


def _found(place: str) -> Any:
    import importlib

    names = place.split(".")
    for count in range(len(names), 0, -1):
        with contextlib.suppress(ImportError):
            found = importlib.import_module(".".join(names[:count]))
            for name in names[count:]:
                found = getattr(found, name)
            return found
    raise AssertionError(place)


def test_no_rank_waits_for_one_that_cannot_write(troubled: Run, tmp_path: Path) -> None:
    """Each part in turn; two in a row, as the third would end the run."""
    parts = dict(zip((1, 2, 4, 5, 7)[: len(PARTS)], PARTS, strict=True))
    answers = troubled(2, NOTHING, WithoutRoom(parts), **TP2, trainer__kto__max_steps=8)
    assert [answer["error"] for answer in answers] == [None, None]
    assert [step_of(Path(text.split()[2])) for text in answers[0]["said"]] == list(parts)
    assert all("could not be written: " in text for text in answers[0]["said"])
    assert answers[0]["whole"] == last(0, 0, 0, 3, 3, 3, 6, 6 if "common.pt" in PARTS else 7)
    assert newest_whole(tmp_path / "log" / "checkpoints", checksums=True)[0] is not None


def test_the_last_one_is_tried_again(troubled: Run, tmp_path: Path) -> None:
    answers = troubled(2, NOTHING, WithoutRoom({1: "metadata.json"}), **TP2, trainer__kto__max_steps=1)
    assert [answer["error"] for answer in answers] == [None, None]
    assert "It is the last one of the run, and is tried again in" in answers[0]["said"][0]
    assert newest_whole(tmp_path / "log" / "checkpoints", checksums=True)[0] is not None


def test_without_the_last_one_the_run_ends_in_an_error(troubled: Run, tmp_path: Path) -> None:
    """Before the export, which would look like the end of it."""
    answers = troubled(2, NOTHING, LimitedWriters({2}), **TP2, trainer__kto__max_steps=2, export__enabled=True)
    folder = tmp_path / "log" / "checkpoints"
    for answer in answers:
        assert "step=2-last could not be written: " in answer["error"]
        assert f"it goes on from {folder}/megatron_gpt-step=1-last." in answer["error"]
    assert len(answers[0]["said"]) == 3
    assert not (tmp_path / "log" / "hf").exists()


def test_a_log_folder_that_is_gone(troubled: Run, tmp_path: Path) -> None:
    (answer,) = troubled(1, Gone())
    assert answer["error"] is None
    said = "\n".join(answer["said"])
    assert "TensorBoardLogger cannot write: its folder is not there any more." in said
    assert "TensorBoardLogger can write again" in said
    assert "step=2-last is not there any more: somebody has removed it." in said
    assert newest_whole(tmp_path / "log" / "checkpoints", checksums=True)[0] is not None
    # what it noticed by, and lost, are the times of step 1, which step 2 writes before its loss
    assert set(read_series(tmp_path / "log")["train/loss"]) == {2, 3}
    assert set(read_series(tmp_path / "log")["train/time/gradients"]) == {2, 3}


class Gone:
    """Makes a `Disk` whose log folder is removed before the third step."""

    def __call__(self, folder: Path) -> Disk:
        return Disk(lambda: shutil.rmtree(folder.parent), lambda: None, {3}, {0}, folder)


def test_loggers_lose_lines_and_not_the_run(troubled: Run, root: Path, tmp_path: Path) -> None:
    """Neither TensorBoard nor the file with answers."""
    answering = {
        "generation__num_prompts": 1,
        "model__data__data_prefix__validation": str(root / "validation.jsonl"),
        "trainer__kto__val_check_interval": 3,
        "trainer__kto__max_steps": 6,
    }
    changes = {**answering, "exp_manager__create_checkpoint_callback": False}
    (answer,) = troubled(1, Limited({3, 4}, size=0), **changes)
    assert answer["error"] is None
    assert [text for text in answer["said"] if "generations" in text] == [
        f"{tmp_path / 'log' / 'generations.jsonl'} cannot be written: {REASON} (ulimit -f, or a limit of the file "
        "system). Training goes on without it."
    ]
    logged = [text for text in answer["said"] if text.startswith("TensorBoardLogger")]
    assert len(logged) == 2 and REASON in logged[0] and "can write again" in logged[1]
    steps = set(read_series(tmp_path / "log")["train/loss"])
    assert {0, 4, 5} <= steps and 2 not in steps
    assert len((tmp_path / "log" / "generations.jsonl").read_text().splitlines()) == 1  # of step 6


# real file systems


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return `small_disk(options)`: a folder that a file system in memory, with these options, is mounted on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(options: str) -> Path:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if made.returncode:
            pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class Filled:
    """Makes a `Disk` that is full in some steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def __call__(self, folder: Path) -> Disk:
        filler = folder.parents[1] / "filler"

        def fill() -> None:
            with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * 4096)

        return Disk(fill, lambda: filler.unlink(missing_ok=True), self.steps, {0}, folder)


def test_a_full_disk(troubled: Run, small_disk: Callable[[str], Path]) -> None:
    """From the second step to the third; then somebody makes room."""
    place = small_disk("size=4m")
    (answer,) = troubled(1, Filled({2, 3}), log_dir=place / "log")
    assert answer["error"] is None
    failed = [text for text in answer["said"] if "could not be written" in text]
    assert len(failed) == 2 and all("no space is left on its file system. Nothing is left" in text for text in failed)
    assert answer["whole"] == last(0, 1, 1, 1)
    assert newest_whole(place / "log" / "checkpoints", checksums=True)[0] is not None


def test_a_disk_without_inodes(troubled: Run, small_disk: Callable[[str], Path]) -> None:
    """Room for what a run keeps, and not for a second checkpoint beside it."""
    place = small_disk("size=16m,nr_inodes=48")
    (answer,) = troubled(1, NOTHING, log_dir=place / "log")
    assert "no inode is left on its file system, which holds too many files." in answer["error"]
    assert newest_whole(place / "log" / "checkpoints", checksums=True)[0] is not None


class ReadOnly:
    """Makes a `Disk` that is read-only in some steps."""

    def __call__(self, folder: Path) -> Disk:
        place, mounted = str(folder), []

        def protect() -> None:  # TensorBoard's file is open, so the folder is made a mount of its own
            subprocess.run(["mount", "--bind", place, place], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
            mounted.append(place)

        def release() -> None:
            while mounted:
                subprocess.run(["umount", mounted.pop()], check=True)

        return Disk(protect, release, {2}, {0}, folder)


def test_a_disk_that_becomes_read_only(troubled: Run, small_disk: Callable[[str], Path]) -> None:
    place = small_disk("size=16m")
    (answer,) = troubled(1, ReadOnly(), log_dir=place / "log")
    assert answer["error"] is None
    assert any("step=2-last could not be written: its file system is read-only." in text for text in answer["said"])
    assert newest_whole(place / "log" / "checkpoints", checksums=True)[0] is not None


def test_too_little_room_is_said_at_the_start(troubled: Run, small_disk: Callable[[str], Path]) -> None:
    """A checkpoint of the tiny model has 39,200 parameters of 16 bytes, its export as many of 4."""
    place = small_disk("size=1300k")
    (answer,) = troubled(1, NOTHING, log_dir=place / "log", export__enabled=True, trainer__kto__max_steps=1)
    assert answer["error"] is None
    (said,) = answer["said"]
    assert said.startswith(
        f"This run is going to write 1.4 MB to the file system of {place / 'log' / 'checkpoints'}, where "
    )
    assert "checkpoints, 627 kB each and up to 2 at a time and the exported model." in said
    assert "exp_manager.checkpoint_callback_params.save_top_k" in said
