"""Disks that are full, read-only or gone: what to say of them, and how much room is left; without torch."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_kto.errors import CheckpointError, ConfigError

_REASONS = {
    errno.EROFS: "its file system is read-only",
    errno.EDQUOT: "the quota of this user is used up there",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.ENOENT: "its folder is not there any more",
    errno.EFBIG: "no file may become as large there (ulimit -f, or a limit of the file system)",
    errno.ENOTDIR: "a part of its path is a file",
    errno.EISDIR: "a folder is in its place",
    errno.ENAMETOOLONG: "its name is too long",
}

_LITTLE = 1 << 20
"""Bytes; a disk on which no more are left is full."""


def reason_of(error: BaseException, path: Path) -> str:
    """Return why something could not be written to `path`, in words, without a full stop.

    Args:
        error: What was raised. Errors of processes that write arrive as texts in others, with the number of the error
            in them; PyTorch's zip writer says no more than that it has failed.
        path: What could not be written; it need not be there.
    """
    number, text = _number_of(error), str(error).removeprefix("Worker failure: ")  # Megatron's
    usage = os.statvfs(existing(path))
    of_torch = number is None and ("inline_container" in text or "PytorchStreamWriter" in text)
    if number == errno.ENOSPC or (of_torch and usage.f_bavail * usage.f_frsize < _LITTLE):
        if usage.f_files and not usage.f_favail and usage.f_bavail:
            return "no inode is left on its file system, which holds too many files"
        return "no space is left on its file system"
    if of_torch:
        return "PyTorch could not write a file of it to its end"
    if "worker results" in text or "results_queue" in text:  # Megatron's
        return "a process that wrote a part of it has ended"
    if number is None:
        return (text.strip().splitlines() or [type(error).__name__])[0]
    return _REASONS.get(number, os.strerror(number))


def _number_of(error: BaseException | None) -> int | None:
    """Return the number of the operating system's error that is behind another one, if there is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        found = re.search(r"\[Errno (\d+)\]", str(error))
        if found:
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def free_bytes(path: Path) -> int:
    """Return how many bytes this user can still write to the file system of a path, which need not be there."""
    usage = os.statvfs(existing(path))
    return usage.f_bavail * usage.f_frsize


def as_size(count: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if count >= 100 or unit == "bytes" else f"{count:.2g} {unit}"


@contextmanager
def explained(path: Path, key: str = "") -> Iterator[None]:
    """Say in one sentence why something cannot be written.

    Args:
        path: What is written.
        key: The configuration key that names it, if there is one.

    Raises:
        ConfigError: The block raised an OSError, and a key names the place.
        CheckpointError: It did, and none does.
    """
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        text = f"{path} cannot be written: {reason_of(error, path)}."
        if key:
            raise ConfigError(f"{text} Mend that, or name another place in {key}.") from error
        raise CheckpointError(text) from error


def check_writable(folder: Path, key: str) -> None:
    """Try whether a folder could be made and written into, without leaving anything.

    Args:
        folder: The folder, which need not be there.
        key: The configuration key that names it.

    Raises:
        ConfigError: It could not.
    """
    with explained(folder, key), tempfile.TemporaryFile(dir=existing(folder)) as file:
        file.write(b"\0" * 4096)
        file.flush()
        os.fsync(file.fileno())
