"""The files of an exported model: tensors are joined of their pieces, cast, and written a file at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nemo_kto.network.stored import INDEX_FILE, WEIGHTS_FILE
from nemo_kto.network.weight_rules import Piece


@dataclass(kw_only=True)
class ShardWriter:
    """Takes the pieces of tensors in any order and writes a file whenever one is full.

    It holds one file's tensors, those of which pieces are still to come, and one more. A file that cannot be written
    is an error of `finish` only: until then the other ranks go on sending.

    Attributes:
        folder: Where.
        dtype_of: Piece of a tensor -> the dtype that tensor is written in.
        max_bytes: A file is full when the next tensor would make it larger.
        file_of: Name of a tensor -> name of the file it shall be in, in the order of files. A file is then also full
            when the next tensor is of a later one.
        too_large: The first tensor, with its largest value, that float16 cannot hold; it is written in bfloat16, which
            can. None if there is none.
    """

    folder: Path
    dtype_of: Callable[[Piece], torch.dtype]
    max_bytes: int
    file_of: Mapping[str, str] = field(default_factory=dict)
    too_large: tuple[str, float] | None = None
    _pieces: dict[str, dict[tuple[int, int], torch.Tensor]] = field(default_factory=dict)
    _pending: dict[str, torch.Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0
    _current: str = ""
    _total_bytes: int = 0
    _files: list[tuple[str, list[str]]] = field(default_factory=list)
    _error: OSError | None = None

    def add(self, piece: Piece, values: torch.Tensor) -> None:
        """Take a piece of a tensor; the tensor is written once all its rows are there."""
        pieces = self._pieces.setdefault(piece.name, {})
        pieces[piece.place, piece.first_row] = values
        matrices, rows = piece.stacked or 1, piece.total_rows or piece.shape[0]
        if sum(map(len, pieces.values())) < matrices * rows:
            return
        parts = [part for _, part in sorted(self._pieces.pop(piece.name).items())]
        whole = _joined(piece, parts)
        dtype = self.dtype_of(piece)
        tensor = cast(whole, dtype).contiguous()
        if tensor.dtype != dtype and self.too_large is None:
            self.too_large = (piece.name, float(whole.abs().max()))
        file = self.file_of.get(piece.name, "")
        if self._pending and (file > self._current or self._pending_bytes + tensor.nbytes > self.max_bytes):
            self._flush()
        self._current = max(self._current, file)
        self._pending[piece.name] = tensor
        self._pending_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, give the files their final names and write the index if there are several."""
        assert not self._pieces, f"the table lacks rows of {list(self._pieces)}"
        self._flush()
        if self._error is not None:
            raise self._error
        names = self._final_names()
        weight_map: dict[str, str] = {}
        for number, (final, (_, tensors)) in enumerate(zip(names, self._files, strict=True)):
            self._unnamed(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(tensors, final))
        if names != [WEIGHTS_FILE]:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _final_names(self) -> list[str]:
        """Return the files' names: those they shall have, or, where one of these became several, transformers'."""
        wanted = [file for file, _ in self._files]
        if all(file and "/" not in file for file in wanted) and len(set(wanted)) == len(wanted):
            return wanted
        if len(wanted) == 1:
            return [WEIGHTS_FILE]
        return [f"model-{number:05d}-of-{len(wanted):05d}.safetensors" for number in range(1, len(wanted) + 1)]

    def _flush(self) -> None:
        try:
            save_file(self._pending, self._unnamed(len(self._files)), metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            self._error = self._error or OSError(str(error))
        self._files.append((self._current, list(self._pending)))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _unnamed(self, number: int) -> Path:
        return self.folder / f"{number:05d}.partial"


def _joined(piece: Piece, parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the tensor that all its parts make up, of which `piece` is one, ordered by matrix and first row."""
    if piece.every > 1:  # rows that take turns
        parts = [torch.stack(parts[start : start + piece.every], 1) for start in range(0, len(parts), piece.every)]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    *matrices, rows, columns = piece.tensor_shape if len(piece.shape) > 1 else (*piece.tensor_shape, 1)
    if piece.transposed:
        return whole.reshape(*matrices, columns, rows).mT
    return whole.reshape(piece.tensor_shape)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in another dtype; in bfloat16 where float16 would make infinity of a finite number."""
    result = tensor.to(dtype)
    overflows = dtype == torch.float16 and (result.isinf() & tensor.isfinite()).any()
    return tensor.to(torch.bfloat16) if overflows else result
