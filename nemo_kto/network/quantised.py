"""What a folder stores in fewer bits than numbers have: which of its tensors, and how they become plain numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_kto.errors import ConfigError
from nemo_kto.network import model_optimizer
from nemo_kto.network.bits_and_bytes import BitsAndBytes
from nemo_kto.network.compressed_tensors import CompressedTensors
from nemo_kto.network.eight_bits import EightBitRowsOrWhole, EightBits
from nemo_kto.network.four_bits import FourBits
from nemo_kto.network.torch_ao import TorchAO

if TYPE_CHECKING:
    import torch

    from nemo_kto.network.bits_and_bytes import ScalesOfScales
    from nemo_kto.network.folder_tensors import FolderTensors
    from nemo_kto.network.weight_rules import Region

FIELD = "quantization_config"
OLDER_FIELD = "compression_config"
"""What compressed-tensors called it at first."""

_SAFETENSORS = {"float32": "F32", "float16": "F16"}


class PackedTensor(Protocol):
    """A tensor of plain numbers that is stored as something else."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors it is stored in, its own first."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def bits(self) -> int:
        """Bits that a number is stored in, without scales."""

    @property
    def kept_as(self) -> str | None:
        """Key of `quantised_weight.FORMATS` with the very numbers; None where none has them."""

    def read(self, where: Region) -> torch.Tensor:
        """Return a block of it in float32."""

    def scales_of_scales(self) -> ScalesOfScales | None:
        """Return how its scales are stored, where they are in eight bits themselves, else None."""


class Quantisation(Protocol):
    """How a folder stores tensors in fewer bits."""

    @property
    def dtype(self) -> str:
        """The dtype they have as plain numbers, as the safetensors format calls it."""

    def packed(self, tensors: FolderTensors) -> Mapping[str, PackedTensor]:
        """Return those among the folder's tensors that are stored so, by name.

        Raises:
            CheckpointError: Something of a tensor is missing, or does not fit.
        """


KINDS: dict[str, Callable[[Mapping[str, Any], str, str], Quantisation | None]] = {
    "bitsandbytes": BitsAndBytes.of,
    "compressed-tensors": CompressedTensors.of,
    "fbgemm_fp8": EightBitRowsOrWhole.of,
    "fp8": EightBits.of,
    "modelopt": model_optimizer.ModelOptimizer.of,
    "mxfp4": FourBits.of,
    "torchao": TorchAO.of,
}
"""`quant_method` -> makes what is known of it from its fields, a dtype, and what messages begin with."""


def described_in(keys: Mapping[str, Any]) -> tuple[Mapping[str, Any], str] | None:
    """Return where the keys of a config.json describe quantised weights, and under which key; None if nowhere.

    A model that sees images may say it with its language model.
    """
    for place in (keys, keys.get("text_config")):
        for field in (FIELD, OLDER_FIELD):
            if isinstance(place, dict) and place.get(field) is not None:
                return place, field
    return None


def quantisation_of(keys: Mapping[str, Any], source: Path) -> Quantisation | None:
    """Return what the keys of a config.json say, or what is written beside it; None where nothing is quantised.

    Plain numbers have the dtype that it names, or else bfloat16.

    Raises:
        ConfigError: It is another kind of quantisation; the message begins with the file.
    """
    found, place = _description(keys, source)
    if found is None:
        return None
    in_text = keys.get("text_config")
    parts = [keys, in_text if isinstance(in_text, dict) else {}]
    dtypes = [part[name] for part in parts for name in ("dtype", "torch_dtype") if part.get(name)]
    dtype = _SAFETENSORS.get(str(dtypes[0]).removeprefix("torch.") if dtypes else "", "BF16")
    kind = _method(found) if isinstance(found, dict) else None
    known = KINDS[kind](found, dtype, place) if kind in KINDS else None
    if known is None:
        what = found if kind is None or kind in KINDS else f"of the quant_method {kind!r}"
        raise ConfigError(
            f"{place} is {what}, which cannot be read as plain numbers: only the quant_methods {', '.join(KINDS)} "
            "can. Use the model's unquantised folder."
        )
    return known


def _method(found: Mapping[str, Any]) -> str | None:
    """Return the `quant_method`; folders of early versions of bitsandbytes have none."""
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") is True or found.get("load_in_8bit") is True):
        return "bitsandbytes"
    return None if method is None else str(method)


def _description(keys: Mapping[str, Any], source: Path) -> tuple[Any, str]:
    """Return what describes quantised weights, or None, and where it is written."""
    place = described_in(keys)
    if place is not None:
        return place[0][place[1]], f"{source}: {place[1]}"
    file = source.with_name(model_optimizer.FILE)
    if not file.is_file():
        return None, ""
    try:
        written = json.loads(file.read_text(encoding="utf-8"))["quantization"]
        return {"quant_method": "modelopt", **written}, f"{file}: quantization"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read ({error!r}). Download it again.") from error


def quantisation_of_folder(folder: Path) -> Quantisation | None:
    """Return what the config.json of a folder says; None where there is none, or it cannot be read."""
    try:
        keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return quantisation_of(keys, folder / "config.json") if isinstance(keys, dict) else None
