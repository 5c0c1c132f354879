"""Evaluation of checkpoints on real ranks against transformers and scikit-learn, and the command as users run it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_kto.commands.evaluate import _print_table, describe
from nemo_kto.data.batches.datamodule import DataSettings, KTODataModule
from nemo_kto.data.batches.packed_rows import KTOBatch
from nemo_kto.data.reading.sources import Source
from tests.distributed_harness import free_port
from tests.integration.assets import (
    make_model_folder,
    make_tokenizer,
    read_series,
    settings,
    train_on_rank,
    write_feedback,
)
from tests.integration.oracle import BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT, Pair
from tests.integration.test_objectives import bco
from tests.waiting import HANG

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "nlp" / "kto" / "eval_gpt_kto.py"
QUICKSTART = REPOSITORY / "examples" / "nlp" / "kto" / "quickstart"
BATCH_SIZE = 6
"""16 samples make batches of 5, 5 and 6, each filled up to 6 places."""
FILES = {"liked.jsonl": 11, "short.jsonl": 5}
SHORT = {"trainer__kto__max_steps": 4, "model__global_batch_size": BATCH_SIZE, "model__micro_batch_size": 3}
KEPT = {
    "exp_manager__create_checkpoint_callback": True,
    "export__enabled": True,
    "trainer__kto__val_check_interval": 2,
}
LORA = {
    "model__peft__peft_scheme": "lora",
    "model__peft__lora_tuning__target_modules": ["attention_qkv", "mlp_fc2"],
    "model__peft__lora_tuning__adapter_dim": 4,
    "model__optim__lr": 1e-2,
}
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"model__tensor_model_parallel_size": 2}),
    "pp2": (2, {"model__pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
}

Outcome = tuple[str, str, str]
"""What an evaluation printed, and the kind and message of the error it ended with."""


def evaluate_on_rank(port: int, all_overrides: list[dict[str, Any]]) -> list[Outcome]:
    """Run the evaluation command's inside on one rank of a pool's processes, once for each of the overrides."""
    import torch.distributed as dist
    from omegaconf import OmegaConf

    from nemo_kto.commands.evaluate import evaluate
    from nemo_kto.config.compose import parse_config
    from nemo_kto.errors import KTOError
    from nemo_kto.quiet import silence_loaded_packages

    silence_loaded_packages()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    found = []
    for overrides in all_overrides:
        raw = OmegaConf.create({})
        for key, value in {**overrides, "trainer.devices": world_size}.items():
            OmegaConf.update(raw, key, value)
        kind = message = ""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                evaluate(parse_config(raw))
            except KTOError as error:
                kind, message = type(error).__name__, str(error)
        found.append((printed.getvalue(), kind, message))
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    make_model_folder(folder / "hf")
    write_feedback(folder / "train.jsonl", number=40, seed=5)
    for seed, (name, number) in enumerate(FILES.items()):
        write_feedback(folder / name, number=number, seed=seed, labels=[True, False, False, True, True])
    return folder


def held_out(root: Path) -> dict[str, Any]:
    weights = {"desirable_loss_weight": DESIRABLE_WEIGHT, "undesirable_loss_weight": UNDESIRABLE_WEIGHT}
    return {
        **SHORT,
        **{f"model__kto__{name}": weight for name, weight in weights.items()},
        "model__data__data_prefix__validation": [str(root / name) for name in FILES],
    }


@pytest.fixture(scope="module")
def trained(
    root: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]
) -> Callable[..., Path]:
    """Return `trained(**changes)`: four steps with checkpoints and export; the log folder."""

    def run(**changes: Any) -> Path:
        log_dir = tmp_path_factory.mktemp("log")
        values = settings(root, log_dir, **{**held_out(root), **KEPT, **changes})
        run_ranks(train_on_rank, 1, free_port(), values)
        return log_dir

    return run


@pytest.fixture(scope="module")
def log_dir(trained: Callable[..., Path]) -> Path:
    """Return the log folder of the run that most tests evaluate."""
    return trained()


@pytest.fixture
def scores(
    root: Path, log_dir: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Return `scores(world_size, log_dir, **changes)`: the results of an evaluation, and what it printed."""

    def run(world_size: int = 1, folder: Path = log_dir, **changes: Any) -> tuple[dict[str, Any], str]:
        output = tmp_path / "results" / "found.json"
        values = settings(root, folder, **{**held_out(root), "evaluation__output": str(output), **changes})
        found = run_ranks(evaluate_on_rank, world_size, free_port(), [values])
        assert [outcome[0][1:] for outcome in found] == [("", "")] * world_size
        assert [bool(outcome[0][0]) for outcome in found] == [True] + [False] * (world_size - 1)  # rank 0 speaks
        return json.loads(output.read_text()), found[0][0][0]

    return run


