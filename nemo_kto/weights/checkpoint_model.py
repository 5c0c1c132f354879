"""The model in a checkpoint, built again without the run that wrote it, under any layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nemo_kto.errors import CheckpointError, DamagedCheckpointError
from nemo_kto.network.family import whole_of
from nemo_kto.network.gpt import KTOGPTModel, build_gpt
from nemo_kto.network.hf_config import load_hf_config, whole_config
from nemo_kto.network.lora import add_adapters
from nemo_kto.network.vision import VisionSettings, can_see
from nemo_kto.runtime.checkpoint import (
    IDENTITY_FILE,
    SOURCE_FOLDER,
    ShardedCheckpointIO,
    sharded_trained,
    sharding_metadata,
)
from nemo_kto.runtime.checkpoint_folders import fault_of, is_finished
from nemo_kto.runtime.checkpoint_manifest import first_fault
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.adapter_config import base_folder, is_adapter, read_adapter_config
from nemo_kto.weights.folder import weights_digest
from nemo_kto.weights.import_hf import import_hf
from nemo_kto.weights.source_form import folder_of_whole, stored_form

TRAINED_OF_VISION = "model.vision.train"
"""What a run's identity says of `VisionSettings.train`; None for `none`, as in earlier versions."""


def source_of(checkpoint: Path) -> Path:
    """Return the folder with configuration, tokenizer and identity in a checkpoint.

    Raises:
        CheckpointError: It is not a finished checkpoint of this package.
        DamagedCheckpointError: A file is missing or of another size, or one in that folder is not what was written;
            the others are looked at when they are read.
    """
    source = checkpoint / SOURCE_FOLDER
    if not is_finished(checkpoint) or not source.is_dir():
        raise CheckpointError(
            f"{checkpoint} is not a finished nemo_kto checkpoint. Name one of the folders in <log dir>/checkpoints."
        )
    small = [path.relative_to(checkpoint).as_posix() for path in source.rglob("*") if path.is_file()]
    fault = fault_of(checkpoint, checksums=False) or first_fault(checkpoint, names=small)
    if fault is not None:
        raise DamagedCheckpointError(checkpoint, fault)
    return source


def base_format(source: Path) -> str | None:
    """Return in which format a run kept the base beside its adapters: a key of `quantised_weight.FORMATS`, or None.

    Args:
        source: What `source_of` returned.
    """
    found: str | None = json.loads((source / IDENTITY_FILE).read_text(encoding="utf-8")).get(
        "model.peft.quantize_base"
    )
    return found


def load_model(
    checkpoint: Path,
    layout: Layout,
    *,
    params_dtype: torch.dtype = torch.float32,
    verify: bool = True,
    original_base: bool = False,
    images: bool = False,
) -> KTOGPTModel:
    """Return this rank's part of the model, with the weights of a checkpoint saved under any layout; collective.

    Of a run with LoRA, the base model is read from where it was, and the adapters are there, not merged.

    Args:
        checkpoint: A finished checkpoint.
        layout: The layout, without interleaved stages; its process groups exist.
        params_dtype: Dtype of parameters and activations.
        verify: See `ShardedCheckpointIO`.
        original_base: Have the base model as its folder has it, also where adapters were trained beside one in fewer
            bits.
        images: Have what sees images, of a model that does, also where nothing of it was trained.

    Raises:
        CheckpointError: The checkpoint or its base model cannot be used.
        ConfigError: The model cannot be divided like this.
    """
    assert layout.virtual == 1, layout
    source = source_of(checkpoint)
    hf_config = load_hf_config(source)
    has_adapters = is_adapter(source)
    quantised = None if original_base else base_format(source)
    model = build_gpt(
        hf_config,
        layout,
        params_dtype=params_dtype,
        unfused=has_adapters,
        quantised=quantised,
        vision=_vision(source, images=images),
    )
    if has_adapters:
        base = base_folder(source)
        identity = json.loads((source / IDENTITY_FILE).read_text(encoding="utf-8"))
        if identity["pretrained_checkpoint.restore_from_path"] != weights_digest(load_hf_config(base), base):
            raise CheckpointError(
                f"The model in {base} is not the one that the adapters in {checkpoint} were trained on."
            )
        import_hf(model, base)
        add_adapters(model, read_adapter_config(source, num_layers=hf_config.num_hidden_layers))
    elif images and can_see(hf_config):
        folder = folder_of_whole(stored_form(source), whole_of(hf_config))  # on all ranks, should it be gone
        import_hf(model, folder, keys={leaf.key for leaf in model.frozen_leaves()})
    state = {"state_dict": {"chunk0": sharded_trained(model, sharding_metadata())}}
    loaded = ShardedCheckpointIO(verify=verify).load_checkpoint(checkpoint, sharded_state_dict=state)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Megatron leaves out what is empty: a stage of which nothing is trained
    found = model.load_state_dict(loaded.get("state_dict", {}).get("chunk0", {}), strict=False)
    assert not trained & set(found.missing_keys) and not found.unexpected_keys, found
    return model


def _vision(source: Path, *, images: bool) -> VisionSettings | None:
    """Return what sees images in the model of a checkpoint, if that is wanted or part of it was trained."""
    identity = json.loads((source / IDENTITY_FILE).read_text(encoding="utf-8"))
    train, whole = identity.get(TRAINED_OF_VISION) or "none", whole_config(source)
    if whole is None or not (images or train != "none"):
        return None
    return VisionSettings(config=whole, train=train)
