"""Held-out loss, rewards and how well rewards tell the labels, by file and overall, under any layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torchmetrics.functional.classification import binary_auroc

from nemo_kto.algorithms.metrics import MetricSums
from nemo_kto.config.folders import log_directory, model_folder
from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.batches.packed_rows import KTOBatch
from nemo_kto.errors import ConfigError
from nemo_kto.kto.megatron_gpt_kto_model import MegatronGPTKTOModel
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runs.checkpoints import checkpoint_to_evaluate
from nemo_kto.runs.early import check_folders
from nemo_kto.runs.facts import common_facts
from nemo_kto.runs.records import without_training
from nemo_kto.runs.resume import check_scored_like_trained
from nemo_kto.runs.run import prepare
from nemo_kto.runs.trainer import finishes, strategy, trainer_settings
from nemo_kto.runtime.checkpoint_folders import step_of
from nemo_kto.runtime.progress import progress
from nemo_kto.weights.checkpoint_model import source_of

OUTPUT_FILE = "evaluation.json"

_COLUMNS = {
    "samples": "samples",
    "desirable": "thumbs up",
    "loss": "loss",
    "kl": "kl",
    "rewards/chosen": "reward up",
    "rewards/rejected": "reward down",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "roc_auc": "ROC-AUC",
}
"""What is printed of the results -> heading."""


def evaluate(config: KTOConfig) -> dict[str, Any] | None:
    """Score the validation data with a checkpoint of a run, print a table and write `evaluation.json`.

    The checkpoint is `evaluation.checkpoint`, or the newest of the run's log folder. Without any, the model that
    training would start from is scored against another reference.

    Args:
        config: The configuration of the run; its layout may be another.

    Returns:
        What was written, on the process that speaks for the run; None on the others.

    Raises:
        ConfigError: See `train`; also if there is no held-out data, or nothing that differs from the reference.
        DataError: See `train`.
        CheckpointError: A folder or the checkpoint cannot be used, or the results not be written.
        RankError: See `train`.
    """
    check_folders(config, "evaluate")
    checkpoint = checkpoint_to_evaluate(config)
    output = Path(config.evaluation.output or log_directory(config) / OUTPUT_FILE).absolute()
    run = prepare(without_training(config), trains=False)
    if checkpoint is not None:
        source_of(checkpoint)  # what is compared next has to be what was written
        check_scored_like_trained(checkpoint, run.config, run.hf_config, lora=run.lora, reference=run.reference)
    names, file_of = run.data.files_of("validation")
    collector = Collector(names, file_of)
    trainer = Trainer(
        **trainer_settings(run),
        strategy=strategy(run, common_facts(run, {"the checkpoint": checkpoint})),
        callbacks=[progress(), collector],
    )
    if is_global_rank_zero():
        what = checkpoint or f"{model_folder(config)} (no checkpoint)"
        print(f"Evaluating {what}, on {run.accelerator}, {run.layout}", flush=True)
    finishes(trainer, partial(trainer.validate, run.model(), datamodule=run.data, ckpt_path=checkpoint, verbose=False))
    if not is_global_rank_zero():
        return None
    assert collector.results is not None
    place = {
        "checkpoint": str(checkpoint) if checkpoint else None,
        "step": step_of(checkpoint) if checkpoint else None,
    }
    results = {**place, **collector.results}
    _print_table(results)
    print(f"Results: {write_results(output, results)}", flush=True)
    return results


class Collector(Callback):
    """Collects what a validation finds, file by file.

    Args:
        names: The files that the samples are of.
        file_of: `[N]` the number of each sample's file.

    Attributes:
        results: `files` and `overall`, see `describe`; None until the validation has ended, and except on rank 0.
    """

    def __init__(self, names: list[str], file_of: np.ndarray) -> None:
        self.results: dict[str, Any] | None = None
        self._names = names
        self._file_of = torch.from_numpy(file_of)
        self._sums: list[MetricSums] = []
        self._scored: list[torch.Tensor] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what was found before."""
        self._sums = [MetricSums(pl_module.device) for _ in range(len(self._names) + 1)]
        self._scored = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: KTOBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add this replica's part of a batch, on the one rank of it that reports."""
        if outputs is None:
            return
        assert isinstance(pl_module, MegatronGPTKTOModel)
        files, real = self._file_of[batch.pairs[:, 0]], batch.weights.cpu() > 0
        for number in [*files[real].unique().tolist(), len(self._names)]:
            mine = (files == number).to(batch.weights.device) | (number == len(self._names))
            part = dataclasses.replace(batch, weights=batch.weights * mine, loss_weights=batch.loss_weights * mine)
            pl_module.objective.add_metrics(self._sums[number], part, outputs["baseline"], outputs["observed"])
        log_ratios = outputs["observed"][1].double().cpu()
        columns = torch.stack([files.double(), batch.desirable.double().cpu(), log_ratios])
        self._scored.append(columns[:, real])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the parts of all ranks together."""
        assert isinstance(pl_module, MegatronGPTKTOModel)
        found = []
        for sums in self._sums:
            sums.reduce_()
            metrics = sums.means()
            if metrics:  # none of a file that has no sample, or is behind trainer.kto.limit_val_batches
                pl_module.objective.finish_metrics(metrics, learn=False)
            found.append(metrics)
        parts: list[list[torch.Tensor]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, self._scored)
        files, desirable, rewards = torch.cat([scored for part in parts for scored in part], dim=1)
        if trainer.is_global_zero:
            everything = torch.ones_like(files, dtype=torch.bool)
            chosen = [*((files == number) for number in range(len(self._names))), everything]
            rows = [
                describe(metrics, rewards[mine], desirable[mine] > 0)
                for metrics, mine in zip(found, chosen, strict=True)
            ]
            self.results = {
                "files": [
                    {"file": name, **row} for name, row in zip(self._names, rows, strict=False) if row["samples"]
                ],
                "overall": rows[-1],
            }


def describe(metrics: Mapping[str, float], rewards: torch.Tensor, desirable: torch.Tensor) -> dict[str, Any]:
    """Return what is reported of some samples: their number, those with thumbs up, `metrics`, and `roc_auc`.

    `roc_auc` is the area under the ROC curve of the reward as a classifier of the label: the chance that a thumbs-up
    sample has a higher reward than a thumbs-down one, ties counting half; None if there is no sample of either kind.

    Args:
        metrics: Their means.
        rewards: `[n]`, or anything that grows with them.
        desirable: `[n]` bool.
    """
    auc = None
    if desirable.any() and not desirable.all():
        # torchmetrics wants probabilities, and would squash rewards until neighbours are equal; ranks say the same
        _, ranks = rewards.unique(return_inverse=True)
        auc = float(binary_auroc(ranks.double() / max(int(ranks.max()), 1), desirable.long()))
    return {"samples": len(rewards), "desirable": int(desirable.sum()), **metrics, "roc_auc": auc}


def write_results(file: Path, results: Mapping[str, Any]) -> Path:
    """Write results as JSON and return the file.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial_file = file.with_name(f"{file.name}.partial")  # the command may be ended at any moment
        partial_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        partial_file.replace(file)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written ({error.strerror}). Name another file in evaluation.output."
        ) from error
    return file


def _print_table(results: Mapping[str, Any]) -> None:
    paths = [Path(row["file"]) for row in results["files"]]
    unique = len({path.name for path in paths}) == len(paths)
    rows = [(path.name if unique else str(path), row) for path, row in zip(paths, results["files"], strict=True)]
    rows.append(("all", results["overall"]))
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("file", overflow="fold")  # it gives way to the others, but no name is cut
    shown = {name: heading for name, heading in _COLUMNS.items() if any(row.get(name) is not None for _, row in rows)}
    for heading in shown.values():
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, row in rows if len(rows) > 2 else rows[-1:]:
        table.add_row(escape(name), *map(partial(_cell, row), shown))
    Console(width=max(100, Console().width)).print(table)


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
