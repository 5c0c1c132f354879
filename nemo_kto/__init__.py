"""KTO (Kahneman-Tversky Optimization) of language models on Megatron-Core, from binary feedback.

The names below are all that scripts need (docs/python.md); each is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nemo_kto.quiet import silence_loaded_packages, silence_startup_noise, without_wandb

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nemo_kto.algorithms.losses import kto_loss
    from nemo_kto.commands.evaluate import evaluate
    from nemo_kto.commands.export import export_checkpoint
    from nemo_kto.commands.train import train
    from nemo_kto.config.compose import load_config
    from nemo_kto.config.schema import KTOConfig
    from nemo_kto.data.batches.collate import kto_custom_collate
    from nemo_kto.kto.megatron_gpt_kto_model import MegatronGPTKTOModel

__all__ = [
    "KTOConfig",
    "MegatronGPTKTOModel",
    "evaluate",
    "export_checkpoint",
    "kto_custom_collate",
    "kto_loss",
    "load_config",
    "train",
]

_MODULE_OF = {
    "KTOConfig": "config.schema",
    "MegatronGPTKTOModel": "kto.megatron_gpt_kto_model",
    "evaluate": "commands.evaluate",
    "export_checkpoint": "commands.export",
    "kto_custom_collate": "data.batches.collate",
    "kto_loss": "algorithms.losses",
    "load_config": "config.compose",
    "train": "commands.train",
}


_NOISY = ("MegatronGPTKTOModel", "evaluate", "export_checkpoint", "train")
"""Those that load NeMo, Lightning and Megatron."""


def __getattr__(name: str) -> Any:
    """Load a public name; with those of `_NOISY` other packages are as quiet as on the command line."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _NOISY:
        silence_startup_noise()
    with without_wandb():
        loaded = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    if name in _NOISY:
        silence_loaded_packages()
    return getattr(loaded, name)


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *__all__})
