"""bitsandbytes, which makes numbers of few bits and plain numbers of those again."""

from __future__ import annotations

import functools
import logging
import sys
from types import ModuleType

_KERNELS = "kernels"


@functools.cache
def bitsandbytes() -> ModuleType:
    """Return bitsandbytes, whose operators are then torch's too.

    On some CPUs importing it would fetch code from the Hugging Face Hub by way of the package `kernels`, if that is
    installed, and run it; for what is used here it has its own. So `kernels` cannot be found meanwhile.

    Raises:
        ImportError: It is not installed.
    """
    logger, missing = logging.getLogger("bitsandbytes"), object()
    level, kernels = logger.level, sys.modules.get(_KERNELS, missing)
    logger.setLevel(logging.ERROR)  # else it would ask for that package
    sys.modules[_KERNELS] = None  # type: ignore[assignment]
    try:
        import bitsandbytes
    finally:
        logger.setLevel(level)
        if kernels is missing:
            del sys.modules[_KERNELS]
        else:
            sys.modules[_KERNELS] = kernels  # type: ignore[assignment]
    return bitsandbytes
