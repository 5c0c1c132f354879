"""How the processes of a run find each other, and see that all of them were given the same.

Rank 0 opens a store (torch's TCPStore) at MASTER_ADDR and MASTER_PORT, the others come to it. torch does that too, but
whoever meets a wrong port, or waits for one that never comes, waits for long and is not told for whom.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from nemo_kto import stopping
from nemo_kto.errors import ConfigError, KTOError, RankError
from nemo_kto.quiet import is_global_rank_zero


@dataclass(frozen=True, kw_only=True)
class RankRules:
    """What the ranks of a run hold each other to.

    Attributes:
        timeout: How long one may be at one place.
        hang_folder: Where they write their stacks if it takes longer.
        facts: What must be the same for all, see `check_alike`.
    """

    timeout: timedelta
    hang_folder: Path
    facts: Mapping[str, str]

    @property
    def start(self) -> timedelta:
        """How long the others wait for one to come: imports and data can take long, and are another thing."""
        return max(self.timeout, timedelta(minutes=10))

    @property
    def patience(self) -> timedelta:
        """How long torch waits for an exchange: a little longer, as it would not say where the others are."""
        return self.timeout + timedelta(minutes=1)


_ANSWER = 60.0
"""Seconds in which a store that has accepted a connection answers."""

_LOOK = 0.2

_WORD = 180.0
"""Most seconds that a rank which fails stays so that the others find out why."""

_QUICK = 30.0
"""Seconds of them that are not worth a line."""

_EXCHANGES = 2000
"""How many of the last exchanges torch's flight recorder keeps, for a run that hangs."""

_store: dist.Store | None = None
"""The store of this process, which the groups of several trainers in one program share."""

_groups = 0
"""Default groups that trainers have made in this process."""


def open_store(port: int, *, timeout: timedelta) -> int:
    """Open the store, as rank 0; return its port.

    Args:
        port: Where; 0 for any port that is free.
        timeout: For what is asked of it.

    Raises:
        ConfigError: The port is taken.
    """
    global _store
    try:
        server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(_taken(port)) from error
        try:
            server = socket.create_server(("", port))  # without IPv6
        except OSError as second:
            raise ConfigError(f"MASTER_PORT={port} cannot be opened: {second.strerror}.") from second
    port = server.getsockname()[1]
    _store = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )
    return port


def _taken(port: int) -> str:
    return (
        f"MASTER_PORT={port} is taken by another process on {socket.gethostname()}, perhaps of another run. Set "
        "MASTER_PORT to a free port, the same for all processes; if the run is on one machine, `unset MASTER_PORT`."
    )


def _reach_store(address: str, port: int, *, rank: int, timeout: timedelta) -> None:
    """Connect to the store that rank 0 opens.

    Raises:
        RankError: It does not.
    """
    global _store
    place = f"{address}:{port} (MASTER_ADDR and MASTER_PORT)"
    end = time.monotonic() + timeout.total_seconds()
    while True:  # torch would print where in its code it failed, each time it tries
        try:
            socket.create_connection((address, port), timeout=_ANSWER).close()
            break
        except OSError as error:
            if time.monotonic() > end:
                raise RankError(
                    f"Rank {rank} has not reached rank 0 at {place} within {_minutes(timeout)}: {error}. Is it "
                    "running, and is this its address?"
                ) from error
        time.sleep(_LOOK)
    found: list[dist.Store] = []
    # in a thread, as torch would wait for the answer of something else for ever
    connecting = threading.Thread(target=_connect, args=(address, port, timeout, found), daemon=True)
    connecting.start()
    connecting.join(min(_ANSWER, timeout.total_seconds()))
    if not found:
        raise RankError(f"What answers rank {rank} at {place} is not rank 0 of this run. {_taken(port)}")
    _store = found[0]


def _connect(address: str, port: int, timeout: timedelta, found: list[dist.Store]) -> None:
    try:
        found.append(dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False))
    except dist.DistError:  # said by the one who waits
        return


def join(backend: str, *, address: str, port: int, rank: int, world_size: int, rules: RankRules) -> dist.Store:
    """Make torch's default group, once all ranks are there; return a store for whatever else they tell each other.

    A group that is there already is kept.

    Raises:
        RankError: Not all of them come; names those that are missing.
        ConfigError: The port is taken.
    """
    global _store, _groups
    _groups += 1
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_EXCHANGES))
    if dist.is_initialized():
        return dist.PrefixStore(f"nemo_kto {_groups}", dist.distributed_c10d._get_default_store())
    if _store is None and world_size == 1:
        _store = dist.HashStore()
    elif _store is None and _holds_store(rank == 0):
        open_store(port, timeout=rules.start)
    elif _store is None:
        _reach_store(address, port, rank=rank, timeout=rules.start)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    store = _part_of(_store, _groups)
    _await_everyone(store, rank=rank, world_size=world_size, timeout=rules.start)
    group = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group, rank=rank, world_size=world_size, timeout=rules.patience)
    return store


