"""Ends a run that hangs, and says where each of its ranks was.

A rank makes progress while it takes steps, and while its main thread comes to other places of the program, reads,
writes or computes: whatever it does is progress, a callback of the user's too, without having to say so. One that does
nothing of it for `trainer.timeout_minutes`, in an exchange that never ends or in a read that never returns, hangs.
Time in which the whole process did not run (Ctrl-Z, a suspended job) does not count.

The first rank to find this out has all of them write their stacks. A rank that cannot, as it was stopped or is lost in
a library that holds Python's lock, is woken and asked by a signal, from the same machine: then C code writes the
stack, into a file without a name that the others read.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from random import Random
from types import FrameType

import torch
import torch.distributed as dist

from nemo_kto import stopping
from nemo_kto.runtime.meeting import RankRules
from nemo_kto.runtime.processes import this_process, work_of
from nemo_kto.runtime.ranks import Ranks
from nemo_kto.runtime.stacks import STACK_SIGNAL, StackFile, in_words, place_of, read_stacks, report

_TICK = 1.0

_BUSY = 0.1
"""Share of the time; a thread that computes more than this does not hang."""

_FOR_STACKS = 10.0
"""Seconds in which the ranks write their stacks."""

_FOR_THE_MAIN_THREAD = 10.0
"""Seconds after the end of another rank in which this one's main thread should have found out by itself."""


