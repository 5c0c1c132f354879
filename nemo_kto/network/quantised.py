"""What a folder stores in fewer bits than numbers have: which of its tensors, and how they become plain numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_kto.errors import ConfigError
from nemo_kto.network.eight_bits import EightBits
from nemo_kto.network.four_bits import FourBits

if TYPE_CHECKING:
    import torch

    from nemo_kto.network.weight_rules import Region

FIELD = "quantization_config"

_KINDS: dict[str, type[EightBits] | type[FourBits]] = {"fp8": EightBits, "mxfp4": FourBits}
"""`quant_method` -> what is known of it."""
_SAFETENSORS = {"float32": "F32", "float16": "F16"}


class PackedTensor(Protocol):
    """A tensor of plain numbers that is stored as something else."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors it is stored in, its own first."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def read(self, where: Region) -> torch.Tensor:
        """Return a block of it in float32."""


class Quantisation(Protocol):
    """How a folder stores tensors in fewer bits."""

    @property
    def dtype(self) -> str:
        """The dtype they have as plain numbers, as the safetensors format calls it."""

    @property
    def name(self) -> str:
        """In how many bits, as people say it."""

    def packed(
        self, names: Collection[str], slice_of: Callable[[str], Any], folder: str
    ) -> Mapping[str, PackedTensor]:
        """Return those among the tensors with these `names`, by name.

        Args:
            names: Names of all tensors of the folder.
            slice_of: Returns safetensors' view of a tensor.
            folder: The folder, for messages.

        Raises:
            CheckpointError: Something of a tensor is missing, or does not fit.
        """


def quantisation_of(keys: Mapping[str, Any], source: str | Path) -> Quantisation | None:
    """Return what the keys of a config.json say; None where nothing is quantised.

    Plain numbers have the dtype that it names, or else bfloat16.

    Raises:
        ConfigError: It is another kind of quantisation; the message begins with `source`.
    """
    found = keys.get(FIELD)
    if found is None:
        return None
    kind = _KINDS.get(str(found.get("quant_method"))) if isinstance(found, dict) else None
    dtype = str(keys.get("dtype") or keys.get("torch_dtype")).removeprefix("torch.")
    known = None if kind is None else kind.of(found, _SAFETENSORS.get(dtype, "BF16"), f"{source}: {FIELD}")
    if known is None:
        raise ConfigError(
            f"{source}: {FIELD} is {found}. Quantised weights cannot be trained, and only those of the "
            f"quant_methods {' and '.join(_KINDS)} can be read as plain numbers. Use the model's unquantised folder."
        )
    return known


def quantisation_of_folder(folder: Path) -> Quantisation | None:
    """Return what the config.json of a folder says; None where there is none, or it cannot be read."""
    try:
        keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return quantisation_of(keys, folder / "config.json") if isinstance(keys, dict) else None
