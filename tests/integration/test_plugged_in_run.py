"""A run with a callback, a reader and a loss of a package that lies in the current folder, on two processes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kto.config.schema import DataConfig
from nemo_kto.data.reading.chunks import parse_chunk, read_chunks
from nemo_kto.data.reading.parts import check_there, content_digest
from nemo_kto.data.reading.records import FeedbackRecord
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import parse_source
from nemo_kto.errors import ConfigError, DataError
from nemo_kto.runs.records import sources
from tests.distributed_harness import free_port
from tests.integration.assets import read_series, refusal_on_rank, settings, write_feedback
from tests.waiting import HANG

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "nlp" / "kto" / "train_gpt_kto.py"

PACKAGE = """
import json
from pathlib import Path

from lightning.pytorch import Callback

from nemo_kto.algorithms.losses import kto_loss


class NoteSteps(Callback):
    def __init__(self, file):
        self.file = Path(file)

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            exported = Path(pl_module.config.exp_manager.explicit_log_dir, "hf", "config.json")
            self.file.with_name("exported.txt").write_text(str(exported.is_file()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_global_zero:
            with self.file.open("a") as lines:
                lines.write(json.dumps([trainer.global_step, pl_module.last_metrics["train/loss"]]) + "\\n")


def read(path):
    for line in open(path):
        prompt, response, stars = line.rstrip("\\n").split("|")
        yield {"prompt": prompt, "response": response, "label": int(stars) > 3}


def threefold(log_ratios, desirable, baseline, **settings):
    losses, rewards = kto_loss(log_ratios, desirable, baseline, **settings)
    return 3 * losses, rewards


def averaged(log_ratios, desirable, baseline, **settings):
    losses, rewards = kto_loss(log_ratios, desirable, baseline, **settings)
    return losses.mean(), rewards


def lonely(log_ratios, desirable, baseline, **settings):
    return kto_loss(log_ratios, desirable, baseline, **settings).losses
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package, and the same feedback in its own form and as JSON Lines."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "plugged_in").mkdir()
    (folder / "plugged_in" / "__init__.py").write_text(PACKAGE)
    records = write_feedback(folder / "train.jsonl", number=24, seed=1)
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    lines = (f"{row['prompt']}|{row['completion']}|{5 if row['label'] else 1}\n" for row in rows)
    (folder / "train.stars").write_text("".join(lines))
    return folder


def test_a_run_with_plug_ins(here: Path, root: Path, train: Callable[..., Path]) -> None:
    """The loss is three times the built-in one, of the same samples in the same order; the callback sees each step."""
    steps = {"trainer__kto__max_steps": 2, "model__data__data_prefix__train": str(here / "train.jsonl")}
    plain = read_series(train(1, **steps))
    values = settings(root, here / "run", **steps, trainer__devices=2, model__tensor_model_parallel_size=2)
    values |= {"model.data.data_prefix.train": "train.stars", "model.data.reader": "plugged_in.read"}
    values |= {"model.kto.loss": "plugged_in.threefold", "export.enabled": True}
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    overrides.append("trainer.callbacks=[{_target_: plugged_in.NoteSteps, file: steps.txt}]")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *overrides]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    series = read_series(here / "run")
    losses = list(series["train/loss"].values())
    assert losses[0] == pytest.approx(1.5, abs=1e-6) and len(losses) == 2
    assert losses == pytest.approx([3 * loss for loss in plain["train/loss"].values()], rel=1e-4)
    for name in ("train/logps/chosen", "train/logps/rejected"):
        assert series[name] == pytest.approx(plain[name], rel=1e-4), name
    noted = [json.loads(line) for line in (here / "steps.txt").read_text().splitlines()]
    assert noted == [[step, pytest.approx(loss)] for step, loss in enumerate(losses, 1)]
    assert (here / "exported.txt").read_text() == "True"  # by then


def plugged_in_refusal(here: str, port: int, overrides: dict[str, Any]) -> tuple[str, str]:
    sys.path.append(here)
    return refusal_on_rank(port, overrides)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__kto__loss": "plugged_in.averaged"}, "returned shapes [[], "),
        ({"model__kto__loss": "plugged_in.lonely"}, "It has to return (losses, rewards)"),
        ({"trainer__callbacks": [{"_target_": "plugged_in.NoteSteps"}]}, "trainer.callbacks[0] cannot be made"),
        ({"trainer__callbacks": [{"_target_": "plugged_in.Path"}]}, "no Callback of lightning.pytorch"),
        ({"trainer__callbacks": [{"_target_": "plugged_in.NoteStep"}]}, "Did you mean plugged_in.NoteSteps?"),
    ],
)
def test_plug_ins_that_do_not_fit(
    here: Path, root: Path, tmp_path: Path, run_ranks: Callable[..., Any], changes: dict[str, Any], said: str
) -> None:
    kind, message = run_ranks(plugged_in_refusal, 1, str(here), free_port(), settings(root, tmp_path, **changes))[0]
    assert kind == "ConfigError" and said in message


