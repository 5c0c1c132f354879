"""What the ranks of a run know of each other: who is where, how far it is, and why it has ended.

Each rank has a thread that tells the store how far it is, and asks whether the run hangs; on a connection of its own,
as the main thread's may be waiting. A rank that ends leaves its last words. So when an exchange breaks, those that are
left can say which rank is gone, and one of them does.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from nemo_kto import stopping
from nemo_kto.errors import KTOError, RankError, StoppedEarly
from nemo_kto.runtime.processes import ProcessName

T = TypeVar("T")

_BEAT = 2.0
"""Seconds between two signs of life."""

_PATIENCE = 5.0
"""Seconds in which it comes out why an exchange broke: more than two beats."""

_ANSWER = 3.0
"""Seconds in which the store answers, unless the process that holds it is gone or was stopped."""

_STAY = 5.0
"""Most seconds that a rank stays so that the others find out what it knows: more than two beats."""

_GOODBYE = 300.0
"""Most seconds that rank 0 needs to end its loggers."""

_BROKEN = ("gloo/", "NCCL", "Connection reset by peer", "Connection closed by peer")
"""What is in the messages of exchanges that broke, or were waited for in vain."""


class Ranks:
    """The ranks of a run, as one of them sees them.

    Args:
        store: Where they tell each other; nobody else writes there.
        rank: This one.
        processes: The process of each rank.
        step: Returns the number of steps taken.
        exit_codes: Returns rank -> exit code, as far as this process knows: of those it has started.

    Attributes:
        rank: This one.
        processes: The process of each rank.
        step: Returns the number of steps taken.
        hangs: Whether one has found that the run hangs.
        stop_together: Whether all are far enough to be stopped together; before that each ends by itself.
        settles: Whether the main thread is finding out what went wrong.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        processes: list[ProcessName],
        step: Callable[[], int],
        exit_codes: Callable[[], Mapping[int, int]] = dict,
    ) -> None:
        self.rank = rank
        self.processes = processes
        self.hangs = False
        self.stop_together = False
        self.settles = False
        self.step = step
        self._exit_codes = exit_codes
        self._store = store
        self._questions: queue.Queue[Callable[[dist.Store], None]] = queue.Queue()
        self._first_dead: list[int] = []  # others leave for them, and are dead then too
        self._heard: str | None = None  # what another rank says this run ends for
        self._ended = threading.Event()
        threading.Thread(target=self._talk, args=(store.clone(),), name="ranks", daemon=True).start()

    def end(self) -> None:
        """Say nothing any more."""
        self._ended.set()

    def _talk(self, store: dist.Store) -> None:
        """Tell the store how far this rank is, and ask what others want to know of it; in a thread."""
        beat = 0
        while not self._ended.is_set():
            beat += 1
            with contextlib.suppress(RuntimeError):  # it goes with rank 0
                store.set(f"beat {self.rank}", json.dumps([beat, self.step()]))
                self.hangs = self.hangs or store.check(["hang"])
                if self._heard is None and store.check(["lost"]):
                    self._heard = store.get("lost").decode()
                    store.set(f"heard {self.rank}", "")
            with contextlib.suppress(queue.Empty):
                self._questions.get(timeout=_BEAT)(store)

    def ask(self, question: Callable[[dist.Store], T]) -> T | None:
        """Return what the store says; None if it does not answer. For every thread but the main one."""
        answers: queue.Queue[T] = queue.Queue()

        def put(store: dist.Store) -> None:
            with contextlib.suppress(RuntimeError):
                answers.put(question(store))

        self._questions.put(put)
        try:
            return answers.get(timeout=_ANSWER)
        except queue.Empty:
            return None

    # last words

    def note(self, error: BaseException) -> None:
        """Leave last words, unless this rank only ends because another one has."""
        if isinstance(error, StoppedEarly | stopping.Stopped):
            self._leave_word("stopped", str(getattr(error, "reason", error)))
        elif isinstance(error, KTOError) and not _is_broken(error):
            self._leave_word("error", str(error))
        elif not _is_broken(error):
            self._leave_word("failure", f"{type(error).__name__}: {error}")

    def _leave_word(self, kind: str, text: str) -> None:
        with contextlib.suppress(RuntimeError):
            number = self._store.add("words", 1)
            self._store.set(f"words {number}", json.dumps([self.rank, kind, text]))

    def leave_together(self) -> None:
        """Wait until rank 0 has ended its part: the first to end may have the rest killed, as `srun` does."""
        with contextlib.suppress(RuntimeError):
            if self.rank == 0:
                self._store.set("goodbye", "")
            else:
                _wait_for(lambda: self._store.check(["goodbye"]), seconds=_GOODBYE)

    # what went wrong

    def settle(self, error: BaseException) -> BaseException:
        """Return what this rank is to raise for what went wrong here, and see that one of all ranks says it.

        Where an exchange broke, that is what broke it, as far as it can be found out.
        """
        if len(self.processes) == 1:
            return error
        self.settles = True
        try:
            return self._settled(error)
        finally:
            self.settles = False

    def _settled(self, error: BaseException) -> BaseException:
        if self.hangs:  # the others end for that, and so does this one, with all that is to be said
            time.sleep(_GOODBYE)
        if _is_broken(error):
            error = self._explained(error)
        elif isinstance(error, KTOError):
            if self.rank != 0:  # if rank 0 has found the same, it says so
                _wait_for(self._is_said, seconds=_PATIENCE / 2)
            error.said_here = self._claim()
        self.stay_for_others(says=getattr(error, "said_here", False) is True)
        return error

    def stay_for_others(self, *, says: bool) -> None:
        """Stay while the others need this rank to find out what went wrong, and who says it.

        The store is rank 0's. Where it is gone, the first of those that are left speaks, and the others have to see
        that it is left. They may wait in an exchange with this one, and only their other threads see anything.

        Args:
            says: Whether that is this one.
        """
        try:
            self._store.set(f"heard {self.rank}", "")
            if self.rank == 0:
                _wait_for(self._all_have_heard, seconds=_STAY)
        except RuntimeError:
            near = sum(process.is_near for process in self.processes) - 1
            if says:
                _wait_for(lambda: len(self.dead()) == near, seconds=_STAY)

    def _all_have_heard(self) -> bool:
        left = set(range(len(self.processes))) - set(self.dead())
        return all(self._store.check([f"heard {rank}"]) for rank in left)

    def _explained(self, error: BaseException) -> BaseException:
        if stopping.requested() and not self.stop_together:
            return stopping.Stopped(str(stopping.requested()))  # so were the others, a moment before
        before = beats(self._store, len(self.processes))
        cause = _wait_for(lambda: self.cause(self._store), seconds=_PATIENCE)
        if cause is None:
            after = beats(self._store, len(self.processes))
            silent = [rank for rank in range(len(self.processes)) if before.get(rank) == after.get(rank)]
            if not silent:
                return error
            cause = f"{self.named(silent[0])} does not answer any more"
        return cause if isinstance(cause, stopping.Stopped) else self.lost(cause)

    def lost(self, cause: str) -> RankError:
        """Return the error of a run that has lost a rank."""
        found = RankError(f"{cause}. The others cannot go on without it. Run the same command again.")
        found.said_here = self._heard is None and self.claim()
        if found.said_here:
            with contextlib.suppress(RuntimeError):
                self._store.set("lost", cause)
        return found

    def cause(self, store: dist.Store | None) -> str | stopping.Stopped | None:
        """Return why another rank cannot be reached, if that is known by now.

        Args:
            store: The store; None if it does not answer.
        """
        for rank, kind, text in _words(store):
            if kind == "stopped":
                return stopping.Stopped(text)
            if rank != self.rank:
                return f"Rank {rank}: {text.rstrip('.')}" if kind == "error" else f"{self.named(rank)} failed: {text}"
        if stopping.requested() and not self.stop_together:
            return None
        if self._heard is not None:
            return self._heard
        for rank in self._first_dead or self.dead():
            step = beats(store, len(self.processes)).get(rank, (0, self.step()))[1]
            return f"{self.named(rank)} {self._end_of(rank)} after step {step}"
        return None

    def dead(self) -> list[int]:
        """Return the other ranks whose processes are gone, of those that can be looked at from here."""
        found = [rank for rank, process in enumerate(self.processes) if rank != self.rank and process.is_gone]
        self._first_dead = self._first_dead or found
        return found

    def _end_of(self, rank: int) -> str:
        """Return how a process that is gone has ended, in words."""
        code = _wait_for(lambda: self._exit_codes().get(rank), seconds=_PATIENCE / 5)
        if code is None:
            return "ended without a word, as when it is killed,"
        if code > 0:
            return f"ended with exit code {code}"
        why = " (by the system, if memory ran out)" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{why}"

    def named(self, rank: int) -> str:
        """Return a rank with its process, in words."""
        return f"Rank {rank} ({self.processes[rank]})"

    # who says it

    def _is_said(self) -> bool:
        with contextlib.suppress(RuntimeError):
            return self._store.add("said", 0) > 0
        return True

    def _claim(self) -> bool | None:
        with contextlib.suppress(RuntimeError):
            return self._store.add("said", 1) == 1
        return None

    def claim(self) -> bool:
        """Return whether it is for this rank to say what went wrong: the first one to ask."""
        claimed = self._claim()
        return self.is_first_here() if claimed is None else claimed  # without rank 0 there is no store

    def is_first_here(self) -> bool:
        """Return whether no rank before this one was left when the first was gone, of those that can be looked at."""
        dead = self._first_dead or self.dead()
        return not any(
            process.is_near and rank not in dead for rank, process in enumerate(self.processes[: self.rank])
        )


