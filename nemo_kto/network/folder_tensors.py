"""The tensors of a folder as its files hold them, for those who put others together from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_kto.errors import CheckpointError

_ACTIVATIONS = ("input", "output", "activation", "k", "v", "q", "kv", "prob", "k_cache", "v_cache")
_THEIRS = ("scale", "zero_point", "global_scale", "scale_ub")
_NOT_OF_WEIGHTS = frozenset(f"{which}_{what}" for which, what in itertools.product(_ACTIVATIONS, _THEIRS))
"""Names of what belongs to activations."""


@dataclass(frozen=True)
class FolderTensors:
    """The tensors of a folder as its files hold them.

    Attributes:
        folder: The folder, for messages.
        names: Names of all tensors.
        slice_of: Returns safetensors' view of a tensor.
        metadata: What the files' headers say besides.
    """

    folder: str
    names: Collection[str]
    slice_of: Callable[[str], Any]
    metadata: Mapping[str, str]

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor, as the safetensors format calls it."""
        return str(self.slice_of(name).get_dtype())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self.slice_of(name).get_shape())

    def part(self, name: str, *dtypes: str, of: str) -> Any:
        """Return safetensors' view of a tensor that the matrix `of` cannot be read without.

        Raises:
            CheckpointError: It is not there, or of none of the `dtypes`.
        """
        if name not in self.names:
            raise CheckpointError(f"{self.folder} lacks {name}, which {of} cannot be read without. Download it again.")
        if self.dtype(name) not in dtypes:
            raise self.error(name, f"is stored as {self.dtype(name)}, not as {' or '.join(dtypes)}")
        return self.slice_of(name)

    def one(self, name: str, *dtypes: str, of: str) -> float:
        """Return the only number of a tensor, and raise a CheckpointError as `part` does, or if it has several."""
        found = self.part(name, *dtypes, of=of)
        if math.prod(self.shape(name)) != 1:
            raise self.error(name, f"has the shape {list(self.shape(name))}, and should be one number")
        return float(found[...].float().reshape(()))

    def error(self, name: str, fault: str) -> CheckpointError:
        """Return what to raise for a tensor."""
        return CheckpointError(f"{self.folder}: {name} {fault}. Download it again, or use the unquantised folder.")


def beside(module: str, names: Collection[str], *suffixes: str) -> tuple[str, ...]:
    """Return those names of a module's tensors that are there."""
    return tuple(name for name in (f"{module}.{suffix}" for suffix in suffixes) if name in names)


def is_of_activations(name: str) -> bool:
    """Return whether a tensor is for computing, or keeping keys and values, in fewer bits: nothing of the weights."""
    return name.rpartition(".")[2] in _NOT_OF_WEIGHTS