def _part_of(store: dist.Store, group: int) -> dist.Store:
    """Return what ranks tell each other in a store when they meet for the first, the second ... time."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"nemo_kto {restarts}.{group}", store)


def _holds_store(is_first: bool) -> bool:
    """Return whether this process holds the store: rank 0 does, unless torchrun's own process has one."""
    return is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _await_everyone(store: dist.Store, *, rank: int, world_size: int, timeout: timedelta) -> None:
    """Wait until all ranks have come this far."""
    store.set(f"here {rank}", socket.gethostname())
    store.add("here", 1)
    end = time.monotonic() + timeout.total_seconds()
    while store.add("here", 0) < world_size:
        if store.check([_word_key()]):
            found = RankError(f"{store.get(_word_key()).decode()}. The others cannot begin without it.")
            found.said_here = rank == 0  # one that has failed has said so itself
            with contextlib.suppress(RuntimeError):  # rank 0 has left by now
                _stay(store, world_size=world_size, holds=_holds_store(rank == 0))
            raise found
        if time.monotonic() > end:
            missing = [str(other) for other in range(world_size) if not store.check([f"here {other}"])]
            raise RankError(
                f"Of {world_size} ranks, {_listed(missing)} did not come within {_minutes(timeout)}. Do "
                "trainer.devices and trainer.num_nodes say what was started? Look at what the missing ones have "
                "printed; if they only need longer, raise trainer.timeout_minutes."
            )
        time.sleep(_LOOK)


def leave_word(word: str, address: str, port: int, *, rank: int, world_size: int | None) -> None:
    """Tell the ranks that wait for this one, or soon will, why it ends; those that have met know it otherwise.

    Args:
        word: This rank and why it ends, in words.
        address: Rank 0's machine.
        port: The port there.
        rank: This rank, as far as it is known.
        world_size: How many there are; None if that is not known.
    """
    if _groups:
        return
    holds = _holds_store(is_global_rank_zero())
    line = f"{word}. To tell the other ranks takes up to {_WORD:.0f} s."
    late = threading.Timer(_QUICK, stopping.say_anyhow, [line])
    late.daemon = True
    late.start()
    try:
        if _store is None and holds:
            open_store(port, timeout=timedelta(seconds=_WORD))
        elif _store is None:
            _reach_store(address, port, rank=rank, timeout=timedelta(seconds=_WORD))
        assert _store is not None
        store = _part_of(_store, 1)
        store.set(_word_key(), word)
        _stay(store, world_size=world_size, holds=holds)
    except (KTOError, RuntimeError):  # rank 0 does not come, or has left: nobody waits there
        return
    finally:
        late.cancel()


def _word_key() -> str:
    """Return the key of a rank's word: the port of a job of Slurm may be another one's too."""
    return f"word of {os.environ.get('SLURM_JOB_ID', 'a rank')}"


def _stay(store: dist.Store, *, world_size: int | None, holds: bool) -> None:
    """Say that this rank knows of a failure; if it holds the store, stay until all do."""
    known = store.add("know", 1)
    end = time.monotonic() + _WORD
    while holds and known != world_size and time.monotonic() < end:
        time.sleep(_LOOK)
        known = store.add("know", 0)


def _minutes(timeout: timedelta) -> str:
    return f"{timeout.total_seconds() / 60:.3g} minutes"


def check_alike(facts: Mapping[str, str]) -> None:
    """Raise a ConfigError, on all ranks, when one was given something else; one gathering of a digest over the world.

    Args:
        facts: What must be the same everywhere: name -> value, both in words.
    """
    world_size = dist.get_world_size()
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
    digests = [""] * world_size
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    everyone: list[tuple[str, Mapping[str, str]]] = [("", {})] * world_size
    dist.all_gather_object(everyone, (socket.gethostname(), dict(facts)))
    differences = [
        sentence
        for name in dict.fromkeys(name for _, facts in everyone for name in facts)
        if (sentence := _difference(name, [(host, facts.get(name, "not there")) for host, facts in everyone]))
    ]
    more = f" ({len(differences) - 3} more differ.)" if len(differences) > 3 else ""
    raise ConfigError(
        f"The ranks of this run were not given the same. {' '.join(differences[:3])}{more} Start all of them with the "
        "same command, files and installed packages."
    )


def _difference(name: str, values: Sequence[tuple[str, str]]) -> str | None:
    """Return who has which value of something, in words; None if all have the same."""
    ranks_of: dict[str, list[int]] = {}
    for rank, (_, value) in enumerate(values):
        ranks_of.setdefault(value, []).append(rank)
    if len(ranks_of) == 1:
        return None
    parts = []
    for value, ranks in sorted(ranks_of.items(), key=lambda item: item[1][0]):
        hosts = list(dict.fromkeys(values[rank][0] for rank in ranks))
        parts.append(f"{value} on {_listed([str(rank) for rank in ranks])} ({_short(hosts)})")
    return f"{name} is {', and '.join(parts)}."


def _listed(ranks: Sequence[str]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {_short(ranks)}"


def _short(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
