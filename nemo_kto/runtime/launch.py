"""Who has started the processes of a run, found out in one place: from the environment, without asking for devices.

That is torchrun, Slurm's `srun`, somebody who sets the variables of torch by hand, or nobody: then the command starts
the other processes of its machine itself. The last is so in a batch script of Slurm too, and in a shell that it has
opened: there is one process then, however many tasks the job may have.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from nemo_kto.errors import ConfigError
from nemo_kto.runtime.layout import Layout

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""From here on numbers of a Slurm job's steps mean its batch script and the like; below, what `srun` has started."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Who has started this process.

    Attributes:
        starter: "torchrun", "Slurm" or "something else"; None if nobody has started it as one of several ranks.
        rank: Its global rank.
        local_rank: Its rank on this machine.
        world_size: How many processes were started; None if that is not known.
        on_each_node: How many of them on each node; None if that is not known.
        nodes: On how many nodes; None if that is not known.
        where_from: The variable that holds the rank.
    """

    starter: Literal["torchrun", "Slurm", "something else"] | None = None
    rank: int = 0
    local_rank: int = 0
    world_size: int | None = None
    on_each_node: int | None = None
    nodes: int | None = None
    where_from: str = ""

    def __str__(self) -> str:
        """Who it was, to be said of a run as a whole."""
        job = _slurm_job()
        inside = f" in Slurm's job {job}" if job else ""
        restarts = _number("SLURM_RESTART_COUNT", 0) if job else 0
        again = f", restart {restarts}" if restarts else ""
        return f"started by {self.starter or 'this command'}{inside}{again}"


def launch() -> Launch:
    """Return who has started this process.

    Raises:
        ConfigError: Variables contradict each other, or are no numbers.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _checked(_by_torchrun())
    if is_slurm_task():
        return _checked(_by_slurm())
    if "LOCAL_RANK" in os.environ:
        return Launch(
            starter="something else",
            rank=_number("LOCAL_RANK", 0),  # the global one is not known if there are several nodes
            local_rank=_number("LOCAL_RANK", 0),
            world_size=_number("WORLD_SIZE", 0) if "WORLD_SIZE" in os.environ else None,
            on_each_node=_number("LOCAL_WORLD_SIZE", 0) if "LOCAL_WORLD_SIZE" in os.environ else None,
            where_from="LOCAL_RANK",
        )
    on_each_node = _number("LOCAL_WORLD_SIZE", 0) if "LOCAL_WORLD_SIZE" in os.environ else None
    return Launch(on_each_node=on_each_node)


def _by_torchrun() -> Launch:
    size = _number("WORLD_SIZE", 1)
    here = _number("LOCAL_WORLD_SIZE", 0) if "LOCAL_WORLD_SIZE" in os.environ else None
    return Launch(
        starter="torchrun",
        rank=_number("RANK", 0),
        local_rank=_number("LOCAL_RANK", 0),
        world_size=size,
        on_each_node=here,
        nodes=_number("GROUP_WORLD_SIZE", -(-size // here)) if here else None,
        where_from="RANK",
    )


def _by_slurm() -> Launch:
    sizes = _tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"Slurm started {', '.join(map(str, sizes))} processes on its nodes; each node must have as many as the "
            "others. Give srun --ntasks-per-node instead of --ntasks."
        )
    for name, theirs in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if name in os.environ and _number(name, 0) != _number(theirs, 0):
            raise ConfigError(
                f"{name}={os.environ[name]} contradicts {theirs}={os.environ.get(theirs)}, which is Slurm's word for "
                f"it. `unset {name}`: Slurm starts the processes."
            )
    size = _slurm_tasks()
    return Launch(
        starter="Slurm",
        rank=_number("SLURM_PROCID", 0),
        local_rank=_number("SLURM_LOCALID", 0),
        world_size=size,
        on_each_node=sizes[0] if sizes else None,
        nodes=len(sizes) or _number("SLURM_STEP_NUM_NODES", _number("SLURM_NNODES", 1)),
        where_from="SLURM_PROCID",
    )


def _checked(found: Launch) -> Launch:
    """Return a launch whose nodes have equally many processes each."""
    if found.nodes and found.on_each_node and found.nodes * found.on_each_node != found.world_size:
        raise ConfigError(
            f"{found.starter} started {found.world_size} processes on {found.nodes} nodes, {found.on_each_node} of "
            "them on this one; each node must have as many as the others."
        )
    return found


def _tasks_per_node(text: str) -> list[int]:
    """Return the numbers in Slurm's `2(x3),1`: 2, 2, 2, 1."""
    sizes: list[int] = []
    for size, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        sizes += [int(size)] * int(times or 1)
    return sizes


