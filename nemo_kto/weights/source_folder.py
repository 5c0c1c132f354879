"""What a run keeps of the folders it starts from, so that every checkpoint can be exported."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PretrainedConfig

from nemo_kto.network.projections import LoRASettings
from nemo_kto.weights.adapter_config import CONFIG_FILE, adapter_config
from nemo_kto.weights.folder import copy_companions
from nemo_kto.weights.source_form import keep_form, write_config


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
        model_folder: The Hugging Face folder training starts from, whose configuration and form of weights are kept;
            None for a model with random weights.
        tokenizer_folder: The folder the run's tokenizer comes from.
        lora: The adapters of the run, whose description is kept, with the base model's place.
    """
    copy_companions(tokenizer_folder, folder, of_model=model_folder is None)
    if lora is not None:
        assert model_folder is not None, "parse_config has checked this"
        description = adapter_config(lora, base_folder=model_folder.absolute(), hf_config=hf_config)
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    write_config(folder, hf_config, source=model_folder)
    if model_folder is not None:
        copy_companions(model_folder, folder, of_tokenizer=False)
        keep_form(model_folder, folder)
