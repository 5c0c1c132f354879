"""Who prints what: other packages' start-up noise is silenced, and one process speaks for the run."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

VERBOSE_VARIABLE = "NEMO_KTO_VERBOSE"
"""Environment variable; 1 shows everything again."""

_PACKAGES = ("nemo", "nemo_logger", "nv_one_logger", "megatron", "lightning", "absl", "httpx", "httpx2")
"""First parts of the names of the loggers that are kept to errors."""

_EXTENSIONS = "torch.utils.cpp_extension"
"""Logger that says of a torch for CUDA, on a machine with CUDA's compiler and without a GPU, that there is none."""

_WARNING_MODULES = (
    r"(hydra|nemo|nv_one_logger|megatron|lightning|lightning_fabric|torchmetrics|torch|transformers|wandb)(\.|$)"
)
"""Modules whose warnings are hidden; it matches no module of this package or of a user's own script."""

_STILL_SHOWN = logging.ERROR


def silence_startup_noise() -> None:
    """Hide other packages' start-up warnings and log lines, unless NEMO_KTO_VERBOSE=1; errors stay.

    Call it before importing NeMo, Lightning or Megatron. Warnings and log lines of this package are always shown.
    """
    if os.environ.get(VERBOSE_VARIABLE) == "1":
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data is tokenised before loader processes fork
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # of PyTorch's profiler: errors
    warnings.filterwarnings("ignore", module=_WARNING_MODULES)
    for name in (*_PACKAGES, _EXTENSIONS):
        logging.getLogger(name).setLevel(_STILL_SHOWN)


@contextmanager
def without_wandb() -> Iterator[None]:
    """Let what is imported meanwhile do without wandb, which makes two temporary folders when it is imported.

    Megatron imports it for its own inference. A logger that needs it imports it later.
    """
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]  # Python's way to say that there is none
    try:
        yield
    finally:
        del sys.modules["wandb"]


def silence_loaded_packages() -> None:
    """Do what can only be done once NeMo and Lightning are imported, if they are; unless NEMO_KTO_VERBOSE=1."""
    if os.environ.get(VERBOSE_VARIABLE) == "1":
        return
    if "nemo.utils" in sys.modules:
        from nemo.utils import logging as nemo_logging

        # NeMo turns every warning, ours too, into a log line that the next call hides
        nemo_logging.captureWarnings(False)
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in _PACKAGES:
            logging.getLogger(name).setLevel(_STILL_SHOWN)
    # of each writer of a checkpoint that fails; ours says it once, and better
    logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)


def is_global_rank_zero() -> bool:
    """Return whether this is the process that speaks for the run, also before any process group exists.

    torchrun sets RANK; Lightning's launcher LOCAL_RANK, and over several nodes the user NODE_RANK; Slurm's srun only
    SLURM_PROCID, which the processes of the other two may have inherited from the shell they were started in.
    """
    for names in (("RANK",), ("LOCAL_RANK", "NODE_RANK"), ("SLURM_PROCID",)):
        found = [os.environ[name] for name in names if name in os.environ]
        if found:
            return all(rank == "0" for rank in found)
    return True
