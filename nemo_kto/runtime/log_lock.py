"""One run at a time in a log folder: two would remove each other's checkpoints.

The lock is a folder in the log folder: to rename one is atomic on every file system, also over NFS, and NeMo's
exp_manager puts files aside. It says which process holds it, and that process touches it every few seconds. A holder
that can be looked at lives while its process does; one on another machine as long as it is seen to touch the lock, so
that clocks need not agree.

What a run needs on disk while it lasts is kept in the lock, so that it goes with it, also when the run was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from nemo_kto import stopping
from nemo_kto.errors import ConfigError
from nemo_kto.runtime.disk import explained
from nemo_kto.runtime.processes import ProcessName, this_process

logger = logging.getLogger(__name__)

FOLDER = "lock"

_OWNER = "owner.json"

_TOUCH = 10.0
"""Seconds between two touches."""

_SILENCE = 90.0
"""Seconds without one after which a holder that cannot be looked at counts as dead."""

_LONG_AGO = 3600.0
"""Age of the last touch at which nobody has to wait and see: more than clocks differ."""


@contextlib.contextmanager
def log_folder_held(log_dir: Path, key: str) -> Iterator[Path]:
    """Hold the lock of a log folder, which is made if need be; yields the lock's own folder.

    Args:
        log_dir: The log folder.
        key: The configuration key that names it.

    Raises:
        ConfigError: Another run holds it, or nothing can be written there.
    """
    with explained(log_dir, key):
        log_dir.mkdir(parents=True, exist_ok=True)
        keeper = _Keeper(_take(log_dir))
    try:
        yield keeper.lock
    finally:
        keeper.end()


def _take(log_dir: Path) -> Path:
    """Make the lock, once whoever holds it is known to be dead."""
    lock, mine = log_dir / FOLDER, _aside(log_dir)
    mine.mkdir()
    try:
        text = json.dumps({**dataclasses.asdict(this_process()), "lock": mine.name})
        (mine / _OWNER).write_text(text + "\n", encoding="utf-8")
        while True:
            _remove_abandoned(log_dir)
            try:
                mine.rename(lock)  # fails where there is one, which is never empty
                return lock
            except OSError:
                if not lock.is_dir():
                    raise
            _take_from_the_dead(lock, now=_touched(mine))
    except BaseException:
        shutil.rmtree(mine, ignore_errors=True)
        raise


def _take_from_the_dead(lock: Path, *, now: float) -> None:
    """Remove a lock whose holder is dead.

    Args:
        lock: The lock.
        now: The time of its file system.

    Raises:
        ConfigError: The holder lives.
    """
    holder, name = _holder(lock)
    if name is None:  # it has been given back, or is no lock
        if lock.is_dir() and any(lock.iterdir()) and not (lock / _OWNER).exists():
            raise _in_the_way(lock)
        return
    gone = holder.is_gone if holder is not None and holder.is_near else _is_silent(lock, holder, now=now)
    if not gone:
        raise _in_use(lock, holder)
    aside = _aside(lock.parent)
    try:
        lock.rename(aside)
    except FileNotFoundError:  # another one was faster
        return
    if _holder(aside)[1] != name:  # it was, and has made a lock of its own
        aside.rename(lock)
        return
    logger.warning("The run that wrote to %s (%s) is gone: this one goes on there.", lock.parent, holder)
    shutil.rmtree(aside, ignore_errors=True)


def check_free(log_dir: Path) -> None:
    """Raise a ConfigError if it is certain, without waiting, that another run holds the lock of a log folder."""
    lock = log_dir / FOLDER
    holder, _ = _holder(lock)
    if holder is not None and holder.is_near and not holder.is_gone:
        raise _in_use(lock, holder)


def state_of(log_dir: Path) -> tuple[bool, str] | None:
    """Return (whether a run would be refused, what there is to say) of the lock of a log folder; None without one.

    Waits for nothing, so of a holder on another machine it can only say when it gave its last sign of life.
    """
    lock = log_dir / FOLDER
    holder, name = _holder(lock)
    if name is None:
        if not lock.exists():
            return None
        return True, str(_in_the_way(lock))
    if holder is not None and holder.is_near:
        if holder.is_gone:
            return False, f"{holder} held it and is gone; the next run takes over"
        return True, str(_in_use(lock, holder))
    try:
        silent = time.time() - _touched(lock)
    except FileNotFoundError:  # given back
        return None
    who = f"a run elsewhere ({holder or 'not readable'})"
    if silent > _LONG_AGO:
        return False, f"{who} held it and is silent; the next run takes over"
    return False, (
        f"{who} holds it, whose last sign of life is {max(silent, 0):.0f} s old by this machine's clock. The next run "
        f"waits up to {_SILENCE:.0f} s for another one, and is refused if it comes"
    )


def _in_the_way(lock: Path) -> ConfigError:
    return ConfigError(f"{lock} is in the way. Name another folder in exp_manager.explicit_log_dir, or remove it.")


def _in_use(lock: Path, holder: ProcessName | None) -> ConfigError:
    return ConfigError(
        f"Another run ({holder}) is writing to {lock.parent}. Wait for its end or stop it; or name another folder in "
        "exp_manager.explicit_log_dir."
    )


def _holder(lock: Path) -> tuple[ProcessName | None, str | None]:
    """Return who holds a lock, and the name that tells this lock from others there; None where that is not known."""
    try:
        found = json.loads((lock / _OWNER).read_text(encoding="utf-8"))
        name = str(found.pop("lock"))
        return ProcessName(**found), name
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, "unreadable"


def _is_silent(lock: Path, holder: ProcessName | None, *, now: float) -> bool:
    """Return whether a holder that cannot be looked at does not touch its lock; waits until that is clear."""
    try:
        before = _touched(lock)
        if now - before > _LONG_AGO:
            return True
        logger.warning(
            "%s is held by a run elsewhere (%s). Waiting up to %.0f s for a sign of life.",
            lock.parent,
            holder or "not readable",
            _SILENCE,
        )
        waited = 0.0
        while waited < _SILENCE:
            time.sleep(min(1.0, _SILENCE))
            waited += min(1.0, _SILENCE)
            if _touched(lock) != before:
                return False
    except FileNotFoundError:
        pass  # given back
    return True


def _touched(lock: Path) -> float:
    """Return when a lock was touched, in the time of its file system."""
    with (lock / _OWNER).open("rb") as file:  # opening a file asks an NFS server how it is now
        return os.fstat(file.fileno()).st_mtime


class _Keeper(threading.Thread):
    """Touches a lock; ends this process when another run has taken it over, as that one writes there now.

    A lock that is gone without another in its place went with the log folder; with that it comes back.
    """

    def __init__(self, lock: Path) -> None:
        super().__init__(name="log folder", daemon=True)
        self.lock = lock
        self._owner = os.open(lock / _OWNER, os.O_RDWR)
        self._ended = threading.Event()
        self.start()

    def end(self) -> None:
        """Give the lock back."""
        self._ended.set()
        self.join()
        if _is_held(self.lock, self._owner):
            _remove(self.lock)
        os.close(self._owner)

    def run(self) -> None:
        """Do so until the end."""
        while not self._ended.wait(_TOUCH):
            with contextlib.suppress(OSError):
                os.utime(self._owner)
            if _is_held(self.lock, self._owner):
                continue
            try:
                self._make_anew()
            except ConfigError:
                stopping.say(
                    f"error: Another run has taken over {self.lock}. This run ends, as two in one folder would remove "
                    "each other's checkpoints."
                )
                stopping.leave(1)
            except OSError:  # not there, or full: whoever has something to write there says so
                continue

    def _make_anew(self) -> None:
        if self.lock.parent.is_dir():
            lost, self._owner = self._owner, os.open(_take(self.lock.parent) / _OWNER, os.O_RDWR)
            os.close(lost)


def _is_held(lock: Path, owner: int) -> bool:
    """Return whether a lock is still the one that `owner` is an open file of."""
    try:
        return os.path.samestat(os.fstat(owner), (lock / _OWNER).stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # of a file system that does not answer just now
        return True


def _remove(lock: Path) -> None:
    aside = _aside(lock.parent)
    with contextlib.suppress(FileNotFoundError):
        lock.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(log_dir: Path) -> None:
    """Remove what processes of this machine have left that were killed while they took a lock or gave one back."""
    for left in log_dir.glob(f"{FOLDER}-*"):
        holder, _ = _holder(left)
        if holder is not None and holder.is_gone:
            shutil.rmtree(left, ignore_errors=True)


def _aside(log_dir: Path) -> Path:
    return log_dir / f"{FOLDER}-{uuid.uuid4().hex}"
