"""What can be told of the processes of a run from the environment, without asking for devices."""

from __future__ import annotations

import os

from nemo_kto.errors import ConfigError
from nemo_kto.runtime.layout import Layout


def known_device_count(devices: int | str) -> int | None:
    """Return the number of processes of one node for `trainer.devices`; None where only the devices can tell."""
    if devices != "auto":
        return int(devices)
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return None


def check_environment() -> None:
    """Raise a ConfigError for variables of a launcher that has not started this process.

    With RANK left over from another job a process would believe that somebody else speaks for the run, and say and
    write nothing.
    """
    if not is_launched() and (_number("WORLD_SIZE", 1) != 1 or _number("RANK", 0) != 0):
        raise _left_over()


def _left_over() -> ConfigError:
    found = " ".join(f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ)
    return ConfigError(
        f"The environment says {found}, but neither torchrun nor Slurm has started this process. If that is left "
        "over, `unset RANK WORLD_SIZE`: the command starts its own processes. If something else is to start them, let "
        "it start torchrun."
    )


def is_launched() -> bool:
    """Return whether torchrun, Slurm, Lightning, or somebody who acts for it, has started this process as a rank."""
    return bool({"TORCHELASTIC_RUN_ID", "LOCAL_RANK"} & set(os.environ)) or is_slurm_task()


def is_slurm_task() -> bool:
    """Return whether Slurm's srun has started this process as one of a job's; not in a shell that it has started."""
    return {"SLURM_NTASKS", "SLURM_PROCID"} <= set(os.environ) and os.environ.get("SLURM_JOB_NAME") not in (
        "bash",
        "interactive",
    )


def check_launched(layout: Layout) -> None:
    """Raise a ConfigError when the processes that were started are not those that the configuration names."""
    check_environment()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        starter, rank, size = "torchrun", "RANK", "WORLD_SIZE"
    elif is_slurm_task():
        starter, rank, size = "Slurm", "SLURM_PROCID", "SLURM_NTASKS"
    elif "LOCAL_RANK" in os.environ:
        starter, rank, size = "what started this process", "LOCAL_RANK", "WORLD_SIZE"
    elif layout.world_size > 1 and {"RANK", "WORLD_SIZE"} & set(os.environ):
        raise _left_over()  # the processes that this one starts would take it over
    else:
        return
    if size in os.environ and _number(size, 0) != layout.world_size:
        advice = " Set trainer.devices=auto and trainer.num_nodes to what torchrun was given."
        raise ConfigError(
            f"{starter} started {os.environ[size]} processes, but trainer.devices x trainer.num_nodes is "
            f"{layout.world_size}.{advice if starter == 'torchrun' else ' Make them equal.'}"
        )
    if not 0 <= _number(rank, 0) < layout.world_size:
        raise ConfigError(
            f"This process is to be rank {os.environ[rank]} of {layout.world_size} ({rank}), and ranks count from 0. "
            f"Unset {rank} if it is left over from another job, or start as many processes as trainer.devices x "
            "trainer.num_nodes."
        )
    if rank != "LOCAL_RANK":
        return
    if "RANK" in os.environ and "NODE_RANK" not in os.environ and os.environ["RANK"] != os.environ[rank]:
        raise ConfigError(
            f"RANK={os.environ['RANK']} and LOCAL_RANK={os.environ[rank]} contradict each other on one node. Unset "
            "what is left over from another job; set NODE_RANK if there are several nodes."
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
