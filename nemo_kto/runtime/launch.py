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


def check_launched(layout: Layout) -> None:
    """Raise a ConfigError when torchrun started another number of processes than the configuration names."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) != layout.world_size:
        raise ConfigError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, but trainer.devices x trainer.num_nodes is "
            f"{layout.world_size}. Set trainer.devices=auto and trainer.num_nodes to what torchrun was given."
        )
