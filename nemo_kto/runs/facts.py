"""What a run is, as JSON: configuration, data, and the versions it runs with. For its report and its model card."""

from __future__ import annotations

import dataclasses
import json
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemo_kto.config.folders import FACTS_FILE
from nemo_kto.data.batches.statistics import summarize
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
        `chat_template`, `config` as nested mappings, `versions` of packages, and `data`: split -> see `summarize`.
    """
    return {
        "name": run.config.exp_manager.name,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "layout": str(run.layout),
        "accelerator": run.accelerator,
        "chat_template": run.tokenizer.chat_template is not None,
        "config": dataclasses.asdict(run.config),
        "versions": _versions(),
        "data": {split: summarize(samples, *run.data.files_of(split)) for split, samples in run.data.splits.items()},
    }


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write the facts into a folder."""
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    """Return the versions of the packages that matter, of those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
