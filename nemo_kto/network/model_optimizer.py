"""Matrices that a folder stores as NVIDIA's Model Optimizer writes them: FP8, and NVFP4 with scales of two levels.

They are made plain numbers as they are read: `weight * weight_scale`, in NVFP4 `* weight_scale_2` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_kto.errors import ConfigError
from nemo_kto.network.eight_bits import with_scales
from nemo_kto.network.folder_tensors import FolderTensors
from nemo_kto.network.scaled import EIGHT_BIT_FLOAT, NumbersInBytes, ScaledMatrix, ScaleNumbers, Scales

FILE = "hf_quant_config.json"
"""Where older folders say how they are quantised, of which their config.json says nothing."""

_KNOWN = ("FP8", "NVFP4", "MIXED_PRECISION", None)
"""Values of `quant_algo`: each matrix says itself which of the first two it is in; None where only caches are."""
_SHARE = 16
"""Neighbouring input channels that have a scale together in NVFP4."""
_SCALE, _SCALE_OF_SCALES, _BEFORE = "_scale", "_scale_2", "pre_quant_scale"


@dataclass(frozen=True)
class ModelOptimizer:
    """How a folder stores its matrices; each is in FP8 or in NVFP4.

    Attributes:
        dtype: The dtype they have as plain numbers, as the safetensors format calls it.
    """

    dtype: str

    @classmethod
    def of(cls, found: Mapping[str, Any], dtype: str, source: str) -> ModelOptimizer:
        """Return what a `quantization_config` says, or the `quantization` of a `hf_quant_config.json`.

        Raises:
            ConfigError: It is another kind; the message begins with `source`.
        """
        kind = found.get("quant_algo")
        if kind not in _KNOWN:
            raise ConfigError(
                f"{source}.quant_algo={kind} is not supported, only {' and '.join(_KNOWN[:2])}, each or both. Use the "
                "model's unquantised folder."
            )
        return cls(dtype)

    def packed(self, tensors: FolderTensors) -> dict[str, ScaledMatrix]:
        """Return the matrices in fewer bits among a folder's tensors, by name; see `Quantisation`."""
        found = {}
        for name in tensors.names:
            if name.endswith(_BEFORE):
                raise tensors.error(name, "scales what goes into a matrix, which plain numbers cannot stand for")
            if tensors.dtype(name) == EIGHT_BIT_FLOAT and not name.endswith(_SCALE):
                found[name] = with_scales(tensors, name)
            elif tensors.dtype(name) == "U8":
                found[name] = _four_bits(tensors, name)
        return found


def _four_bits(tensors: FolderTensors, name: str) -> ScaledMatrix:
    parts = (name, name + _SCALE, name + _SCALE_OF_SCALES)
    scales = tensors.part(parts[1], EIGHT_BIT_FLOAT, of=name)
    of_scales = tensors.one(parts[2], "F32", of=name)
    if len(tensors.shape(name)) != 2:
        raise tensors.error(name, f"has the shape {list(tensors.shape(name))}, which is none of a matrix")
    numbers = NumbersInBytes(tensors.slice_of(name))
    rows, columns = numbers.shape
    if columns % _SHARE or tensors.shape(parts[1]) != (rows, columns // _SHARE):
        raise tensors.error(
            parts[1], f"has the shape {list(tensors.shape(parts[1]))}, and {rows} x {columns} numbers do not fit"
        )
    return ScaledMatrix(
        parts, numbers, Scales(ScaleNumbers(scales), (1, _SHARE), (rows, columns), factor=of_scales), 4
    )
