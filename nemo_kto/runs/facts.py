"""What a run is, as JSON: configuration, data, and the versions it runs with. For its report and its model card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemo_kto.config.folders import FACTS_FILE
from nemo_kto.config.reader import leaf_values
from nemo_kto.data.batches.statistics import summarize
from nemo_kto.network.family import whole_of
from nemo_kto.runs.run import Run

_PACKAGES = (
    "nemo_kto",
    "torch",
    "megatron-core",
    "nemo_toolkit",
    "lightning",
    "transformers",
    "transformer_engine",
    "apex",
)


def run_facts(run: Run) -> dict[str, Any]:
    """Return the facts of a run.

    Returns:
        `name`, `started` (ISO 8601, UTC), `layout` and `accelerator` in words, whether the tokenizer has a
        `chat_template`, whether the model `sees_images`, `config` as nested mappings, `versions` of packages, and
        `data`: split -> see `summarize`.
    """
    return {
        "name": run.config.exp_manager.name,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "layout": str(run.layout),
        "accelerator": run.accelerator,
        "chat_template": run.tokenizer.chat_template is not None,
        "sees_images": whole_of(run.hf_config) is not None,
        "config": dataclasses.asdict(run.config),
        "versions": _versions(),
        "data": {split: summarize(samples, *run.data.files_of(split)) for split, samples in run.data.splits.items()},
    }


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write the facts into a folder."""
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


_MAY_DIFFER = (
    "exp_manager.mlflow_logger_kwargs",
    "exp_manager.wandb_logger_kwargs",
    "export.folder",
    "model.data.cache_dir",
    "model.data.data_prefix.train",
    "model.data.data_prefix.validation",
    "model.data.num_workers",
    "model.data.tokenize_workers",
    "model.kto.reference.cache_dir",
    "model.kto.reference.checkpoint",
    "model.peft.lora_tuning.restore_from_path",
    "model.tokenizer.path",
    "pretrained_checkpoint.restore_from_path",
)
"""Keys that each machine may have another value of: where things are, whose contents are compared, and how many
processes help a rank."""


def common_facts(run: Run, others: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return what all ranks of a run must have been given alike, for messages: name -> value, both in words.

    Args:
        run: The run.
        others: What else: name -> value.
    """
    values = {key: value for key, value in leaf_values(run.config).items() if key not in _MAY_DIFFER}
    model = {name: value for name, value in run.hf_config.to_dict().items() if name != "_name_or_path"}
    found = {
        **values,
        **{f"the {split} data (a digest)": run.data.digest(split, weights=True) for split in run.data.splits},
        "the model's config.json (a digest)": _digest(model),
        "the accelerator": run.accelerator,
        **(others or {}),
        **common_versions(),
    }
    return {name: str(value) for name, value in found.items()}


def common_versions() -> dict[str, str]:
    """Return the part of `common_facts` that is known without a run."""
    return {f"the version of {package}": number for package, number in _versions().items()}


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _versions() -> dict[str, str]:
    """Return the versions of the packages that matter, of those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
