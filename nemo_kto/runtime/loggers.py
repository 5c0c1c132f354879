"""Which run of Weights & Biases or MLflow training writes to, and the logger of the latter.

NeMo's exp_manager makes the loggers of TensorBoard and Weights & Biases. Its one for MLflow cannot be made at all
(nemo_toolkit 3.0.0 passes `run_name` twice), so it is made here.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from tensorboard.summary.writer import event_file_writer

from nemo_kto.errors import ConfigError
from nemo_kto.runtime.disk import free_bytes, reason_of

logger = logging.getLogger(__name__)

_WRITING = ("log_metrics", "log_hyperparams", "save", "after_save_checkpoint", "finalize")
"""What writes, of Lightning's loggers."""

_ENOUGH = 1 << 20
"""Bytes that have to be free before a logger that could not write is asked again."""

_FILED = ("nemo_logger", "megatron", "lightning")
"""First parts of the names of the loggers whose lines exp_manager has written to files."""

_FILE = "logger_runs.json"


def outlive_failures(loggers: Iterable[Logger], place: Path) -> None:
    """Let loggers that cannot write, as on a full disk, lose what they would have written, and not the run.

    Args:
        loggers: Lightning's.
        place: The run's log folder.
    """
    _end_writer_threads_quietly()
    for each in loggers:
        guard = _Guard(each, place)
        for name in _WRITING:
            setattr(each, name, partial(guard.call, getattr(each, name)))


class _Guard:
    """Calls what a logger writes with; says once, and when it is over, that it cannot."""

    def __init__(self, guarded: Logger, place: Path) -> None:
        self._guarded = guarded
        self._place = place
        self._failed = 0

    def call(self, method: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Return what the method returns; None if it cannot write."""
        name = type(self._guarded).__name__
        if self._failed and free_bytes(self._place) < _ENOUGH:
            return None
        try:
            result = method(*arguments, **keywords)
            self._check_there()
        except Exception as error:  # of whatever is behind a logger: no log is worth a run
            if not self._failed:
                reason = reason_of(error, self._place)
                logger.warning("%s cannot write: %s. Training goes on without its log until it can.", name, reason)
            self._failed += 1
            if isinstance(self._guarded, TensorBoardLogger):
                self._guarded._experiment = None  # its writer has ended: the next one begins a file of its own
            return None
        if self._failed and method.__name__ == "log_metrics":
            logger.warning("%s can write again; what it was given in between is lost.", name)
            self._failed = 0
        return result

    def _check_there(self) -> None:
        """Raise an OSError if TensorBoard writes to a file that has been removed, which it would not notice."""
        writer = getattr(getattr(self._guarded, "_experiment", None), "file_writer", None)
        if writer is not None and not os.path.exists(writer.event_writer._file_name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _end_writer_threads_quietly() -> None:
    """Let TensorBoard's writer tell its owner why it has ended, without a traceback of its own; idempotent."""
    thread = event_file_writer._AsyncWriterThread
    if hasattr(thread.run, "ends_quietly"):
        return
    run = thread.run

    def run_quietly(self: Any) -> None:
        with suppress(OSError):  # which is kept, and raised where something is written next
            run(self)

    run_quietly.ends_quietly = True  # type: ignore[attr-defined]
    thread.run = run_quietly


def outlive_log_files() -> None:
    """Let the files that NeMo's exp_manager has other packages' lines written to be cut off by a full disk, unsaid."""
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in _FILED]
    for handler in (handler for name in names for handler in logging.getLogger(name).handlers):
        if isinstance(handler, logging.FileHandler):
            handler.handleError = lambda record: None  # type: ignore[method-assign]


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
