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
from nemo_kto.network.bits_and_bytes import ScalesOfScales
from nemo_kto.network.folder_tensors import FolderTensors, is_of_activations
from nemo_kto.network.quantised import PackedTensor, Quantisation, quantisation_of_folder
from nemo_kto.network.tables import EMBEDDING, OUTPUT
from nemo_kto.network.weight_rules import Piece, Region, names_in_whole, spellings

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What the safetensors format calls the dtypes that weights may have."""

NO_WEIGHTS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8, "BOOL": torch.bool}
"""The same of other tensors, which only what is passed on as it is may have."""

_IN_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")

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
        left_out: Names of tensors that are for computing in fewer bits alone, and no tensors of the model.
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
        self._stored_in = self._file_of
        self._packed: dict[str, PackedTensor] = {}
        self.quantisation = quantisation_of_folder(folder)
        self.left_out: list[str] = []
        if self.quantisation is not None:
            self._set_apart(self.quantisation)
        self.quantised = self._packed.keys()
        self.names = self._file_of.keys()
        self.files: dict[Path, list[str]] = {file: [] for file in self._handles}
        for name, file in self._file_of.items():
            self.files[file].append(name)

    def _set_apart(self, quantisation: Quantisation) -> None:
        """Put in place of the tensors that others are stored in the others; what is for computing so has no place."""
        self.left_out += sorted(name for name in self._file_of if is_of_activations(name))
        metadata: dict[str, str] = {}
        for handle in self._handles.values():
            metadata |= handle.metadata() or {}
        names = {name: file for name, file in self._file_of.items() if not is_of_activations(name)}
        self._packed.update(quantisation.packed(FolderTensors(str(self.folder), names, self._slice_of, metadata)))
        places = {name: names[packed.parts[0]] for name, packed in self._packed.items()}
        parts = {part for packed in self._packed.values() for part in packed.parts}
        self._file_of = {name: file for name, file in names.items() if name not in parts} | places

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
        return piece.taken_from(self._block(piece.name, piece.within(region)))

    def equal(self, name: str, other: str) -> bool:
        """Return whether two tensors have the same shape and values, as plain numbers."""
        shape = self.shape(name)
        if shape != self.shape(other):
            return False
        rows, *rest = shape
        at_once = max(1, _COMPARED_AT_ONCE // max(1, math.prod(rest)))
        of_all = [slice(0, size) for size in rest]
        for start in range(0, rows, at_once):
            where = (slice(start, min(start + at_once, rows)), *of_all)
            if not _same(self._block(name, where), self._block(other, where)):
                return False
        return True

    def scales_of_scales(self, name: str) -> ScalesOfScales | None:
        """Return how the scales of a tensor are stored, where it has some in eight bits, else None."""
        return self._packed[name].scales_of_scales() if name in self._packed else None

    def has_numbers_of(self, kind: str) -> bool:
        """Return whether all of `quantised` have the very numbers of a format, see `quantised_weight.FORMATS`."""
        return all(packed.kept_as == kind for packed in self._packed.values())

    @property
    def bits(self) -> str:
        """In how many bits the numbers are that are stored in fewer, in words."""
        counts = sorted({packed.bits for packed in self._packed.values()})
        return " and ".join(_IN_WORDS[bits] for bits in counts) + " bits"

    def _block(self, name: str, where: Region) -> torch.Tensor:
        packed = self._packed.get(name)
        block: torch.Tensor = self._slice_of(name)[where] if packed is None else packed.read(where)
        return block

    def _slice_of(self, name: str) -> Any:
        return self._handles[self._stored_in[name]].get_slice(name)


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
