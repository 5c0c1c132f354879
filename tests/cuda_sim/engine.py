r"""Transformer Engine on the simulated device: its own Python, with `engine_kernels.py` in the place of its extension.

Its wheel for PyTorch has to be compiled against CUDA; all that is needed here is in the one that is not. A folder with
it is made by

    pip install --no-deps --target FOLDER transformer-engine==2.16.0 \
        onnxscript onnx_ir nvdlfw-inspect importlib_metadata

and named by the environment variable NEMO_KTO_TRANSFORMER_ENGINE. What needs it is skipped where that is not set.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.cuda_sim import simulated_cuda

FOLDER = "NEMO_KTO_TRANSFORMER_ENGINE"


def install() -> None:
    """Make the device and `transformer_engine` of this process; before torch and Megatron are imported."""
    simulated_cuda.install()
    folder = Path(os.environ[FOLDER])
    package = folder / "transformer_engine"
    sys.path.insert(0, str(folder))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it does not look for its libraries then
    os.environ.pop("NVTE_RELEASE_BUILD", None)
    from tests.cuda_sim.engine_kernels import extension

    sys.modules["transformer_engine_torch"] = extension(package)
    parent = ModuleType("transformer_engine")
    parent.__path__ = [str(package)]
    sys.modules["transformer_engine"] = parent
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    del sys.modules["transformer_engine"]  # whose own __init__ loads PyTorch's part, once that does nothing more
    with _kernels_of_triton():
        importlib.import_module("transformer_engine").common = common  # type: ignore[attr-defined]
        importlib.import_module("transformer_engine.pytorch")


class _Anything(ModuleType):
    """Has whatever is asked for; as a decorator it changes nothing."""

    __path__: list[str] = []
    __version__ = "3.6.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name)

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else self


@contextlib.contextmanager
def _kernels_of_triton() -> Iterator[None]:
    """Let kernels be defined that nobody calls, where there is no triton; what looks for it later finds none."""
    from torch.utils import _triton

    if _triton.has_triton_package() or _triton.has_triton():  # torch remembers the answer
        yield
        return
    names = ["triton", "triton.language", "triton.language.core", "triton.language.standard"]
    for name in names:
        sys.modules[name] = _Anything(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
