"""How a command ends when it is told to, from its first line on. Needs nothing but Python: the rest is loaded later.

SIGTERM (from Slurm, Kubernetes, `timeout`) and Ctrl-C mean the same: stop early, to be run again. While there is
nothing to be finished, which is so until training begins, the command ends at once; otherwise (`finish_first`) whoever
trains asks `requested()` and stops where it can. Both end with exit code `STOPPED_EARLY`. A second Ctrl-C ends all.

Python runs handlers of signals in the main thread, when that comes back from whatever library it is in, which may be
minutes. So a thread of its own reads the signals too, and does what cannot wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from nemo_kto.quiet import is_global_rank_zero

STOPPED_EARLY = 75
"""Exit code of a command that was stopped and goes on when it is run again: EX_TEMPFAIL of sysexits.h."""

INTERRUPTED = 130
"""Exit code of a command that was ended by a second Ctrl-C: that of a process that SIGINT kills."""

PARENT_VARIABLE = "NEMO_KTO_PARENT"
"""Environment variable: the process that has started this one as a rank of its run."""

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}

_GRACE = 5.0
"""Seconds in which the main thread has to get out of what it does; then the process ends all the same."""

_AGAIN = 2.0
"""Seconds in which a second Ctrl-C is the first: `timeout` and torchrun send it to the process and to its group."""

_PR_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """Raised in the main thread where a command ends at once."""

    def __init__(self, reason: str) -> None:
        super().__init__(STOPPED_EARLY)
        self.reason = reason


class _Count:
    """Tells the first signal from a second Ctrl-C; the main thread and the other one have one each."""

    def __init__(self) -> None:
        self._received = 0
        self._interrupted = 0.0

    def add(self, number: int) -> tuple[bool, bool]:
        """Return whether a signal is the first, and whether it is a second Ctrl-C."""
        self._received += 1
        again = False
        if number == signal.SIGINT:
            now = time.monotonic()
            again = bool(self._interrupted) and now - self._interrupted > _AGAIN
            self._interrupted = self._interrupted or now
        return self._received == 1, again


class _Signals:
    """The signals of this process.

    Attributes:
        replaced: The handlers in whose place ours are; empty as long as ours are not.
        by_command: Whether the process is a command of this package, which may end itself.
        first: The first signal that was received.
        until: What is finished before the end, in words; None if nothing is.
    """

    def __init__(self) -> None:
        self.replaced: dict[int, Any] = {}
        self.by_command = False
        self.first: int | None = None
        self.until: str | None = None
        self._handled = _Count()
        self._announced = threading.Lock()

    def take(self) -> None:
        """Put our handlers in place; one that is ignored, as Ctrl-C in a shell's background, stays so."""
        if self.replaced or threading.current_thread() is not threading.main_thread():
            return
        self._handled, self._announced, self.first = _Count(), threading.Lock(), None
        for number in _NAMES:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.replaced[number] = signal.signal(number, self.handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _NAMES)  # whoever started this process may have held them back

    def give_back(self) -> None:
        """Put the handlers back that were there."""
        for number, handler in self.replaced.items():
            signal.signal(number, handler)
        self.replaced = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, in the main thread; end at once if there is nothing to be finished."""
        first, again = self._handled.add(number)
        self.first = self.first or number
        if again and not self.by_command:
            raise KeyboardInterrupt
        if again:
            _end_at_once()
        if first:
            self.announce(number)
        if first and self.until is None:
            raise Stopped(_NAMES[signal.Signals(number)])

    def listen(self) -> None:
        """Do, in a thread, what cannot wait for the main one."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()

    def _listen(self, reader: int) -> None:
        seen = _Count()
        while True:
            for number in os.read(reader, 64):
                if number not in self.replaced:
                    continue
                first, again = seen.add(number)
                if again:
                    _end_at_once()
                if not first:
                    continue
                self.announce(number)
                if self.until is None:
                    late = threading.Timer(_GRACE, leave, [STOPPED_EARLY])
                    late.daemon = True
                    late.start()

    def announce(self, number: int) -> None:
        """Say, once, how the process ends."""
        name = _NAMES[signal.Signals(number)]
        if self.until is None:
            self.say_stopped(name)
        elif self._announced.acquire(blocking=False):
            how = "again" if number == signal.SIGINT else "twice"
            say(f"{name} received: the run stops {self.until}. Ctrl-C {how} stops it at once.")

    def say_stopped(self, reason: str) -> None:
        """Say that the process ends, unless something has been said already."""
        if self._announced.acquire(blocking=False):
            say(f"Stopped by {reason}; run the same command to continue.")


