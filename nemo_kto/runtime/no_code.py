"""Checkpoints read without running anything that is in them.

A pickle can call any function when it is loaded. torch's checkpoints keep their index (`.metadata`) as one, and read
byte entries with `weights_only=False` (torch.distributed.checkpoint 2.13: `FileSystemReader.read_metadata`,
`DefaultLoadPlanner.load_bytes`); Megatron-Core leaves `common.pt` to torch's default, which an environment variable
can turn off.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from torch.distributed.checkpoint import filesystem

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")

_INDEX_CLASSES = frozenset(
    [("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")]
    + [("pathlib", "PosixPath"), ("pathlib", "PurePosixPath")]
    + [("torch", name) for name in _DTYPES]
    + [("torch.distributed.checkpoint.filesystem", "_StorageInfo")]
    + [
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ]
    + [
        ("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ]
)
"""(module, name) of all that the index of a checkpoint consists of; none of them runs anything of its arguments."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return a class of the list, and nothing else."""
        if (module, name) not in _INDEX_CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of this package has in it")
        return super().find_class(module, name)


def _load(file: IO[bytes]) -> Any:
    index = _IndexUnpickler(file).load()
    for place in (getattr(index, "storage_data", None) or {}).values():
        if Path(place.relative_path).name != place.relative_path:
            raise pickle.UnpicklingError(f"it names {place.relative_path}, which is outside of the checkpoint")
    return index


def index_fault(folder: Path) -> str | None:
    """Return what is wrong with the index of a checkpoint; None if it can be read."""
    try:
        with (folder / ".metadata").open("rb") as file:
            _load(file)
    except Exception as error:  # of a file that may be anything
        return f".metadata cannot be read: {error}"
    return None


_PICKLE = SimpleNamespace(load=_load, dump=pickle.dump)
"""All that `filesystem` uses of `pickle`."""


@contextmanager
def nothing_executed() -> Iterator[None]:
    """Read the indices of checkpoints with a list of classes, and everything else as tensors and plain values."""
    environment = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    module: Any = filesystem
    original = module.pickle
    module.pickle = _PICKLE
    try:
        yield
    finally:
        module.pickle = original
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in environment.items() if value is not None})
