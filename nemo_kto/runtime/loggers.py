"""Which run of Weights & Biases or MLflow training writes to, and the logger of the latter.

NeMo's exp_manager makes the loggers of TensorBoard and Weights & Biases. Its one for MLflow cannot be made at all
(nemo_toolkit 3.0.0 passes `run_name` twice), so it is made here.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger

from nemo_kto.errors import ConfigError

_FILE = "logger_runs.json"


def read_runs(log_dir: Path) -> dict[str, str]:
    """Return logger (`wandb`, `mlflow`) -> id of its run that the run in `log_dir` has written to so far."""
    file = log_dir / _FILE
    found: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def write_runs(log_dir: Path, runs: Mapping[str, str]) -> None:
    """Keep what `read_runs` returns; exp_manager puts a folder's files aside, so write it after that."""
    (log_dir / _FILE).write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")


def new_wandb_run() -> str:
    """Return an id for a new run of Weights & Biases."""
    return secrets.token_hex(4)


class KTOMLFlowLogger(MLFlowLogger):
    """Lightning's logger for MLflow, with metric names that MLflow's folders of files can hold.

    There a metric is a file, so that `train/loss` and `train/loss/chosen` cannot both exist: the second becomes
    `train/loss_chosen`, wherever MLflow writes.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics, by name, of a step counted from 0."""
        super().log_metrics({name.replace("/loss/", "/loss_"): value for name, value in metrics.items()}, step)


def open_mlflow(given: Mapping[str, Any], *, name: str, log_dir: Path, run_id: str | None) -> MLFlowLogger:
    """Return a logger whose MLflow run is open; for the process that speaks for the run only.

    Args:
        given: What Lightning's `MLFlowLogger` takes.
        name: Name of the experiment, unless `given` has one.
        log_dir: The run's folder. MLflow writes to `mlruns` in it, unless `given` or the environment variable
            MLFLOW_TRACKING_URI says where.
        run_id: The MLflow run to go on with, unless `given` has one; a new one where it does not exist.

    Raises:
        ConfigError: The logger or its run cannot be made.
    """
    from mlflow.exceptions import MlflowException

    kwargs = {key: value for key, value in given.items() if value is not None}
    place = Path(kwargs.pop("save_dir", None) or log_dir / "mlruns").absolute()
    kwargs.setdefault("tracking_uri", os.environ.get("MLFLOW_TRACKING_URI") or place.as_uri())
    kwargs.setdefault("experiment_name", name)
    kwargs.setdefault("run_name", log_dir.name)
    if kwargs["tracking_uri"].startswith("file:"):
        # MLflow 3 still writes files, and refuses to unless it is told that they are meant
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    asked = kwargs.pop("run_id", None)
    try:
        if asked is None and run_id is not None and not _exists(run_id, kwargs["tracking_uri"]):
            run_id = None
        logger = KTOMLFlowLogger(**kwargs, run_id=asked or run_id)
        logger.experiment.update_run(logger.run_id, status="RUNNING")  # a resumed one is FINISHED or FAILED
    except (TypeError, MlflowException) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"exp_manager.mlflow_logger_kwargs: MLflow cannot be logged to: {reason}") from error
    return logger


def _exists(run_id: str, tracking_uri: str) -> bool:
    """Return whether MLflow knows a run there."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(tracking_uri).get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True
