"""Sources -> token stores, made once: a store is found again by content, tokenizer and settings.

Of several processes that start at once, on one machine or several, one makes the store and the others wait for it. A
store that a killed process was making is made anew; where the file system knows no locks, it is made more than once,
and the first to be complete counts.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import loky
import psutil
from tqdm import tqdm

from nemo_kto.data.reading.chunks import MAX_SHOWN, Chunk, bad_records_error, parse_chunk, read_chunks
from nemo_kto.data.reading.parts import expected_rows
from nemo_kto.data.reading.records import BadRecord
from nemo_kto.data.reading.sources import Source
from nemo_kto.data.tokens.content_memo import locked, remembered_digest
from nemo_kto.data.tokens.store import StoreWriter, TokenChunk, TokenStore, make_chunk
from nemo_kto.data.tokens.tokenization import Encoder
from nemo_kto.data.tokens.tokenizer import tokenizer_digest
from nemo_kto.errors import DataError
from nemo_kto.quiet import is_global_rank_zero

logger = logging.getLogger(__name__)

_VERSION = 8
"""Of everything between a row and its tokens: to be raised when the same row becomes other tokens."""

_ROWS = 256
"""Rows tokenised per call: few enough that what waits for many processes is small, even of long records."""

_FEW = 32
"""With fewer calls, starting processes takes longer than they save."""

_MAX_WORKERS = 32
"""Beyond that, the one process that reads cannot keep the others busy."""

_PARTIAL = ".partial"


class TokenCache:
    """A folder of token stores.

    Args:
        folder: The folder; made when something is to be kept in it.
        encoder: What makes tokens of records.
        workers: Processes that tokenise; None for as many as there are cores to run on, but no more than 32.
    """

    def __init__(self, folder: Path, encoder: Encoder, *, workers: int | None = None) -> None:
        self._folder = folder
        self._encoder = encoder
        self._workers = workers or min(len(os.sched_getaffinity(0)), _MAX_WORKERS)
        if type(encoder.tokenizer).__module__.partition(".")[0] == "transformers_modules":
            self._workers = 1  # its class is made of a file that other processes cannot import
        self._tokenizer_digest = tokenizer_digest(encoder.tokenizer)
        self._images_digest = None if encoder.images is None else encoder.images.tokens.digest()

    def tokens_of(self, source: Source, *, skip_bad: bool) -> TokenStore:
        """Returns a source's tokens, from disk if they are there.

        Args:
            source: The source.
            skip_bad: Leave out records that cannot be used; otherwise they are an error.

        Raises:
            DataError: See `read_chunks`; records cannot be used; or the store cannot be written.
        """
        final = self._folder / self._key(source)
        try:
            store = _open(final, _base(source))
            if store is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                with locked(final.with_suffix(".lock"), f"tokenizes {source.path}"):
                    store = _open(final, _base(source)) or self._make(source, final, skip_bad=skip_bad)
        except OSError as error:
            raise DataError(
                f"The tokens of {source.path} cannot be written to {self._folder} ({error.strerror or error}). "
                "Name another folder in model.data.cache_dir."
            ) from error
        if store.num_bad and not skip_bad:
            raise bad_records_error(store.bad_records(MAX_SHOWN + 1))
        return store

    def _key(self, source: Source) -> str:
        parts = [
            _VERSION,
            remembered_digest(source, self._folder),
            self._tokenizer_digest,
            asdict(self._encoder.settings),
            asdict(source.reader),
            [source.split, source.name],
            self._images_digest,
        ]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _make(self, source: Source, final: Path, *, skip_bad: bool) -> TokenStore:
        _remove_abandoned(final)
        partial = _partial(final)
        try:
            with StoreWriter(partial, _base(source)) as writer, contextlib.closing(self._chunks(source)) as chunks:
                bad: list[BadRecord] = []
                for chunk in chunks:
                    writer.add(chunk)
                    bad += [] if skip_bad else chunk.bad
                    if len(bad) > MAX_SHOWN:
                        raise bad_records_error(bad)
            try:
                partial.rename(final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another one was faster
                    raise
            return TokenStore(final, _base(source))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            _remove_abandoned(final)  # a killed process gives its lock back a moment before it is gone

    def _chunks(self, source: Source) -> Generator[TokenChunk, None, None]:
        """Yields the tokens of a source in order; the process that speaks for the run tells how far it is."""
        started, done = time.monotonic(), 0
        speaks = is_global_rank_zero()
        if speaks:
            logger.info("Tokenizing %s", source.path)
        with (
            contextlib.closing(_in_order(read_chunks(source, _ROWS), self._encoder, self._workers)) as chunks,
            tqdm(
                desc=f"Tokenizing {Path(source.path).name}",
                total=expected_rows(source) if speaks else None,
                unit=" rows",
                disable=None if speaks else True,  # None: where the output is no terminal
            ) as progress,
        ):
            for chunk, number in chunks:
                done += number
                progress.update(number)
                yield chunk
        if speaks:
            logger.info("Tokenized %d rows of %s in %.0f s", done, source.path, time.monotonic() - started)


def _base(source: Source) -> Path:
    """The folder that a source's own names of files are relative to."""
    path = Path(source.path).expanduser().absolute()
    return path if path.is_dir() else path.parent