@pytest.fixture
def refusals(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> Callable[..., list[tuple[str, str]]]:
    """Return `refusals(*changes)`: the kind and message of the error that each evaluation is refused with."""

    def run(*changes: dict[str, Any], folder: Path = tmp_path / "nothing") -> list[tuple[str, str]]:
        values = [settings(root, folder, **{**held_out(root), **change}) for change in changes]
        (found,) = run_ranks(evaluate_on_rank, 1, free_port(), values)
        return [(kind, message) for _, kind, message in found]

    return run


# what transformers says


def validation_batches(root: Path) -> list[KTOBatch]:
    """Return the batches of the held-out data; what is in them is tested in tests/data."""
    data = KTODataModule(
        DataSettings(
            train=[],
            validation=[Source(str(root / name)) for name in FILES],
            max_length=64,
            cache_dir=root / "tokens",
            global_batch_size=BATCH_SIZE,
            seed=1234,
        ),
        make_tokenizer(),
    )
    data.prepare()
    data.set_position(dp_rank=0, dp_size=1, num_steps=1, steps_per_epoch=1, start_step=int)
    return list(data.val_dataloader())


@dataclass(frozen=True)
class Oracle:
    """Everything about every held-out sample: `[16]` each, in the order of the files."""

    losses: torch.Tensor
    ratios: torch.Tensor
    baselines: torch.Tensor
    good: torch.Tensor

    @property
    def parts(self) -> dict[str, slice]:
        """The samples of each file, and of all."""
        first, second = FILES.values()
        return dict(zip(FILES, (slice(first), slice(first, first + second)), strict=True)) | {"all": slice(None)}


@torch.no_grad()
def oracle(root: Path, pair: Pair) -> Oracle:
    columns, good = [], []
    for batch in validation_batches(root):
        number = int((batch.weights > 0).sum())  # the places that are filled up come last
        columns.append(pair.losses(batch, number))
        good.append(batch.desirable[:number])
    losses, ratios, baselines = (torch.cat(column) for column in zip(*columns, strict=True))
    return Oracle(losses, ratios, baselines, torch.cat(good))


@pytest.fixture(scope="module")
def expected(root: Path, log_dir: Path) -> Oracle:
    """Return what transformers makes of the exported model beside the one it was trained from."""
    return oracle(root, Pair(log_dir / "hf", reference=root / "hf", average=False, kl_group=BATCH_SIZE))


def assert_equals_oracle(results: dict[str, Any], expected: Oracle) -> None:
    rows = {Path(row["file"]).name: row for row in results["files"]} | {"all": results["overall"]}
    assert list(rows) == [*FILES, "all"]
    for name, part in expected.parts.items():
        row, good, rewards = rows[name], expected.good[part], BETA * expected.ratios[part]
        assert (row["samples"], row["desirable"]) == (len(good), int(good.sum()))
        chosen, rejected = rewards[good].mean(), rewards[~good].mean()
        means = {
            "loss": expected.losses[part].mean(),
            "kl": expected.baselines[part].mean(),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": torch.where(good, rewards > 0, rewards < 0).double().mean(),
        }
        for key, value in means.items():
            # kl and rewards are differences of log-probs of about -30: rounding leaves them an absolute error
            tolerance = 2e-5 if key == "kl" or "rewards" in key else 0.0
            assert row[key] == pytest.approx(value.item(), rel=1e-4, abs=tolerance), (name, key)
        assert row["roc_auc"] == pytest.approx(roc_auc_score(good.numpy(), rewards.numpy()), abs=1e-6), name


# the newest checkpoint of a run


def test_the_data_tells_something(expected: Oracle) -> None:
    """Otherwise what follows compared zeros: both labels in each file, a baseline, and a ranking with mistakes."""
    for name, part in expected.parts.items():
        good, rewards = expected.good[part], expected.ratios[part]
        assert 0 < good.sum() < len(good)
        assert len(rewards.unique()) == len(rewards) and rewards.abs().min() > 1e-4, name
    assert expected.baselines.max() > 0.01
    assert 0.1 < roc_auc_score(expected.good.numpy(), expected.ratios.numpy()) < 0.9


@pytest.mark.parametrize(
    "layout", ["one", "dp2", "pp2", pytest.param("tp2", marks=pytest.mark.slow)], ids=lambda name: name
)
def test_the_newest_checkpoint_equals_the_oracle(
    root: Path, log_dir: Path, expected: Oracle, scores: Callable[..., Any], layout: str
) -> None:
    world_size, changes = LAYOUTS[layout]
    results, printed = scores(world_size, **changes)
    assert_equals_oracle(results, expected)
    (checkpoint,) = (log_dir / "checkpoints").glob("*-last")
    assert (results["checkpoint"], results["step"]) == (str(checkpoint), 4)
    assert [row["file"] for row in results["files"]] == [str(root / name) for name in FILES]
    table = [line.split() for line in printed.splitlines()]
    for name, row in [*zip(FILES, results["files"], strict=True), ("all", results["overall"])]:
        (cells,) = [cells for cells in table if cells[:1] == [name]]
        assert cells[1:4] == [str(row["samples"]), str(row["desirable"]), f"{row['loss']:.4f}"]
        assert cells[8:] == [f"{row[key]:.4f}" for key in ("rewards/accuracies", "roc_auc")]


def test_it_says_what_the_last_validation_of_training_said(log_dir: Path, scores: Callable[..., Any]) -> None:
    results, _ = scores()
    logged = {name: values[3] for name, values in read_series(log_dir).items() if name.startswith("val/")}
    for name in ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert results["overall"][name] == pytest.approx(logged[f"val/{name}"], rel=1e-6), name


def test_an_older_checkpoint(root: Path, log_dir: Path, run_ranks: Callable[..., Any]) -> None:
    """Its results are in the log folder, as no other file is named, and are what that validation of training said."""
    (checkpoint,) = (log_dir / "checkpoints").glob("*step=2-val_loss=*")
    values = settings(root, log_dir, **held_out(root), evaluation__checkpoint=str(checkpoint))
    (((_, kind, message),),) = run_ranks(evaluate_on_rank, 1, free_port(), [values])
    assert (kind, message) == ("", "")
    results = json.loads((log_dir / "evaluation.json").read_text())
    assert (results["checkpoint"], results["step"]) == (str(checkpoint), 2)
    logged = read_series(log_dir)["val/loss"]
    assert results["overall"]["loss"] == pytest.approx(logged[1], rel=1e-6)
    assert logged[1] != pytest.approx(logged[3], rel=1e-4)


def test_part_of_the_data(scores: Callable[..., Any], expected: Oracle) -> None:
    """One batch: five samples of the first file, and none of the other, which has no row."""
    results, printed = scores(trainer__kto__limit_val_batches=1)
    (row,) = results["files"]
    assert Path(row["file"]).name == "liked.jsonl" and row["samples"] == results["overall"]["samples"] == 5
    assert row["loss"] == results["overall"]["loss"] == pytest.approx(expected.losses[:5].mean().item(), rel=1e-4)
    assert "short.jsonl" not in printed


def test_files_of_one_class(tmp_path: Path, scores: Callable[..., Any]) -> None:
    """What a file has no samples for is not in its row, and a dash in the table."""
    files = [
        write_feedback(tmp_path / f"{name}.jsonl", number=5, seed=seed, labels=[label])
        for seed, (name, label) in enumerate((("up", True), ("down", False)))
    ]
    both, printed = scores(model__data__data_prefix__validation=[str(file) for file in files])
    alone, _ = scores(model__data__data_prefix__validation=str(files[0]))
    up, down = both["files"]
    absent = {f"{name}/{kind}" for name in ("loss", "rewards", "logps") for kind in ("chosen", "rejected")}
    for row, kind in ((up, "chosen"), (down, "rejected"), (alone["overall"], "chosen")):
        assert absent & row.keys() == {f"{name}/{kind}" for name in ("loss", "rewards", "logps")}
        assert "rewards/margins" not in row and row["roc_auc"] is None and "rewards/accuracies" in row
    assert absent | {"rewards/margins"} <= both["overall"].keys()
    for row, kind in ((up, "chosen"), (down, "rejected")):  # of either class all samples are in one file
        assert both["overall"][f"rewards/{kind}"] == row[f"rewards/{kind}"] != 0
    (cells,) = [line.split() for line in printed.splitlines() if line.split()[:1] == ["up.jsonl"]]
    assert cells[1:3] == ["5", "5"] and cells[6:8] + cells[9:] == ["-", "-", "-"]


def test_without_training_data(scores: Callable[..., Any], expected: Oracle) -> None:
    results, _ = scores(model__data__data_prefix__train=None)
    assert_equals_oracle(results, expected)


def test_a_cached_reference_becomes_a_live_one(
    log_dir: Path, scores: Callable[..., Any], expected: Oracle, tmp_path: Path
) -> None:
    results, _ = scores(
        model__kto__reference__mode="cached", model__kto__reference__cache_dir=str(tmp_path / "reference")
    )
    assert_equals_oracle(results, expected)
    assert not (log_dir / "reference").exists() and not (tmp_path / "reference").exists()


def test_automatic_weights_count_the_training_data(
    tmp_path: Path, scores: Callable[..., Any], expected: Oracle
) -> None:
    """30 thumbs up and 10 down: thumbs down weigh 2.25, which leaves the paper's ratio of 4/3."""
    file = write_feedback(tmp_path / "train.jsonl", number=40, seed=1, labels=[True, True, True, False])
    auto = {f"model__kto__{name}_loss_weight": "auto" for name in ("desirable", "undesirable")}
    results, _ = scores(model__data__data_prefix__train=str(file), **auto)
    plain = expected.losses / torch.where(expected.good, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT)
    weighted = plain * torch.where(expected.good, 1.0, 2.25)
    assert results["overall"]["loss"] == pytest.approx(weighted.mean().item(), rel=1e-4)


# without a checkpoint


def test_a_model_against_its_base(
    root: Path, log_dir: Path, tmp_path: Path, scores: Callable[..., Any], expected: Oracle
) -> None:
    """As the exported folder of a run can be evaluated when the run is gone."""
    results, printed = scores(
        1,
        tmp_path / "none",
        pretrained_checkpoint__restore_from_path=str(log_dir / "hf"),
        model__kto__reference__checkpoint=str(root / "hf"),
    )
    assert_equals_oracle(results, expected)
    assert results["checkpoint"] is results["step"] is None
    assert f"{log_dir / 'hf'} (no checkpoint)" in printed


def test_what_cannot_be_evaluated(log_dir: Path, tmp_path: Path, refusals: Callable[..., Any]) -> None:
    (tmp_path / "empty").mkdir()
    no_data = {"model__data__data_prefix__validation": None}
    no_training = {"model__data__data_prefix__train": None, "model__kto__desirable_loss_weight": "auto"}
    named = "evaluation__checkpoint"
    cases: list[tuple[dict[str, Any], str, list[str]]] = [
        ({}, "ConfigError", ["nothing to evaluate", str(tmp_path / "nothing"), "evaluation.checkpoint"]),
        ({named: str(tmp_path / "empty")}, "CheckpointError", [str(tmp_path / "empty"), "finished checkpoint"]),
        ({named: str(tmp_path / "missing")}, "CheckpointError", [str(tmp_path / "missing"), "finished checkpoint"]),
        ({named: str(log_dir / "hf")}, "CheckpointError", [str(log_dir / "hf"), "finished checkpoint"]),
    ]
    for (kind, message), (_, wanted, parts) in zip(refusals(*(case[0] for case in cases)), cases, strict=True):
        assert kind == wanted and "\n" not in message and all(part in message for part in parts), (kind, message)
    ((without, automatic),) = [refusals(no_data, no_training, folder=log_dir)]
    assert without[0] == "ConfigError" and "model.data.data_prefix.validation" in without[1]
    assert automatic[0] == "ConfigError" and "auto" in automatic[1] and "data_prefix.train" in automatic[1]


def test_another_model_or_reference_is_refused(log_dir: Path, tmp_path: Path, refusals: Callable[..., Any]) -> None:
    """Rewards against another reference would be numbers of nothing."""
    other = str(make_model_folder(tmp_path / "other", seed=9))
    cases = {
        "pretrained_checkpoint.restore_from_path;": {"pretrained_checkpoint__restore_from_path": other},
        "model.kto.reference.checkpoint;": {"model__kto__reference__checkpoint": other},
        "sync_every_n_steps (None, now 2);": {"model__kto__reference__sync_every_n_steps": 2},
    }
    found = refusals(*cases.values(), folder=log_dir)
    for (kind, message), part in zip(found, cases, strict=True):
        assert kind == "ConfigError" and part in message and "rewards would be wrong" in message, message


def test_results_that_cannot_be_written(
    root: Path, log_dir: Path, tmp_path: Path, refusals: Callable[..., Any]
) -> None:
    (tmp_path / "file").write_text("")
    ((kind, message),) = refusals({"evaluation__output": str(tmp_path / "file" / "found.json")}, folder=log_dir)
    assert kind == "ConfigError" and "evaluation.output" in message and str(tmp_path / "file") in message


# other runs


def test_adapters(root: Path, tmp_path: Path, trained: Callable[..., Path], scores: Callable[..., Any]) -> None:
    """The checkpoint of a run, and its exported adapter, which needs no checkpoint."""
    log_dir = trained(**LORA)
    expected = oracle(root, Pair(root / "hf", adapter=log_dir / "hf", average=False, kl_group=BATCH_SIZE))
    assert expected.ratios.abs().min() > 1e-4
    results, _ = scores(1, log_dir, **LORA)
    assert_equals_oracle(results, expected)
    start = {"model__peft__lora_tuning__restore_from_path": str(log_dir / "hf")}
    results, _ = scores(1, tmp_path / "none", **LORA, **start)
    assert_equals_oracle(results, expected)
    assert results["checkpoint"] is None


def test_the_reward_shift_of_bco_is_the_checkpoints(
    root: Path, trained: Callable[..., Path], scores: Callable[..., Any]
) -> None:
    log_dir = trained(model__kto__loss="bco")
    results, _ = scores(1, log_dir, model__kto__loss="bco")
    overall = results["overall"]
    logged = read_series(log_dir)
    # of training it is logged before a step, of a validation after it
    last = logged["val/delta"][3]
    assert overall["delta"] == pytest.approx(last, rel=1e-6)
    assert abs(last) > 1e-3 and last != pytest.approx(logged["train/delta"][3], rel=1e-3)
    pair = Pair(log_dir / "hf", reference=root / "hf", average=False, kl_group=BATCH_SIZE)
    with torch.no_grad():
        losses = [
            bco(ratio, last / BETA, good)
            for batch in validation_batches(root)
            for ratio, good, weight in zip(
                pair.ratios(batch.samples), batch.desirable.tolist(), batch.weights.tolist(), strict=True
            )
            if weight
        ]
    assert len(losses) == overall["samples"] == 16 and "kl" not in overall
    assert overall["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


# the table


def test_the_table_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither long names nor large numbers; names that are equal get their folders; brackets are no markup."""
    names = ("samples", "desirable", "loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins")
    row = dict(zip(names, (12345, 6789, 0.5, 10.25, -10.0026, -100.004, 90.0014), strict=True))
    row |= {"rewards/accuracies": 0.75, "roc_auc": 0.875}
    files = ["/a/[red]held_out.jsonl", "/b/[red]held_out.jsonl"]
    _print_table({"files": [{"file": file, **row} for file in files], "overall": row})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    numbers = "12345 6789 0.5000 10.2500 -10.0026 -100.0040 90.0014 0.7500 0.8750".split()
    assert sum(line.split()[-9:] == numbers for line in lines) == 3
    first_column = "".join(line.split()[0] for line in lines if line.strip() and "─" not in line)
    assert all(file in first_column for file in files)


# the area under the ROC curve


@pytest.mark.parametrize(
    "rewards",
    [
        [0.3, -0.2, 0.1, 0.4, -0.5, 0.2],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.5, 0.5, -0.5, 0.5, -0.5, -0.5],
        [1e4, 1e4 + 1, 1e4 + 2, 1e4 + 3, -1e4, -1e4 - 1],
        [1e4, -1e4, 2e4, 3e4, -2e4, 2.5e4],
        [-1e-30, 1e-30, 2e-30, 0.0, 3e-30, -2e-30],
    ],
    ids=["distinct", "equal", "ties", "huge neighbours", "huge", "tiny"],
)
def test_roc_auc_equals_scikit_learns(rewards: list[float]) -> None:
    labels = [True, False, True, True, False, False]
    found = describe({"loss": 0.5}, torch.tensor(rewards, dtype=torch.float64), torch.tensor(labels))
    assert found["roc_auc"] == pytest.approx(roc_auc_score(labels, rewards), abs=1e-6)
    assert (found["samples"], found["desirable"], found["loss"]) == (6, 3, 0.5)


def test_roc_auc_of_many_samples_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.randn(100_000, generator=generator, dtype=torch.float64) * 300).round() / 300
    labels = torch.rand(100_000, generator=generator, dtype=torch.float64) < rewards.sigmoid()
    found = describe({}, rewards, labels)["roc_auc"]
    assert found == pytest.approx(roc_auc_score(labels.numpy(), rewards.numpy()), abs=1e-6)


@pytest.mark.parametrize("label", [True, False])
def test_roc_auc_needs_both_labels(label: bool) -> None:
    assert describe({}, torch.tensor([0.1, 0.2]), torch.tensor([label, label]))["roc_auc"] is None


# the command


def run_command(*overrides: str) -> subprocess.CompletedProcess[str]:
    ours = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *overrides],
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
    )


def other_model(folder: Path) -> Path:
    """Save the quickstart's model with other weights."""
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "model")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(QUICKSTART / "model").save_pretrained(folder)
    return folder


def test_the_command(tmp_path: Path) -> None:
    """The quickstart's model against another one, on its data."""
    arguments = [
        f"pretrained_checkpoint.restore_from_path={QUICKSTART / 'model'}",
        f"model.kto.reference.checkpoint={other_model(tmp_path / 'other')}",
        f"model.data.data_prefix.validation={QUICKSTART / 'data' / 'validation.jsonl'}",
        f"exp_manager.explicit_log_dir={tmp_path / 'log'}",
        "trainer.accelerator=cpu",
        "trainer.kto.limit_val_batches=2",
        "model.global_batch_size=8",
        "model.micro_batch_size=8",
    ]
    done = run_command(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    results = json.loads((tmp_path / "log" / "evaluation.json").read_text())
    assert results["overall"]["samples"] == 16 and results["overall"]["kl"] >= 0
    assert f"Results: {tmp_path / 'log' / 'evaluation.json'}" in done.stdout and "ROC-AUC" in done.stdout
    refused = run_command(*arguments, f"evaluation.checkpoint={tmp_path}")
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ") and str(tmp_path) in line
