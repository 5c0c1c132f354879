"""From a run, or one of its checkpoints, to a Hugging Face folder: when training ends, and `nemo-kto export-hf`."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_kto.config.folders import HUB_FILE, export_directory, log_directory
from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError, DamagedCheckpointError
from nemo_kto.kto.megatron_gpt_kto_model import MegatronGPTKTOModel
from nemo_kto.network.hf_config import read_hf_config
from nemo_kto.network.lora import adapters_merged
from nemo_kto.network.quantised_weight import QuantisedWeight, plain_weights
from nemo_kto.network.sharded import ADAPTERS, sharded_leaves
from nemo_kto.network.trained_copies import PLACES
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runs.model import dtype_of_run
from nemo_kto.runtime import parallel
from nemo_kto.runtime.checkpoint import SOURCE_FOLDER, load_common, load_tensors
from nemo_kto.runtime.checkpoint_folders import fault_of
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.adapter_config import is_adapter
from nemo_kto.weights.checkpoint_model import base_format, load_model, source_of
from nemo_kto.weights.export_hf import export_hf
from nemo_kto.weights.hub import check_repository, upload
from nemo_kto.weights.import_hf import import_hf
from nemo_kto.weights.model_card import model_card, read_facts
from nemo_kto.weights.peft_adapter import export_adapter, write_adapter

logger = logging.getLogger(__name__)

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Value of `export.dtype` -> dtype; None for that of the source."""


def run(options: argparse.Namespace) -> None:
    """Run `nemo-kto export-hf`."""
    repository, private = options.push_to_hub, not options.public
    if options.public and repository is None:
        raise ConfigError(
            "--public says who sees what --push-to-hub uploads. Name a repository, or leave --public out."
        )
    if repository is not None:
        check_repository(repository, private=private, key="--push-to-hub")
    export_checkpoint(
        options.checkpoint,
        options.folder,
        merge=options.merge or options.merge_into_original,
        into_original=options.merge_into_original,
        dtype=options.dtype,
    )
    print(f"Wrote {options.folder}", flush=True)
    if repository is not None:
        later = f"Remove {options.folder}, and run the same command again."
        print(f"Uploaded to {upload(options.folder, repository, private=private, later=later)}")


def upload_export(config: KTOConfig, *, step: int) -> None:
    """Upload what a run has exported after its last step to where `export.push_to_hub` says; nothing if that is null.

    Raises:
        ConfigError: The folder is one that the run is not known to have written.
        UploadError: It could not be done.
    """
    repository, folder = config.export.push_to_hub, export_directory(config)
    if repository is None:
        return
    if config.export.folder is not None and (_note(config).get("folder"), _note(config).get("step")) != (
        str(folder.absolute()),
        step,
    ):
        raise ConfigError(
            f"export.folder={folder} was there already, and may be anything: it is not uploaded to {repository}. Name "
            "another folder, which is then written and uploaded."
        )
    print(f"Uploading to {repository}", flush=True)
    later = "Run the same command again, which then does only that."
    address = upload(folder, repository, private=config.export.hub_private, later=later)
    note_export(config, step=step, repository=repository, address=address)
    print(f"Uploaded to {address}", flush=True)


def is_uploaded(config: KTOConfig, *, step: int) -> bool:
    """Return whether what a run has exported after this step is where `export.push_to_hub` says, if it says so."""
    repository, note = config.export.push_to_hub, _note(config)
    return repository is None or (note.get("repository"), note.get("step")) == (repository, step)


def note_export(config: KTOConfig, *, step: int, **more: str) -> None:
    """Note what was exported after which step, and `more` of what became of it, where something is to be uploaded."""
    if config.export.push_to_hub is None:
        return
    note = {"folder": str(export_directory(config).absolute()), "step": step, **more}
    file = log_directory(config) / HUB_FILE
    partial_file = file.with_name(f"{file.name}.partial")
    partial_file.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    partial_file.replace(file)


