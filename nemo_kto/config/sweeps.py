"""Several runs from one command (Hydra's `--multirun`), each in a log folder of its own.

Hydra's launchers run them one after the other in this process, or, as submitit's does, in jobs of a cluster.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from nemo_kto.config.folders import log_directory, log_folder
from nemo_kto.config.schema import KTOConfig

SETTINGS = (
    "hydra.sweep.dir='${log_folder:${exp_manager.explicit_log_dir},${exp_manager.exp_dir},${exp_manager.name}}'",
    "hydra.sweep.subdir=.",
)
"""What Hydra, and submitit, write of a sweep is in the folder that has those of the runs in it."""

_LONGEST = 120
"""Letters of a folder's name."""

_SPELT = {"False": "false", "True": "true", "None": "null"}
"""Values as Hydra hands them on -> as they are written on a command line."""

_OF_FOLDERS = {"exp_manager.explicit_log_dir", "exp_manager.exp_dir", "exp_manager.name"}


def sweep_folder(explicit: str | None, exp_dir: str | None, name: str) -> str:
    """Return the log folder that these keys mean; Hydra asks for it by `${log_folder:...}`."""
    return str(log_folder(explicit, exp_dir, name))


def prepare_jobs() -> None:
    """Let processes that a launcher starts elsewhere find this package, if it is a clone's."""
    clone = str(Path(__file__).resolve().parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if clone not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, clone])


def keys_of_all(overrides: Sequence[str]) -> set[str]:
    """Return the keys that have the same value in all runs of a sweep, of those on the command line."""
    parsed = OverridesParser.create().parse_overrides([text for text in overrides if not text.startswith("-")])
    return {str(one.key_or_group) for one in parsed if not one.is_sweep_override()}


def in_own_folder(config: KTOConfig, of_all: set[str]) -> None:
    """If a configuration is that of one of several runs, give it a log folder named after what is its own.

    One whose folder is its own already keeps it.

    Args:
        config: The configuration; changed.
        of_all: See `keys_of_all`.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    overrides = (text.lstrip("+").partition("=") for text in HydraConfig.get().overrides.task)
    own = {key: value for key, _, value in overrides if key not in of_all}
    if not _OF_FOLDERS & set(own):
        name = _folder_name(own.items()) or str(HydraConfig.get().job.num)
        config.exp_manager.explicit_log_dir = str(log_directory(config) / name)


def _folder_name(own: Iterable[tuple[str, str]]) -> str:
    """Return a name for a folder, different for different values: `lr=1e-6,seed=2`."""
    own = list(own)
    last = [key.rpartition(".")[2] for key, _ in own]
    shown = [short if last.count(short) == 1 else key for short, (key, _) in zip(last, own, strict=True)]
    parts = {key: _SPELT.get(value, value) for key, (_, value) in zip(shown, own, strict=True)}
    text = ",".join(f"{key}={value}" for key, value in sorted(parts.items()))
    name = re.sub(r"[^\w.=,+-]", "_", text, flags=re.ASCII)
    if name == text and len(name) <= _LONGEST:
        return name
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return f"{name[:_LONGEST]}-{digest}"
