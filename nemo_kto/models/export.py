"""From a run, or one of its checkpoints, to a Hugging Face folder."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PretrainedConfig

from nemo_kto.errors import CheckpointError
from nemo_kto.models.gpt import build_gpt, load_hf_config
from nemo_kto.models.hf_weights import copy_companions, export_hf
from nemo_kto.models.megatron_gpt_kto_model import MegatronGPTKTOModel
from nemo_kto.runtime import cpu_megatron, parallel
from nemo_kto.runtime.checkpoint import SOURCE_FOLDER, ShardedCheckpointIO, is_finished, sharding_metadata
from nemo_kto.runtime.layout import Layout


def write_source_folder(
    folder: Path, hf_config: PretrainedConfig, *, model_folder: Path | None, tokenizer_folder: Path
) -> None:
    """Keep in `folder` what an exported model needs besides weights: configuration, tokenizer, chat template.

    Args:
        folder: An empty folder.
        hf_config: The model's configuration.
        model_folder: The Hugging Face folder training starts from, whose configuration is kept byte by byte; None for
            a model with random weights.
        tokenizer_folder: The folder the run's tokenizer comes from.
    """
    copy_companions(tokenizer_folder, folder)
    if model_folder is None:
        hf_config.save_pretrained(folder)
        return
    for name in ("config.json", "generation_config.json"):
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, folder / name)


class ExportAtEnd(Callback):
    """Writes the Hugging Face folder when the last step has been taken; not when the run was stopped earlier.

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
        if self.replace:
            remove = partial(shutil.rmtree, self.folder, ignore_errors=True)
            parallel.run_on_rank_zero(remove, f"{self.folder} cannot be removed")
        export_hf(
            [chunk.module for chunk in pl_module.chunks],
            pl_module.hf_config,
            self.folder,
            tokenizer_folder=self.source_folder,
        )
        if trainer.is_global_zero:
            print(f"Aligned model: {self.folder}", flush=True)


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Write the weights of a checkpoint, saved under any layout, as a Hugging Face folder, in this one process.

    Args:
        checkpoint: A checkpoint folder of a run (`<log dir>/checkpoints/<name>`).
        folder: Folder to create.

    Raises:
        CheckpointError: `checkpoint` is not a finished checkpoint of this package, or `folder` is not empty.
    """
    source = checkpoint / SOURCE_FOLDER
    if not is_finished(checkpoint) or not source.is_dir():
        raise CheckpointError(
            f"{checkpoint} is not a finished nemo_kto checkpoint. Name one of the folders in <log dir>/checkpoints."
        )
    if not torch.cuda.is_available():
        cpu_megatron.enable_cpu()
    hf_config = load_hf_config(source)
    with tempfile.TemporaryDirectory() as rendezvous:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{rendezvous}/store", rank=0, world_size=1)
        try:
            _export(checkpoint, folder, hf_config)
        finally:
            parallel.destroy()


def _export(checkpoint: Path, folder: Path, hf_config: PretrainedConfig) -> None:
    layout = Layout(world_size=1)
    parallel.initialize(layout, seed=0)
    model = build_gpt(hf_config, layout)
    loaded = ShardedCheckpointIO().load_checkpoint(
        checkpoint,
        sharded_state_dict={"state_dict": {"chunk0": model.sharded_state_dict(metadata=sharding_metadata())}},
    )
    model.load_state_dict(loaded["state_dict"]["chunk0"])
    export_hf([model], hf_config, folder, tokenizer_folder=checkpoint / SOURCE_FOLDER)