def rows_of_anything(path: str) -> Any:
    yield {
        "prompt": "a",
        "response": "b",
        "label": np.bool_(True),
        "weight": np.float32(0.5),
        "more": (1, {"x": None}),
    }
    yield FeedbackRecord("c", "d", False, "elsewhere.txt", 7, weight=2.0)
    yield ["no", "record"]
    yield {"prompt": "e", "response": "f", "label": True, "seen": {1, 2}}


class ReadNothing:
    def __call__(self, path: str) -> Any:
        raise OSError("the archive is closed")


def test_what_a_reader_may_return() -> None:
    source = parse_source("some://where", RowReader(), rows_of_anything)
    found = [record for chunk in read_chunks(source, 10) for record in parse_chunk(chunk)]
    assert found[0] == FeedbackRecord("a", "b", True, "some://where", 1, weight=0.5)
    assert found[1] == FeedbackRecord("c", "d", False, "elsewhere.txt", 7, weight=2.0)
    assert str(found[2]).startswith("some://where:3: is a list")
    assert str(found[3]) == "some://where:4: field 'seen' holds a set, which no row of a file can."
    assert content_digest(source) == content_digest(source)
    rows = list(rows_of_anything("x"))
    for others in (rows[:3], [{**rows[0], "label": False}, *rows[1:]]):
        assert content_digest(parse_source("some://where", RowReader(), lambda _, o=others: o)) != content_digest(
            source
        )


@pytest.mark.parametrize("function", [ReadNothing(), functools.partial(ReadNothing())], ids=["instance", "partial"])
def test_a_reader_that_fails(function: Any) -> None:
    source = parse_source("some://where", RowReader(), function)
    with pytest.raises(DataError, match="the reader .*ReadNothing.* failed .OSError: the archive is closed"):
        list(read_chunks(source, 10))


def test_a_reader_of_one_entry() -> None:
    name = f"{__name__}.rows_of_anything"
    plain, own = sources(DataConfig(), ["train.jsonl", {"path": "x", "reader": name, "weight": 2.0}])
    assert plain.function is None and own.function is not None
    assert (own.path, own.weight, own.function.__name__) == ("x", 2.0, "rows_of_anything")
    with pytest.raises(ConfigError, match="reader=3 is no dotted path"):
        sources(DataConfig(), [{"path": "x", "reader": 3}])
    (named,) = sources(DataConfig(reader=name), [{"path": "x", "split": "train"}])
    for look in (check_there, content_digest):
        with pytest.raises(ConfigError, match="split=train is for data sets; what a reader reads has none"):
            look(named)
    with pytest.raises(ConfigError, match="--reader=nowhere.f"):
        sources(DataConfig(reader="nowhere.f"), ["x"], reader_key="--reader")
