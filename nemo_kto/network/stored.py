"""The tensors of a Hugging Face folder as its files hold them, read one block at a time."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_kto.errors import CheckpointError, git_lfs_hint
from nemo_kto.network.quantised import PackedTensor, quantisation_of_folder
from nemo_kto.network.tables import EMBEDDING, OUTPUT
from nemo_kto.network.weight_rules import Piece, Region, names_in_whole, spellings

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What the safetensors format calls the dtypes that weights may have."""

NO_WEIGHTS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8, "BOOL": torch.bool}
"""The same of other tensors, which only what is passed on as it is may have."""

_COMPARED_AT_ONCE = 1 << 24
"""Most elements of a tensor that are compared in one go."""


def has_weights(folder: Path) -> bool:
    """Return whether a folder has weights in the safetensors format."""
    return (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()


def check_one_kind(folder: Path) -> None:
    """Raise a CheckpointError for a folder with a model and an adapter, which transformers would add to the model."""
    if has_weights(folder) and (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds a model and an adapter ({ADAPTER_FILE}). Put the adapter into a folder of its own, or "
            "merge it into the model."
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a model's tensors, as transformers chooses them: a single one, or those of an index.

    The files count, not which tensors the index says are in which: transformers takes all that are in them, of several
    of the same name the one of the last file.

    Raises:
        CheckpointError: There are none, the index cannot be read, or there is an adapter beside them.
    """
    check_one_kind(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [name for name in names if PurePath(name).is_absolute() or ".." in PurePath(name).parts]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of weights: {error!r}. Download it again.") from error
        if outside:
            raise CheckpointError(f"{index} names {outside[0]}, which is outside the folder. Download it again.")
        return [folder / name for name in names]
    hint = ""
    if any(file for kind in ("*.bin", "*.gguf", "*.distcp") for file in folder.glob(kind)):
        hint = " Save the model with transformers' save_pretrained first: only safetensors are read."
    raise CheckpointError(f"{folder} holds no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}.{hint}")


class SafetensorsFolder:
    """The tensors of a folder with one `model.safetensors` or with shards and an index; a context manager.

    What is stored in fewer bits is read as plain numbers, see `quantised.py`; its scales are no tensors of their own.

    Args:
        folder: Folder of a Hugging Face model.

    Attributes:
        names: Names of all tensors of the folder.
        quantised: Those that are stored in fewer bits.
        quantisation: How they are; None where config.json says nothing of it.
        files: The files, see `weight_files`, with the names of the tensors that are read from each.

    Raises:
        CheckpointError: The folder has no weights in the safetensors format, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with ExitStack() as stack:
            self._handles = {file: _opened(stack, file) for file in weight_files(folder)}
            self._stack = stack.pop_all()
        self._file_of = {name: file for file, handle in self._handles.items() for name in handle.keys()}  # noqa: SIM118
        self._packed: dict[str, PackedTensor] = {}
        self.quantisation = quantisation_of_folder(folder)
        if self.quantisation is not None:
            self._packed.update(self.quantisation.packed(self._file_of, self._slice_of, str(folder)))
            for name, packed in self._packed.items():
                file = self._file_of[packed.parts[0]]
                for part in packed.parts:
                    self._file_of.pop(part, None)
                self._file_of[name] = file
        self.quantised = self._packed.keys()
        self.names = self._file_of.keys()
        self.files: dict[Path, list[str]] = {file: [] for file in self._handles}
        for name, file in self._file_of.items():
            self.files[file].append(name)

    def __enter__(self) -> SafetensorsFolder:
        """Return the folder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the file's header."""
        return self._packed[name].shape if name in self._packed else tuple(self._slice_of(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor, from the file's header, as the safetensors format calls it: see `DTYPES`.

        Of one that is stored in fewer bits it is that of the plain numbers.
        """
        if name in self._packed:
            assert self.quantisation is not None
            return self.quantisation.dtype
        return str(self._slice_of(name).get_dtype())

    def read(self, piece: Piece, region: Region) -> torch.Tensor:
        """Return one block of a piece of a tensor in the file's dtype; nothing else of the tensor is read.

        Of one that is stored in fewer bits it is in float32.
        """
        where, packed = piece.within(region), self._packed.get(piece.name)
        return piece.taken_from(self._slice_of(piece.name)[where] if packed is None else packed.read(where))

    def equal(self, name: str, other: str) -> bool:
        """Return whether two tensors have the same shape and values."""
        one, two = self._slice_of(name), self._slice_of(other)
        if {name, other} & self.quantised:
            return False  # an embedding is not stored so
        if one.get_shape() != two.get_shape():
            return False
        rows, *rest = one.get_shape()
        at_once = max(1, _COMPARED_AT_ONCE // max(1, math.prod(rest)))
        starts = range(0, rows, at_once)
        return all(_same(one[start : start + at_once], two[start : start + at_once]) for start in starts)

    def _slice_of(self, name: str) -> Any:
        return self._handles[self._file_of[name]].get_slice(name)


def _opened(stack: ExitStack, file: Path) -> Any:
    try:
        return stack.enter_context(safe_open(file, framework="pt"))
    except (OSError, SafetensorError) as error:
        hint = git_lfs_hint(file) or " Download it again."
        raise CheckpointError(f"{file} cannot be read: {error}.{hint}") from error


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    common = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(common), other.to(common))


def has_own_output_layer(folder: Path) -> bool:
    """Return whether a folder's output layer is another matrix than its embedding, whatever its config.json says.

    transformers does not tie them then. Two that are equal are read to the end, others to the first difference.

    Raises:
        CheckpointError: The weights cannot be read.
    """
    with SafetensorsFolder(folder) as stored:
        names = [
            next((name for name in (*spellings(wanted), *names_in_whole(wanted)) if name in stored.names), "")
            for wanted in (EMBEDDING, OUTPUT)
        ]
        return all(names) and not stored.equal(*names)
