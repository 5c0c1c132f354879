"""The same bits from the same command: what PyTorch, cuBLAS, NCCL and Transformer Engine have to be told for it."""

from __future__ import annotations

import os

import torch

from nemo_kto.errors import ConfigError

_ENVIRONMENT = {
    # torch: cuBLAS adds up in parts, in whichever order streams come to its workspace, unless that is a fixed one
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", (":4096:8", ":16:8")),
    # Megatron-Core's own list for its deterministic_mode; NVLS adds up in the switch
    "NCCL_ALGO": ("^NVLS", ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS")),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0", ("0",)),
}
"""Environment variable -> the value it gets, and those it may have."""


def make_deterministic() -> None:
    """Have this process, and those it starts, compute the same bits again; before CUDA is used.

    Megatron's `deterministic_mode` follows, see `network/megatron_config.py`.

    Raises:
        ConfigError: The environment asks for something else.
    """
    for name, (value, possible) in _ENVIRONMENT.items():
        if os.environ.setdefault(name, value) not in possible:
            raise ConfigError(
                f"trainer.deterministic=true needs the environment variable {name} to be {' or '.join(possible)}, and "
                f"it is {os.environ[name]}. Leave it out."
            )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
