"""How the folder that a model comes from stores it, which is how it is exported: names, dtypes, files, config.json."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from nemo_kto.errors import CheckpointError, KTOError
from nemo_kto.network import quantised
from nemo_kto.network.families import family_of
from nemo_kto.network.family import whole_of
from nemo_kto.network.hf_config import read_hf_config
from nemo_kto.network.stored import DTYPES, NO_WEIGHTS, SafetensorsFolder, has_weights
from nemo_kto.weights.folder import configured_dtype

_FORM_FILE = "source_weights.json"

_ALL_DTYPES = DTYPES | NO_WEIGHTS


@dataclass(frozen=True, kw_only=True)
class StoredForm:
    """How a folder stores a model.

    Attributes:
        files: Name of each of its files -> name of a tensor -> dtype, as the safetensors format calls it.
        largest_file: Bytes of the tensors in the largest file.
        folder: The folder.
    """

    files: dict[str, dict[str, str]]
    largest_file: int
    folder: str | None = None  # as written by earlier versions

    @cached_property
    def file_of(self) -> dict[str, str]:
        """Name of a tensor -> name of its file."""
        return {name: file for file, names in self.files.items() for name in names}

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return _ALL_DTYPES[self.files[self.file_of[name]][name]]


def stored_form(folder: Path) -> StoredForm | None:
    """Return how the weights of a folder are stored, or were in the one that it was made of; None if nothing tells.

    Raises:
        CheckpointError: The weights cannot be read.
    """
    if has_weights(folder):
        with SafetensorsFolder(folder) as stored:
            files = {
                str(file.relative_to(folder)): {name: stored.dtype(name) for name in names}
                for file, names in stored.files.items()
            }
            sizes = [
                sum(math.prod(stored.shape(name)) * _ALL_DTYPES[dtype].itemsize for name, dtype in tensors.items())
                for tensors in files.values()
            ]
        return StoredForm(files=files, largest_file=max(sizes), folder=str(folder.absolute()))
    file = folder / _FORM_FILE
    return StoredForm(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def folder_of_whole(form: StoredForm | None, whole: str | None) -> Path:
    """Return the folder with the tensors of a model that sees images, which only the language model is read of.

    Args:
        form: What `stored_form` said of the folder, or of one that was made of it.
        whole: What the model is called, for messages.

    Raises:
        CheckpointError: They are not there any more.
    """
    if form is None or form.folder is None:
        raise CheckpointError(f"There is nothing to tell where the rest of this {whole} is. Name its folder.")
    folder = Path(form.folder)
    if not has_weights(folder) or stored_form(folder) != form:
        raise CheckpointError(
            f"The tensors of this {whole} that see images were in {folder}, and are not there any more. Put that "
            "folder back."
        )
    return folder


def keep_form(source: Path, folder: Path) -> None:
    """Note in `folder` how the weights of `source` are stored, for when they are not there any more."""
    form = stored_form(source)
    if form is not None:
        (folder / _FORM_FILE).write_text(json.dumps(asdict(form)) + "\n", encoding="utf-8")


def describes(folder: Path, config: PretrainedConfig) -> bool:
    """Return whether a folder's config.json is of the model of `config`, but for what training and export change."""
    try:
        return _compared(read_hf_config(folder)) == _compared(config)
    except KTOError:
        return False


def _compared(config: PretrainedConfig) -> dict[str, Any]:
    changing = ("_name_or_path", "dtype", "torch_dtype", "tie_word_embeddings", *family_of(config).further_layers)
    return {key: value for key, value in config.to_dict().items() if key not in changing}


def write_config(
    folder: Path, config: PretrainedConfig, *, source: Path | None, dtype: torch.dtype | None = None
) -> None:
    """Write a model's config.json into `folder`: its source's, letter by letter, but for what is another.

    transformers 5 would write it in a form that transformers 4 misreads.

    Args:
        folder: Where.
        config: The model's configuration.
        source: A folder whose config.json describes the model; None to make one of `config`.
        dtype: Dtype of the weights beside it; None for what the configuration says, if anything.
    """
    target = folder / "config.json"
    if source is None:
        fields = _made_of(config)
        changes: dict[str, Any] = {}
    else:
        fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
        shutil.copyfile(source / "config.json", target)
        changes = _untied(read_hf_config(source), config)
    is_quantised = False
    while (found := quantised.described_in(fields)) is not None:
        del found[0][found[1]]
        is_quantised = True
    text = fields if whole_of(config) is None else fields.get("text_config", fields)
    left_out = {name: 0 for name in family_of(config).further_layers if text.get(name)}
    text |= left_out
    if dtype is not None and configured_dtype(config) != dtype:
        # transformers 5 reads either, 4 the longer one
        keys = [key for key in ("torch_dtype", "dtype") if key in fields] or ["torch_dtype"]
        changes |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    if whole_of(config) is not None:
        _change_parts(fields, changes)
    if changes or left_out or is_quantised or source is None:
        target.write_text(json.dumps({**fields, **changes}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _change_parts(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    """Change the descriptions of the parts of a model that sees images, which name a dtype too."""
    for part in fields.values():
        if isinstance(part, dict):
            part |= {key: value for key, value in changes.items() if key in part}


def _untied(source: PretrainedConfig, config: PretrainedConfig) -> dict[str, Any]:
    same = bool(source.tie_word_embeddings) == bool(config.tie_word_embeddings)
    return {} if same else {"tie_word_embeddings": bool(config.tie_word_embeddings)}


def _made_of(config: PretrainedConfig) -> dict[str, Any]:
    """Return what config.json says of a model without a source, with the rotary embedding for transformers 4 too."""
    fields: dict[str, Any] = json.loads(config.to_json_string())
    rope = dict(getattr(config, "rope_parameters", None) or {})
    fields |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return fields if rope.get("rope_type", "default") == "default" else {**fields, "rope_scaling": rope}