_signals = _Signals()


def take_signals() -> None:
    """Let this process, a command's, be stopped as this module says; the first thing that a command does."""
    end_with_parent()
    _signals.until = None
    if not _signals.by_command:
        _signals.by_command = True
        _signals.take()
        if _signals.replaced:
            _signals.listen()


def are_taken() -> bool:
    """Return whether this process ends, or comes to an end in order, when it is told to."""
    return bool(_signals.replaced)


def requested() -> str | None:
    """Return what told this process to stop; None if nothing has."""
    return None if _signals.first is None else _NAMES[signal.Signals(_signals.first)]


def finish_first(until: str) -> None:
    """From now on do not end at once, as somebody asks for `requested()` and ends in order.

    In a program that is no command of this package, take the signals over until `finished`.

    Args:
        until: When that is, to be said: "after this step".
    """
    _signals.until = until
    _signals.take()


def finished() -> None:
    """Undo `finish_first`."""
    _signals.until = None
    give_back()


def give_back() -> None:
    """Give the signals back to a program of its own; a command has nothing before it but its end, which is not cut."""
    if not _signals.by_command:
        _signals.until = None
        _signals.give_back()


@contextmanager
def held_back() -> Iterator[None]:
    """Keep the signals from processes that are started meanwhile, until those take them (`take_signals`) or for good.

    A process that is forked would die of them before it could say otherwise, and with it what it was started for.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NAMES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_forking = threading.local()


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NAMES)


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    """Have a forked process behave as any other, from its first moment on."""
    global _signals
    if _signals.replaced:
        signal.set_wakeup_fd(-1)
        for number in _signals.replaced:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        _signals = _Signals()
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def end_with_parent() -> None:
    """If this process is a rank that another one has started, let it be killed when that one ends."""
    parent = os.environ.pop(PARENT_VARIABLE, None)  # not for what this process starts
    if parent is not None:
        _set_death_signal(signal.SIGKILL)
        if os.getppid() != int(parent):
            os._exit(1)


def outlive_parent() -> None:
    """Undo `end_with_parent`, for a rank that looks after the others itself and says what it finds."""
    _set_death_signal(0)


def _set_death_signal(number: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


_companions: list[Callable[[], None]] = []
"""What ends the other ranks of the run with this one: kills those that it has started, or tells those that wait."""


def end_together(kill: Callable[[], None]) -> None:
    """Have `kill()` called when this process leaves without the interpreter's shutdown."""
    _companions.append(kill)


_leaving = threading.RLock()


def _begin_to_leave() -> None:
    """Return in the thread that ends this process; in any other, wait for that."""
    if not _leaving.acquire(blocking=False):
        while True:
            time.sleep(1)


def leave(code: int) -> NoReturn:
    """End this process, without the interpreter's shutdown and without leaving processes behind.

    Process groups of a failed start can hang in their destructors; helpers would keep this process's output open.
    """
    _begin_to_leave()
    for kill in _companions:
        with contextlib.suppress(OSError):
            kill()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def say(line: str) -> None:
    """Print a line on stderr, in the process that speaks for the run, whatever its threads are doing."""
    if is_global_rank_zero():
        say_anyhow(line)


def say_anyhow(line: str) -> None:
    """Print a line on stderr, whichever rank this is."""
    line_break = "\n" if os.isatty(2) else ""  # that of a progress bar is not ended
    with contextlib.suppress(OSError):  # a terminal that was closed is no reason not to go on
        os.write(2, f"{line_break}{line}\n".encode())


def say_stopped(reason: str) -> None:
    """Say that a command has ended early, unless it has said so already."""
    _signals.say_stopped(reason)


def _end_at_once() -> NoReturn:
    _begin_to_leave()  # both threads see the signal, and one says it
    say("Stopped at once by the second Ctrl-C: what was done since the last checkpoint is lost.")
    leave(INTERRUPTED)