def _note(config: KTOConfig) -> dict[str, Any]:
    """Return what was noted; nothing if that cannot be read, as of a disk that was full: then it is done again."""
    try:
        note = json.loads((log_directory(config) / HUB_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


class ExportAtEnd(Callback):
    """Writes the Hugging Face or PEFT folder when the last step has been taken; not when the run was stopped earlier.

    Args:
        folder: Folder to write.
        source_folder: What `write_source_folder` wrote, on global rank 0.
        replace: Whether `folder` may be replaced, as what the run exported when it was shorter.
    """

    def __init__(self, folder: Path, source_folder: Path, *, replace: bool) -> None:
        self.folder = folder
        self.source_folder = source_folder
        self.replace = replace

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, collectively, while the process groups still exist."""
        if trainer.global_step < trainer.max_steps:
            return
        assert isinstance(pl_module, MegatronGPTKTOModel)
        trainer.strategy.complete_parameters()  # type: ignore[attr-defined]
        pl_module.check_parameters()  # no checkpoint may have been written that did
        if self.replace:
            remove = partial(shutil.rmtree, self.folder, ignore_errors=True)
            parallel.run_on_rank_zero(remove, f"{self.folder} cannot be removed")
        model, merge = pl_module, pl_module.config.export.merge_adapters
        adapter = model.lora is not None and not merge
        facts = read_facts(self.source_folder)
        card = model_card(facts, model.last_metrics, step=trainer.global_step, adapter=adapter)
        dtype = _DTYPES[model.config.export.dtype]
        if adapter:
            export_adapter(model.models, self.source_folder, self.folder, dtype=dtype, card=card)
        else:
            with _merged(model) if merge else nullcontext():
                export_hf(
                    model.models,
                    model.hf_config,
                    self.folder,
                    source_folder=self.source_folder,
                    dtype=dtype,
                    card=card,
                )
        if trainer.is_global_zero:
            note_export(model.config, step=trainer.global_step)
            print(f"Aligned {'adapter' if adapter else 'model'}: {self.folder}", flush=True)


@contextmanager
def _merged(model: MegatronGPTKTOModel) -> Iterator[None]:
    """Merge the adapters of a run into the base that its configuration says, inside a block."""
    models, export, folder = model.models, model.config.export, model.config.pretrained_checkpoint.restore_from_path
    assert model.lora is not None and folder is not None, "adapters have a base"
    with ExitStack() as stack:
        if export.merge_into_original:
            in_fewer_bits = {
                leaf.key for each in models for leaf in sharded_leaves(each) if isinstance(leaf.data, QuantisedWeight)
            }
            stack.enter_context(plain_weights(models))
            for each in models:
                parallel.run_everywhere(partial(import_hf, each, folder, keys=in_fewer_bits))
        else:
            _say_merged(model.lora.base)
        stack.enter_context(adapters_merged(models))
        yield


def _say_merged(base: str | None) -> None:
    if base is not None and is_global_rank_zero():
        logger.warning(
            "The adapters are merged into the base they were trained beside, in %s, made plain numbers. Merged into "
            "the model's own weights they compute something else: export.merge_into_original=true, or "
            "--merge-into-original, does that.",
            base.replace("_double", ", its scales in eight bits"),
        )


def export_checkpoint(
    checkpoint: Path, folder: Path, *, merge: bool = False, into_original: bool = False, dtype: str = "auto"
) -> None:
    """Write the weights of a checkpoint, saved under any layout, as a Hugging Face folder, in this one process.

    Args:
        checkpoint: A checkpoint folder of a run (`<log dir>/checkpoints/<name>`).
        folder: Folder to create.
        merge: Of a run with LoRA, write the whole model instead of an adapter for PEFT.
        into_original: With `merge`, where the base was in fewer bits in training, merge into the folder's own weights.
        dtype: Dtype of the written weights, `float32`, `bfloat16` or `float16`; `auto` for that of the folder training
            started from, or, of an adapter, that it was trained in.

    Raises:
        CheckpointError: `checkpoint` is not a finished checkpoint of this package, or `folder` is not empty, or the
            base model is not where it was.
        ConfigError: `merge` without LoRA, `into_original` where the base was not in fewer bits, or there is no such
            `dtype`.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype} is not one of {', '.join(_DTYPES)}.")
    source = source_of(checkpoint)
    if merge and not is_adapter(source):
        raise ConfigError(f"{checkpoint} has no adapters that could be merged. Leave --merge out.")
    if into_original and base_format(source) is None:
        raise ConfigError(f"The base in {checkpoint} was the original. Use --merge instead of --merge-into-original.")
    fault = fault_of(checkpoint, checksums=True)
    if fault is not None:
        raise DamagedCheckpointError(checkpoint, fault)
    with parallel.default_group():
        adapter = is_adapter(source) and not merge
        card = _card_of(checkpoint, adapter=adapter)
        if adapter:
            _export_adapters(checkpoint, folder, card, _DTYPES[dtype])
        else:
            _export_model(checkpoint, folder, card, _DTYPES[dtype], into_original=into_original)


def _card_of(checkpoint: Path, *, adapter: bool) -> str | None:
    """Return the model card of what a checkpoint holds."""
    common = load_common(checkpoint)
    facts = read_facts(checkpoint / SOURCE_FOLDER)
    return model_card(facts, common.get("metrics", {}), step=common["global_step"], adapter=adapter)


def _export_adapters(checkpoint: Path, folder: Path, card: str | None, dtype: torch.dtype | None) -> None:
    """Write the adapters of a checkpoint without building the model they belong to."""
    # the optimizer's have names of their own
    ours = ("decoder.", *PLACES.values())
    tensors = load_tensors(checkpoint, lambda key: ADAPTERS in key and key.startswith(ours))
    source = checkpoint / SOURCE_FOLDER
    write = partial(write_adapter, tensors, read_hf_config(source), source, folder, dtype=dtype, card=card)
    parallel.run_on_rank_zero(write, f"The adapter cannot be written to {folder}")


def _export_model(
    checkpoint: Path, folder: Path, card: str | None, dtype: torch.dtype | None, *, into_original: bool
) -> None:
    layout = Layout(world_size=1)
    parallel.initialize(layout, seed=0)
    source = source_of(checkpoint)
    # a base in fewer bits is the plain numbers of the run's dtype
    in_fewer_bits = base_format(source) is not None and not into_original
    params_dtype = dtype_of_run(source) if in_fewer_bits else torch.float32
    model = load_model(
        checkpoint, layout, params_dtype=params_dtype, verify=False, original_base=into_original
    )  # it has been verified
    if is_adapter(source) and not into_original:
        _say_merged(base_format(source))
    with adapters_merged([model]) if is_adapter(source) else nullcontext():
        export_hf([model], model.hf_config, folder, source_folder=source, dtype=dtype, card=card)
