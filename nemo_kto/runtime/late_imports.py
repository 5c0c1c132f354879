"""Packages that others import and a run does not use: they wait until somebody does.

A run's processes import some six thousand modules before the first step, each of them. A quarter belongs to packages
that Lightning's, NeMo's and Megatron's own imports ask for on behalf of features that no run here has, or to torch's
compiler, which Megatron starts for functions that a machine without CUDA never compiles. `importlib.util.LazyLoader`
would do, but that `inspect` and `warnings` ask every module for names that most have none of.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

LATE: Mapping[str, Mapping[str, str]] = {
    "pandas": {},  # NeMo's tokenizer for chemistry
    "scipy.signal": {"hamming": "scipy.signal.windows"},  # torchmetrics looks whether it is old enough to have this
    "wandb": {},  # Megatron's inference engine; its logger asks for it when there is to be one
}
"""Module that waits -> of its names, those that another module can answer for, and which."""

_JIT = "megatron.core.jit"


@contextmanager
def late_imports(late: Mapping[str, Mapping[str, str]] = LATE) -> Iterator[None]:
    """Let what is imported inside get `late` modules that are loaded when a name of theirs is first asked for.

    Megatron's functions are left as they are written where there is no CUDA, rather than handed to torch's compiler.
    """
    finder = _Finder(late)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Finds the modules that are loaded in another way than usual."""

    def __init__(self, late: Mapping[str, Mapping[str, str]]) -> None:
        self._late = late

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._late and fullname != _JIT:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            late = self._late.get(fullname)
            spec.loader = _JitLoader(spec.loader) if late is None else _LateLoader(spec.loader, late)
        return spec


class _LateLoader(Loader):
    """Makes a module that is loaded when it is needed."""

    def __init__(self, loader: Loader, elsewhere: Mapping[str, str]) -> None:
        self._loader = loader
        self._elsewhere = elsewhere

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        module.__dict__["_elsewhere"] = self._elsewhere
        module.__class__ = _LateModule


class _LateModule(ModuleType):
    """A module of which nothing has been needed so far."""

    def __getattr__(self, name: str) -> Any:
        # asked of every module there is, by those who look for one of them
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in self.__dict__["_elsewhere"]:
            return getattr(importlib.import_module(self.__dict__["_elsewhere"][name]), name)
        self.__class__ = ModuleType
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


class _JitLoader(Loader):
    """Loads Megatron's choice of a compiler, and takes it back before anything uses it where there is no CUDA."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import torch

        self._loader.exec_module(module)
        if not torch.cuda.is_available():
            module.disable_jit_fuser()
