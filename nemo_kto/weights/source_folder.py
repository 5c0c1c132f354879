"""What a run keeps of the folders it starts from, so that every checkpoint can be exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import PretrainedConfig

from nemo_kto.network.projections import LoRASettings
from nemo_kto.weights.folder import copy_companions
from nemo_kto.weights.peft_adapter import CONFIG_FILE, adapter_config


def write_source_folder(
    folder: Path,
    hf_config: PretrainedConfig,
    *,
    model_folder: Path | None,
    tokenizer_folder: Path,
    lora: LoRASettings | None = None,
) -> None:
    """Keep in `folder` what an exported model needs besides weights: configuration, tokenizer, chat template.

    Args:
        folder: An empty folder.
        hf_config: The model's configuration.
        model_folder: The Hugging Face folder training starts from, whose configuration is kept byte by byte; None for
            a model with random weights.
        tokenizer_folder: The folder the run's tokenizer comes from.
        lora: The adapters of the run, whose description is kept, with the base model's place.
    """
    copy_companions(tokenizer_folder, folder)
    if lora is not None:
        assert model_folder is not None, "parse_config has checked this"
        description = adapter_config(lora, base_folder=model_folder.absolute(), num_layers=hf_config.num_hidden_layers)
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    if model_folder is None:
        hf_config.save_pretrained(folder)
        return
    for name in ("config.json", "generation_config.json"):
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, folder / name)