def _open(folder: Path, base: Path) -> TokenStore | None:
    try:
        store = TokenStore(folder, base)
        if not store.is_outdated():
            return store
        logger.info("Images have changed: the tokens in %s are made anew.", folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("The tokens in %s are damaged (%s) and made anew.", folder, error)
    aside = _partial(folder)
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        folder.rename(aside)  # those who have opened it keep what they have
    shutil.rmtree(aside, ignore_errors=True)
    return None


def _partial(final: Path) -> Path:
    """A name for what this process is writing."""
    return final.with_name(f"{final.name}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}{_PARTIAL}")


def _remove_abandoned(final: Path) -> None:
    for left in final.parent.glob(f"{final.name}-*{_PARTIAL}"):
        if _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def _is_abandoned(partial: Path) -> bool:
    """Whether a process of this machine was writing there and is no more; of other machines' nothing is known."""
    host, pid, _ = partial.name.rsplit("-", 2)
    if not host.endswith(f"-{socket.gethostname()}"):
        return False
    try:
        return bool(psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _encode(chunk: Chunk, encoder: Encoder) -> tuple[TokenChunk, int]:
    return make_chunk(encoder.encode(list(parse_chunk(chunk))), file=chunk.file), len(chunk.rows)


def _in_order(rows: Iterator[Chunk], encoder: Encoder, workers: int) -> Generator[tuple[TokenChunk, int], None, None]:
    """Yields the tokens of all chunks in order, and of how many rows; several processes make many."""
    begin = list(itertools.islice(rows, _FEW))
    rows = itertools.chain(begin, rows)
    if workers == 1 or len(begin) < _FEW:
        for chunk in rows:
            yield _encode(chunk, encoder)
        return
    # New processes: in copies of this one, locks that its libraries' threads hold would never be free. And loky's,
    # because multiprocessing's run the user's script once more.
    pool = loky.ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(encoder, os.getpid()))
    waiting: deque[Future[tuple[TokenChunk, int]]] = deque()
    try:
        for chunk in rows:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) > 2 * workers:  # what is read ahead must not grow with the data
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "A process that tokenised data was ended, most likely for want of memory. Set model.data.tokenize_workers "
            "to fewer processes."
        ) from error
    finally:
        pool.shutdown(kill_workers=True)


_of_worker: dict[str, Encoder] = {}
"""The encoder of a process that does nothing but tokenise."""


def _encode_in_worker(chunk: Chunk) -> tuple[TokenChunk, int]:
    return _encode(chunk, _of_worker["encoder"])


def _start_worker(encoder: Encoder, parent: int) -> None:
    _of_worker["encoder"] = encoder
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process when its parent has been killed; otherwise it would wait for work."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