class Watchdog:
    """Watches the thread that it is made in, of a rank, and with the others' the whole run.

    Args:
        ranks: The ranks.
        stacks: Where this rank's stacks are written on a signal.
        stack_numbers: That file's number in each rank's process.
        rules: How long a rank may be at one place, and where the stacks are written if it is longer.

    Attributes:
        ranks: The ranks.
        run_is_over: Whether it is no longer wrong that other ranks end.
    """

    def __init__(self, ranks: Ranks, *, stacks: StackFile, stack_numbers: list[int], rules: RankRules) -> None:
        self.ranks = ranks
        self.run_is_over = False
        self._stacks = stacks
        self._stack_numbers = stack_numbers
        self._limit = rules.timeout.total_seconds()
        self._folder = rules.hang_folder
        self._watched = threading.get_ident()
        self._thread_number = threading.get_native_id()
        self._ended = threading.Event()
        self._alone = 0.0  # seconds since another rank is gone
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Watch no more, and say nothing to the others."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            self.ranks.end()
            self._stacks.close()

    def _watch(self) -> None:
        (seen, computed), idle, before = self._look(), 0.0, time.monotonic()
        chance = Random()  # what comes back to the same place every second must not be found there each time
        while not self._ended.wait(_TICK * chance.uniform(0.5, 1.5)):
            now = time.monotonic()
            passed, before = min(now - before, 2 * _TICK), now  # what is more was not running itself
            found, seconds = self._look()
            works = found != seen or seconds - computed > _BUSY * passed
            idle, seen, computed = 0.0 if works else idle + passed, found, seconds
            if self.ranks.hangs or idle > self._limit:
                self._end_run()
            waits_for_the_dead = bool(self.ranks.dead()) and not self.run_is_over and not self.ranks.settles
            self._alone = self._alone + passed if waits_for_the_dead else 0.0
            if self._alone > _FOR_THE_MAIN_THREAD:
                self._end_alone()

    def _look(self) -> tuple[tuple[int, ...], float]:
        """Return numbers that stay the same while nothing happens, and the seconds that the thread has computed."""
        done, seconds = work_of(self._thread_number)
        # who waits for a GPU computes too, as it asks again and again
        return (self.ranks.step(), place_of(self._frame()), done), 0.0 if torch.cuda.is_available() else seconds

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._watched)

    # another rank is gone, and the main thread waits for it

    def _end_alone(self) -> None:
        """End this process as one that has lost another."""
        cause = self.ranks.ask(self.ranks.cause) or self.ranks.cause(None)
        if cause is None or isinstance(cause, stopping.Stopped):
            stopping.leave(stopping.STOPPED_EARLY)
        error = self.ranks.lost(cause)
        if error.said_here:
            stopping.say_anyhow(f"error: {error}")
        self.ranks.stay_for_others(says=error.said_here is True)
        stopping.leave(1)

    # the run hangs

    def _end_run(self) -> None:
        """Write down where this rank is, see that the others do, and end this process."""
        first = self.ranks.is_first_here()  # by now: those that have said where they are leave one by one
        step, where = self.ranks.step(), in_words(self._frame())
        stack = report(self._frame())
        stopped = self._wake_stopped()  # last, as the run then goes on for a moment
        leads = self.ranks.ask(lambda store: store.add("hang", 1) == 1)
        if leads is None:
            leads = first
        if signalled := self._stacks.read():
            stack = f"When it was woken:\n{signalled}\nSome seconds later:\n{stack}"
        self._write_stack(self.ranks.rank, step, stack)
        self.ranks.ask(lambda store: store.set(f"stack {self.ranks.rank}", json.dumps([step, where, stopped])))
        found = self._await_stacks(step, asks=first)
        silent = [rank for rank in range(len(self.ranks.processes)) if rank not in found]
        if leads:
            self._say(step, found, silent)
            self.ranks.ask(lambda store: store.set("said why", ""))
        else:
            self._await(lambda store: store.check(["said why"]))
        for rank in silent:
            self.ranks.processes[rank].signal(signal.SIGKILL)
        stopping.leave(1)

    def _wake_stopped(self) -> list[int]:
        """Let those ranks run again that were stopped, and have them write first where; return which they are."""
        stopped = [rank for rank, process in enumerate(self.ranks.processes) if process.is_stopped]
        for rank in stopped:
            self.ranks.processes[rank].signal(STACK_SIGNAL)
            self.ranks.processes[rank].signal(signal.SIGCONT)
        return stopped

    def _await_stacks(self, step: int, *, asks: bool) -> dict[int, tuple[str, list[int]]]:
        """Return rank -> (where it is, which ranks it found stopped), of those that have written their stacks.

        Args:
            step: Number of steps taken.
            asks: Whether this rank has C code write those of ranks near it that have not.
        """
        found: dict[int, tuple[str, list[int]]] = {}

        def ask(store: dist.Store) -> bool:
            for rank in range(len(self.ranks.processes)):
                if rank not in found and store.check([f"stack {rank}"]):
                    _, where, stopped = json.loads(store.get(f"stack {rank}"))
                    found[rank] = where, stopped
            return len(found) == len(self.ranks.processes)

        self._await(ask)
        for rank, process in enumerate(self.ranks.processes):
            if asks and rank not in found and not process.is_gone:
                process.signal(STACK_SIGNAL)
                time.sleep(_TICK)
                stack = read_stacks(process.pid, self._stack_numbers[rank]) or "It does not answer.\n"
                self._write_stack(rank, step, stack)
        return found

    def _await(self, question: Callable[[dist.Store], bool]) -> None:
        """Wait until the answer is yes, but not for ever."""
        end = time.monotonic() + _FOR_STACKS
        while not self.ranks.ask(question) and time.monotonic() < end:
            time.sleep(_TICK / 5)

    def _write_stack(self, rank: int, step: int, text: str) -> None:
        number = f"rank {rank} of {len(self.ranks.processes)}, after step {step}"
        head = f"{number}: {self.ranks.processes[rank]}, {datetime.now():%Y-%m-%d %H:%M:%S}"
        with contextlib.suppress(OSError):  # a file system that does not answer may be why the run hangs
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"rank{rank}.txt").write_text(f"{head}\n\n{text}", encoding="utf-8")

    def _say(self, step: int, found: dict[int, tuple[str, list[int]]], silent: list[int]) -> None:
        """Say which ranks hang, and where."""
        stopped = sorted({rank for _, ranks in found.values() for rank in ranks})
        parts = [f"{self.ranks.named(rank)} was stopped" for rank in stopped]
        parts += [f"{self.ranks.named(rank)} does not answer" for rank in silent if rank not in stopped]
        places: dict[str, list[int]] = {}
        for rank, (where, _) in sorted(found.items()):
            if rank not in stopped:
                places.setdefault(where, []).append(rank)
        for where, ranks in sorted(places.items(), key=lambda item: len(item[1]))[:4]:
            if len(ranks) == 1:
                parts.append(f"{self.ranks.named(ranks[0])} is in {where}")
            else:
                parts.append(f"Ranks {', '.join(map(str, ranks[:8]))}{'...' * (len(ranks) > 8)} are in {where}")
        stopping.say_anyhow(
            f"error: The run hangs: nothing has happened for {self._limit / 60:.3g} minutes "
            f"(trainer.timeout_minutes), after step {step}. {'. '.join(parts)}. The Python stack of each rank is in "
            f"{self._folder}. Run the same command again."
        )


def watch_over(
    store: dist.Store, *, step: Callable[[], int], exit_codes: Callable[[], Mapping[int, int]], rules: RankRules
) -> Watchdog:
    """Let the ranks know each other, and watch over this one and them; one gathering over the world.

    Args:
        store: Where they tell each other.
        step: Returns the number of steps taken.
        exit_codes: See `Ranks`.
        rules: See `Watchdog`.
    """
    stacks = StackFile()
    everyone = [(this_process(), stacks.number)] * dist.get_world_size()
    dist.all_gather_object(everyone, everyone[0])
    processes, numbers = zip(*everyone, strict=True)
    ranks = Ranks(store, rank=dist.get_rank(), processes=list(processes), step=step, exit_codes=exit_codes)
    stopping.outlive_parent()  # it says so instead when that one ends
    return Watchdog(ranks, stacks=stacks, stack_numbers=list(numbers), rules=rules)
