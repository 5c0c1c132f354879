"""Silences what NeMo, Lightning, Megatron and their optional parts print while they start."""

from __future__ import annotations

import logging
import os
import warnings

VERBOSE_VARIABLE = "NEMO_KTO_VERBOSE"
_LOGGERS = ("nemo_logger", "megatron", "lightning.pytorch", "lightning.fabric", "torch.distributed", "OneLogger", "numexpr")
_STILL_SHOWN = logging.ERROR


def silence_startup_noise() -> None:
    """Hide other packages' start-up warnings and log lines, unless NEMO_KTO_VERBOSE=1; errors stay.

    Call it before importing NeMo, Lightning or Megatron. Warnings raised in this package are always shown.
    """
    if os.environ.get(VERBOSE_VARIABLE) == "1":
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data is tokenised before loader processes fork
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"nemo_kto(\.|$)")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(_STILL_SHOWN)
    logging.getLogger("root").addFilter(_from_this_package_or_error)


def silence_loaded_packages() -> None:
    """Do what can only be done once NeMo and Lightning are imported; unless NEMO_KTO_VERBOSE=1."""
    if os.environ.get(VERBOSE_VARIABLE) == "1":
        return
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(_STILL_SHOWN)
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in ("megatron", "lightning", "nemo", "nv_one_logger", "absl"):
            logging.getLogger(name).setLevel(_STILL_SHOWN)


def _from_this_package_or_error(record: logging.LogRecord) -> bool:
    return record.levelno >= _STILL_SHOWN or "nemo_kto" in record.pathname
