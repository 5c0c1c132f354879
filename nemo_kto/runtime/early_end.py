"""A rank that fails before all have met tells those that wait for it, which nobody else might do. Without torch.

Who has started several ranks of one machine ends them together, but Slurm's srun by itself does not, nor does anybody
end those of other machines. So before such a rank ends it leaves its word where they meet (`meeting.py`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial

from nemo_kto import stopping
from nemo_kto.errors import KTOError
from nemo_kto.runtime.launch import Launch, known_device_count, launch, meeting_place, node_count
from nemo_kto.runtime.processes import this_process


@contextlib.contextmanager
def told_to_others(asked_for: Callable[[], tuple[int | str, int | str]]) -> Iterator[None]:
    """Tell the other ranks of a failure in here, if this one has not met them.

    That follows the sentence which a `KTOError` is reported with, and precedes the traceback of any other exception.

    Args:
        asked_for: Returns `trainer.devices` and `trainer.num_nodes`, which need not be possible.
    """
    try:
        yield
    except Exception as error:
        # of keys and variables that are no numbers or contradict each other, which may be the failure itself
        with contextlib.suppress(KTOError, TypeError, ValueError):
            devices, num_nodes = asked_for()
            found, nodes = launch(), node_count(num_nodes)
            size = (known_device_count(devices) or 0) * nodes
            if _others_wait(found, nodes, size):
                tell = partial(_tell, found.rank, found.world_size or size or None, f"{_name(found)}{_why(error)}")
                if isinstance(error, KTOError):
                    stopping.end_together(tell)
                else:  # at exit no threads could be started any more (Python 3.12)
                    tell()
        raise


def _others_wait(found: Launch, nodes: int, size: int) -> bool:
    """Return whether there are others that would wait for this process, and that it can reach.

    Args:
        found: Who has started it.
        nodes: On how many nodes the run is.
        size: How many ranks it is to have; 0 if that is not known.
    """
    if found.world_size and size and found.world_size != size:
        return False  # all ranks find that, if there are others: variables may be left over
    if 1 in (size, found.world_size) or (found.starter in (None, "torchrun") and nodes == 1):
        return False
    return found.starter == "Slurm" or "MASTER_PORT" in os.environ


def _name(found: Launch) -> str:
    node = "0" if found.starter in ("Slurm", "torchrun") else os.environ.get("NODE_RANK", "0")
    rank = f"Rank {found.rank}" if node == "0" else f"Local rank {found.rank} of node {node}"
    return f"{rank} ({this_process()})"


def _why(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return f": {text}" if isinstance(error, KTOError) else f" failed: {type(error).__name__}: {text}"


def _tell(rank: int, world_size: int | None, word: str) -> None:
    # it may be torch that is missing; and whoever is stopped meanwhile has nothing to finish
    with contextlib.suppress(ImportError, OSError, KTOError, KeyboardInterrupt, stopping.Stopped):
        from nemo_kto.runtime import meeting

        meeting.leave_word(word, *meeting_place(), rank=rank, world_size=world_size)