def is_slurm_task() -> bool:
    """Return whether Slurm's srun has started this process as one of several.

    A single task starts the others itself, as it would do anywhere. And what is typed in a shell that `srun --pty` has
    opened is no task, although it inherits the variables of one.
    """
    if not _is_step() or _slurm_tasks() == 1:
        return False
    return os.environ.get("SLURM_TASK_PID") == str(os.getpid()) or not _has_terminal()


def _is_step() -> bool:
    """Return whether srun has started this process, or one that it comes from."""
    return "SLURM_PROCID" in os.environ and _number("SLURM_STEP_ID", _FIRST_SPECIAL_STEP) < _FIRST_SPECIAL_STEP


def _slurm_tasks() -> int:
    """Return the number of tasks that `srun` has started beside this one, itself included."""
    return _number("SLURM_STEP_NUM_TASKS", _number("SLURM_NTASKS", 1))


def _slurm_job() -> str | None:
    """Return the id of the Slurm job that this process is in, as Slurm's commands take it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _has_terminal() -> bool:
    """Return whether this process can be reached from a terminal: tasks of srun cannot, what a shell starts can."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def meeting_place() -> tuple[str, int]:
    """Return address and port where tasks of Slurm meet."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "127.0.0.1"))
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]
    port = 15000 + _number("SLURM_JOB_ID", 0) % 10000  # two jobs on one node are unlikely to share it
    return os.environ.get("MASTER_ADDR", first), _number("MASTER_PORT", port)


def known_device_count(devices: int | str) -> int | None:
    """Return the number of processes of one node for `trainer.devices`; None where only the devices can tell."""
    return int(devices) if devices != "auto" else launch().on_each_node


def node_count(num_nodes: int | str) -> int:
    """Return the number of nodes for `trainer.num_nodes`; "auto": those that processes were started on.

    Raises:
        ConfigError: They were started in a way that does not tell.
    """
    if num_nodes != "auto":
        return int(num_nodes)
    found = launch()
    if found.nodes is not None:
        return found.nodes
    if found.world_size and found.on_each_node and found.world_size % found.on_each_node == 0:
        return found.world_size // found.on_each_node
    if found.starter is None and _number("SLURM_JOB_NUM_NODES", 1) > 1:
        raise ConfigError(
            f"Slurm's job has {os.environ['SLURM_JOB_NUM_NODES']} nodes, but this process was started on one of "
            "them only. Put srun before the command, or set trainer.num_nodes=1 to leave the others idle."
        )
    if _number("NODE_RANK", 0):
        raise ConfigError(
            f"NODE_RANK={os.environ['NODE_RANK']} says that there are several nodes, but not how many: set "
            "trainer.num_nodes to their number."
        )
    return 1


def check_environment() -> None:
    """Raise a ConfigError for variables of a launcher that has not started this process, or that are no numbers.

    With RANK left over from another job a process would believe that somebody else speaks for the run, and say and
    write nothing.
    """
    for name in ("NODE_RANK", "GROUP_RANK"):
        _number(name, 0)
    if not 0 <= (port := _number("MASTER_PORT", 0)) < 2**16:
        raise ConfigError(f"The environment variable MASTER_PORT={port} is no port. Unset it, or name a free one.")
    if launch().starter is None and (_number("WORLD_SIZE", 1) != 1 or _number("RANK", 0) != 0):
        raise _left_over()


def _left_over() -> ConfigError:
    found = " ".join(f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ)
    return ConfigError(
        f"The environment says {found}, but neither torchrun nor Slurm has started this process. If that is left "
        "over, `unset RANK WORLD_SIZE`: the command starts its own processes. If something else is to start them, let "
        "it start torchrun."
    )


def check_launched(layout: Layout, num_nodes: int = 1) -> None:
    """Raise a ConfigError when the processes that were started are not those that the configuration names.

    Args:
        layout: The layout of the run.
        num_nodes: The number of nodes of the run.
    """
    check_environment()
    found = launch()
    if found.starter is None:
        if layout.world_size > 1 and {"RANK", "WORLD_SIZE"} & set(os.environ):
            raise _left_over()  # the processes that this one starts would take it over
        return
    _check_number(found, layout.world_size, num_nodes)
    if not 0 <= found.rank < layout.world_size:
        raise ConfigError(
            f"This process is to be rank {found.rank} of {layout.world_size} ({found.where_from}), and ranks count "
            f"from 0. Unset {found.where_from} if it is left over from another job, or start as many processes as "
            "trainer.devices x trainer.num_nodes."
        )
    if found.starter == "something else":
        _check_by_hand(layout)


def _check_number(found: Launch, world_size: int, num_nodes: int) -> None:
    """Compare how many processes were started with how many the keys ask for, on each node too."""
    right = found.world_size in (None, world_size)
    if right and (found.nodes is None or found.on_each_node is None or found.nodes == num_nodes):
        return
    whose = {"Slurm": "srun", "torchrun": "torchrun"}.get(str(found.starter))
    started = f"{found.world_size} processes"
    if found.nodes and found.nodes > 1:
        started = f"{found.world_size} processes on {found.nodes} nodes"
    elif right:
        started = f"{found.world_size} processes on one node"
    starter = "What" if whose is None else found.starter
    raise ConfigError(
        f"{starter} started {'this process started ' if whose is None else ''}{started}, but trainer.devices x "
        f"trainer.num_nodes is {world_size // num_nodes} x {num_nodes}. "
        + (f"Set both to auto to take what {whose} was given." if whose else "Make them equal.")
    )


def check_reaches(num_nodes: int) -> None:
    """Raise a ConfigError when nobody has started this process on other nodes, which it cannot do itself.

    Args:
        num_nodes: The number of nodes of the run.
    """
    if num_nodes == 1 or launch().starter is not None:
        return
    job = _slurm_job()
    if job is not None:
        raise ConfigError(
            f"trainer.num_nodes is {num_nodes}, but in job {job} Slurm has started this one process only: put srun "
            "before the command, with as many tasks on each node as trainer.devices."
        )
    if "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"trainer.num_nodes is {num_nodes}, but nobody has started this process on several nodes. Start it with "
            "srun or torchrun; or by hand on each node, with MASTER_ADDR (the first node), MASTER_PORT and NODE_RANK."
        )


def _check_by_hand(layout: Layout) -> None:
    """Look at what somebody has set who starts the processes without torchrun or Slurm."""
    if "RANK" in os.environ and "NODE_RANK" not in os.environ and os.environ["RANK"] != os.environ["LOCAL_RANK"]:
        raise ConfigError(
            f"RANK={os.environ['RANK']} and LOCAL_RANK={os.environ['LOCAL_RANK']} contradict each other on one node. "
            "Unset what is left over from another job; set NODE_RANK if there are several nodes."
        )
    if layout.world_size > 1 and "MASTER_PORT" not in os.environ:
        raise ConfigError(
            f"LOCAL_RANK={os.environ['LOCAL_RANK']} says that something else starts the {layout.world_size} "
            "processes, but MASTER_PORT does not say where they meet. `unset LOCAL_RANK` if it is left over: the "
            "command starts its own processes."
        )


def _number(name: str, default: int) -> int:
    """Return the number in a variable.

    Raises:
        ConfigError: It is none.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"The environment variable {name}={text} is no number. Unset it.") from None
