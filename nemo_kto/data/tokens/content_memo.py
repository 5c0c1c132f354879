"""What a source's content digest is, remembered beside the tokens, so that files which have not changed are not read.

A memo holds when each of the source's files has the size, the times of its last write and of its last change of any
kind, and the number on its disk that it had when it was read. The second time cannot be set by anybody, so a file that
was copied over another one with its old date is noticed. A file that was changed in the last seconds is read by
everyone and not remembered: another change at once might leave no other times, as disks count them in steps.

Of several processes that start at once one reads, and the others wait for its answer; where the file system has no
locks, or keeps them to one machine, one of each machine or every one does.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_kto.data.reading.parts import content_digest, plain_files
from nemo_kto.data.reading.sources import Source
from nemo_kto.quiet import is_global_rank_zero

logger = logging.getLogger(__name__)

_SETTLED = 10.0
"""Seconds since its last change from which on a file can be told from what it will be after the next one.

Disks count in steps of up to two seconds; the rest is for clocks of machines that do not quite agree.
"""

_Signature = list[list[str | int]]


def remembered_digest(source: Source, folder: Path) -> str:
    """Returns `content_digest(source)`, reading the files only if nothing is remembered of them.

    Args:
        source: The source.
        folder: Where memos are kept; where it cannot be written to, nothing is remembered.

    Raises:
        DataError: See `content_digest`.
    """
    files = plain_files(source)
    if not files or (signature := _signature(files)) is None or not _is_settled(signature, time.time()):
        return content_digest(source)  # which nobody could be told, so that nobody is to wait for it
    # the signature too: copies on disks of several machines have others, and nobody is to wait for those of another
    named = json.dumps([[str(file.absolute()) for file in files], signature])
    name = hashlib.blake2b(named.encode(), digest_size=16).hexdigest()
    memo = folder / f"{name}.digest"
    found = _recall(memo, signature)
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(memo.with_suffix(".digest.lock"), f"reads {source.path}"))
        except OSError as error:
            logger.debug("The digest of %s cannot be remembered: %s", source.path, error)
        found = _recall(memo, signature)
        if found is None:
            found = content_digest(source)
            if plain_files(source) == files and _signature(files) == signature:
                _remember(memo, signature, found)
    return found


def _signature(files: Sequence[Path]) -> _Signature | None:
    """What changes with a file, of each file; None if one cannot be looked at, which whoever reads it says."""
    found: _Signature = []
    for file in files:
        try:
            with file.open("rb") as handle:  # opening it makes network file systems ask for what is true now
                state = os.fstat(handle.fileno())
        except OSError:
            return None
        found.append([file.name, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino])
    return found


def _is_settled(signature: _Signature, now: float) -> bool:
    return all(max(int(mtime), int(ctime)) < (now - _SETTLED) * 1e9 for _, _, mtime, ctime, _ in signature)


def _recall(memo: Path, signature: _Signature) -> str | None:
    """The digest of files with a signature, if it is there."""
    try:
        content = json.loads(memo.read_text(encoding="utf-8"))
        return str(content["digest"]) if content["files"] == signature else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.debug("%s is of no use and made anew: %s", memo, error)
        return None


def _remember(memo: Path, signature: _Signature, digest: str) -> None:
    partial = memo.with_name(f"{memo.name}-{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(json.dumps({"digest": digest, "files": signature}), encoding="utf-8")
        partial.replace(memo)
    except OSError as error:
        logger.debug("The digest in %s cannot be kept: %s", memo, error)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Holds a lock that ends with its process, waiting for it; does nothing where the file system has none.

    Args:
        file: The lock.
        what: What another process that holds it does.
    """
    with file.open("ab") as handle:  # closing it gives the lock back
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if is_global_rank_zero():
                logger.info("Waiting for another process that %s (%s)", what, file)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            logger.debug("No lock to be held while this process %s: %s", what, error)
        yield