def beats(store: dist.Store | None, world_size: int) -> dict[int, tuple[int, int]]:
    """Return rank -> (number of its last sign of life, steps it had taken), as far as the store says it."""
    found: dict[int, tuple[int, int]] = {}
    if store is not None:
        with contextlib.suppress(RuntimeError):
            for rank in range(world_size):
                if store.check([f"beat {rank}"]):
                    number, step = json.loads(store.get(f"beat {rank}"))
                    found[rank] = number, step
    return found


def _words(store: dist.Store | None) -> list[tuple[int, str, str]]:
    """Return (rank, kind, text) of all that have left last words, the first one first."""
    found: list[tuple[int, str, str]] = []
    if store is not None:
        with contextlib.suppress(RuntimeError):
            for number in range(1, store.add("words", 0) + 1):
                rank, kind, text = json.loads(store.get(f"words {number}"))
                found.append((rank, kind, text))
    return found


def _is_broken(error: BaseException) -> bool:
    """Return whether an error only says that an exchange with other ranks broke."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError) or any(part in str(seen) for part in _BROKEN):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _wait_for(question: Callable[[], Any], *, seconds: float) -> Any:
    """Return what a question is answered with, once that is anything; None after so many seconds."""
    end = time.monotonic() + seconds
    while not (answer := question()):
        if time.monotonic() > end:
            return None
        time.sleep(0.1)
    return answer
