"""What can be judged of a run by its configuration and by names of files, before torch is imported.

Every rule is another module's, and holds again, on what was really loaded, when the run is prepared: here it is only
asked early, so that a mistake costs a second. What cannot be known yet (devices, weights, what is in the data, where a
run that is resumed stands) is left to then.
"""

from __future__ import annotations

import functools
import logging

from nemo_kto.config.folders import (
    check_named_folders,
    export_folder,
    log_directory,
    model_folder,
    tokenizer_folder,
    written_folders,
)
from nemo_kto.config.plugins import check_callbacks, check_functions
from nemo_kto.config.schema import DataConfig, KTOConfig, ModelConfig
from nemo_kto.data.reading.parts import check_there
from nemo_kto.data.tokens.tokenizer import check_tokenizer_folder
from nemo_kto.errors import ConfigError, DataError
from nemo_kto.network.families import sizes_of_folder
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runs.checkpoints import checkpoint_to_evaluate, resumable_checkpoint
from nemo_kto.runs.layout import check_division, known_layout
from nemo_kto.runs.records import check_named, sources, without_training
from nemo_kto.runtime.disk import check_writable
from nemo_kto.runtime.launch import check_environment
from nemo_kto.runtime.layout import ModelSizes
from nemo_kto.runtime.log_lock import check_free
from nemo_kto.weights.hub import check_repository

logger = logging.getLogger(__name__)


def check_early(config: KTOConfig, command: str, *, locks: bool = True) -> None:
    """Raise what a command would raise later, as far as it is certain by now.

    Args:
        config: The configuration.
        command: Name of a module of `nemo_kto.commands`.
        locks: Whether another run in the log folder is such a thing.

    Raises:
        ConfigError: The layout cannot work, code that is named is not there, or something that has to be named is
            not, or is in the way.
        DataError: Data is not there.
        CheckpointError: A folder or a checkpoint is not there.
    """
    trains = command != "evaluate"
    check_environment()
    check_functions(config)
    if command == "train":
        check_callbacks(config)
        if locks and is_global_rank_zero():  # the others are of that very run
            check_free(log_directory(config))
    check_folders(config, command)
    if command == "train":
        check_upload(config)
    if command == "evaluate":
        config = without_training(config)
    check_known_layout(config)
    check_named(config.model.data, trains=trains)
    check_sources(config.model.data)


def check_folders(config: KTOConfig, command: str) -> None:
    """Raise what is wrong with the folders that a command reads and writes, data apart; before any data is read.

    Args:
        config: The configuration.
        command: Name of a module of `nemo_kto.commands`.

    Raises:
        ConfigError: A folder that has to be named is not, or is in the way, or nothing can be written to it.
        CheckpointError: A folder or a checkpoint is not there.
    """
    if command == "evaluate":
        checkpoint_to_evaluate(config)
    check_tokenizer_folder(tokenizer_folder(config))
    check_named_folders(config)
    for key, folder in written_folders(config, command).items():
        check_writable(folder, key)
    # a run that is resumed may have taken all its steps, and then what it exported is in nobody's way
    if command == "train" and resumable_checkpoint(config, log_directory(config)) is None:
        export_folder(config, resumes=False)


def check_upload(config: KTOConfig) -> None:
    """Raise a ConfigError if what is trained could not be uploaded where `export.push_to_hub` says; rank 0 asks.

    A run that goes on does so all the same, with a warning: what was trained does not wait for the Hub.
    """
    repository, private = config.export.push_to_hub, config.export.hub_private
    if repository is None or not is_global_rank_zero():
        return
    try:
        check_repository(repository, private=private, key="export.push_to_hub")
    except ConfigError as error:
        if resumable_checkpoint(config, log_directory(config)) is None:
            raise
        _warn_of_upload(str(error))


@functools.cache  # a command asks early, and when it begins
def _warn_of_upload(why: str) -> None:
    logger.warning("The run goes on, but as it stands nothing can be uploaded at its end. %s", why)


def check_known_layout(config: KTOConfig) -> None:
    """Raise a ConfigError when the layout cannot work, where processes and model are known by now."""
    layout, folder = known_layout(config), model_folder(config)
    sizes = _sizes_of_keys(config.model) if folder is None else sizes_of_folder(folder)
    if layout is not None and sizes is not None:
        check_division(config, layout, sizes)


def _sizes_of_keys(model: ModelConfig) -> ModelSizes | None:
    """Return the sizes of a model with random weights, which is dense; None if some are missing."""
    if model.num_layers is None or model.num_attention_heads is None:
        return None
    return ModelSizes(
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
    )


def check_sources(data: DataConfig) -> None:
    """Raise a DataError, or a ConfigError, for data that is named and not there."""
    for split in ("train", "validation"):
        try:
            for source in sources(data, getattr(data.data_prefix, split) or ()):
                check_there(source)
        except DataError as error:
            raise DataError(f"{split} data: {error}") from error
