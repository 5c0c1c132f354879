"""Numbers that are not finite: found on all ranks in the same step, named, written down, and left out if wanted."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_kto.runtime.checkpoint_folders import newest_whole
from tests.distributed_harness import free_port
from tests.integration.assets import (
    assert_alike,
    make_model_folder,
    read_series,
    refusal_on_rank,
    settings,
    train_on_rank,
)

NAN = float("nan")
SKIP = {"trainer__kto__on_nan": "skip_step"}
SAVING = {"exp_manager__create_checkpoint_callback": True, "trainer__kto__save_interval": 1}
TP2 = {"model__tensor_model_parallel_size": 2}
PP2 = {"model__pipeline_model_parallel_size": 2}


class Breaks(Callback):
    """Makes numbers of one rank NaN in some steps, counted from 1.

    Args:
        what: `loss`, `gradient`, `gradient once`, or `parameter`: after the step.
        rank: The rank; -1 for the last.
        steps: The steps.
    """

    def __init__(self, what: str, rank: int, steps: tuple[int, ...]) -> None:
        self.what, self.rank, self.steps = what, rank % dist.get_world_size(), steps
        self.now, self.left = False, 1
        self.states: list[list[torch.Tensor]] = []
        self.records: dict[int, list[int]] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put hooks where they do nothing yet."""
        if dist.get_rank() != self.rank:
            return
        model = pl_module.models[-1]
        if self.what == "loss":
            model.register_forward_hook(self._break_output)
        elif self.what.startswith("gradient"):
            self._parameter(pl_module).register_hook(self._break_gradient)

    def _parameter(self, pl_module: Any) -> Any:
        return dict(pl_module.models[-1].named_parameters())["decoder.layers.0.self_attention.linear_proj.weight"]

    def _break_output(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * NAN if self.now and torch.is_grad_enabled() else output

    def _break_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        if not self.now or (self.what == "gradient once" and self.left == 0):
            return gradient
        self.left = 0
        broken = gradient.clone()
        broken.view(-1)[3] = NAN
        return broken

    def _state(self, trainer: Any, pl_module: Any) -> list[torch.Tensor]:
        trainer.strategy.complete_parameters()
        state = [parameter.detach().clone() for parameter in pl_module.parameters()]
        for group in trainer.strategy.optimizers[0].chained_optimizers:
            for values in group.optimizer.state.values():
                state += [value.clone() for value in values.values() if torch.is_tensor(value)]
        return state

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin, and remember how things are."""
        step = trainer.global_step + 1
        self.now = step in self.steps
        self.records[step] = batch.pairs[:, 0].tolist()
        if self.now:
            self.before = self._state(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Compare."""
        if self.now and self.what == "parameter" and dist.get_rank() == self.rank:
            with torch.no_grad():
                self._parameter(pl_module).view(-1)[3] = NAN
        elif self.now and self.what != "parameter":
            after = self._state(trainer, pl_module)
            assert len(after) == len(self.before)
            assert all(torch.equal(old, new) for old, new in zip(self.before, after, strict=True))
        self.now = False


def broken_run(port: int, overrides: dict[str, Any], *breaks: Any) -> tuple[str, dict[int, list[int]]]:
    """Train; return the error, and the records of each step on this rank."""
    from nemo_kto.errors import DivergenceError

    callback = Breaks(*breaks)
    try:
        train_on_rank(port, overrides, callbacks=[callback])
    except DivergenceError as error:
        return str(error), callback.records
    return "no error", callback.records


Run = Callable[..., list[Any]]


@pytest.fixture
def broken(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> Run:
    """Return `broken(world_size, what, rank, steps, **changes)`: what the ranks of a run with such numbers return."""

    def run(world_size: int, what: str, rank: int, steps: tuple[int, ...], **changes: Any) -> list[Any]:
        log_dir = changes.pop("log_dir", tmp_path / "log")
        values = settings(root, log_dir, **changes)
        return run_ranks(broken_run, world_size, free_port(), values, what, rank, steps)

    return run


def test_all_ranks_end_in_the_same_step_and_the_last_checkpoint_is_kept(
    broken: Run, root: Path, tmp_path: Path
) -> None:
    """And the records of that step are written down."""
    answers = broken(2, "loss", 1, (3,), **SAVING)
    for message, _ in answers:
        assert "The loss of step 3 is not finite. The policy's log-probs came first, on rank 1;" in message
        assert "The last checkpoint is kept." in message and str(tmp_path / "log" / "diverged.jsonl") in message
    last = newest_whole(tmp_path / "log" / "checkpoints")[0]
    assert last is not None and last.name.endswith("step=2-last")

    (line,) = (tmp_path / "log" / "diverged.jsonl").read_text(encoding="utf-8").splitlines()
    entry = json.loads(line)
    assert (entry["step"], entry["what"], entry["where"], entry["rank"]) == (3, "loss", "policy's log-probs", 1)
    mine, theirs = (records[3] for _, records in answers)
    assert sorted(record["sample"] for record in entry["records"]) == sorted(mine + theirs)
    for record in entry["records"]:
        source = json.loads((root / "train.jsonl").read_text().splitlines()[record["sample"]])
        assert record["file"] == str(root / "train.jsonl") and record["label"] == source["label"]
        assert record["prompt"] == source["prompt"]
        assert record["response"] == f"{source['completion'].strip()} <eos>"
        broke = record["sample"] in theirs
        assert (record["log_prob"] == "nan") == broke and (record["log_ratio"] == "nan") == broke
        assert broke or record["log_prob"] < 0


LAYER = "decoder.layers.{}.self_attention.linear_proj.weight"


@pytest.mark.parametrize(
    ("changes", "what", "said"),
    [
        (PP2, "loss", "The policy's log-probs came first, on rank 1;"),
        pytest.param({}, "gradient", f"That of {LAYER.format(0)} came first, on rank 1.", marks=pytest.mark.slow),
        (TP2, "gradient", f"That of {LAYER.format(0)} came first, on rank 1."),
        # of the second stage, whose first layer is the model's third
        (PP2, "gradient", f"That of {LAYER.format(2)} came first, on rank 1."),
        ({}, "gradient once", "The gradient of step 2 is not finite, but was when it was computed again"),
    ],
)
def test_where_it_began_is_said_under_every_layout(broken: Run, changes: dict[str, Any], what: str, said: str) -> None:
    for message, _ in broken(2, what, 0 if what == "loss" else 1, (2,), **changes):
        assert said in message


def test_a_parameter_that_is_not_finite_ends_the_run(broken: Run) -> None:
    """Also where steps may be left out: no later one could be finite."""
    for message, _ in broken(2, "parameter", 1, (1,), **SKIP, **TP2):
        assert f"The parameter {LAYER.format(0)}, on rank 1, is not finite before step 2" in message


def test_no_checkpoint_is_written_of_it(broken: Run, tmp_path: Path) -> None:
    """It would replace the last good one."""
    for message, _ in broken(2, "parameter", 1, (2,), **TP2, **SAVING):
        assert "rank 1, is not finite after step 2. Nothing is written of it" in message
    last = newest_whole(tmp_path / "log" / "checkpoints")[0]
    assert last is not None and last.name.endswith("step=1-last")


def test_nothing_is_exported_of_it(broken: Run, tmp_path: Path) -> None:
    for message, _ in broken(1, "parameter", 0, (2,), export__enabled=True, trainer__kto__max_steps=2):
        assert "is not finite after step 2" in message
    assert not (tmp_path / "log" / "hf").exists()


@pytest.fixture(scope="module")
def of_one_process(
    root: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]
) -> dict[str, Any]:
    """Return the series of a run of one process that leaves out two steps."""
    log_dir = tmp_path_factory.mktemp("one")
    values = settings(root, log_dir, trainer__kto__max_steps=7, **SKIP)
    ((message, _),) = run_ranks(broken_run, 1, free_port(), values, "gradient", 0, (2, 5))
    assert message == "no error"
    return read_series(log_dir)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model__optim__overlap_param_sync": True}, "loss"),
        (TP2, "gradient"),
        (PP2, "gradient"),
        pytest.param({"model__optim__overlap_grad_sync": True}, "gradient", marks=pytest.mark.slow),
        pytest.param(TP2, "loss", marks=pytest.mark.slow),
        pytest.param(PP2, "loss", marks=pytest.mark.slow),
    ],
)
def test_a_step_left_out_changes_nothing_under_every_layout(
    broken: Run, of_one_process: dict[str, Any], tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    """`Breaks` compares parameters and optimizer state bit by bit; the other steps are those of one process."""
    for message, _ in broken(2, what, -1, (2, 5), trainer__kto__max_steps=7, **SKIP, **changes):
        assert message == "no error"
    series, expected = read_series(tmp_path / "log"), of_one_process
    assert [series["train/skipped_steps"][step] for step in range(7)] == [0, 1, 1, 1, 2, 2, 2]
    assert sorted(series["train/grad_norm"]) == [0, 2, 3, 5, 6]
    # the learning rate is a function of the step's number, left out or not
    assert series["train/lr"] == expected["train/lr"]
    assert [new < old for old, new in itertools.pairwise(series["train/lr"].values())] == [True] * 6
    if what == "loss":  # then those two steps have no metrics
        expected, series = (
            {
                name: {step: value for step, value in values.items() if step not in (1, 4)}
                for name, values in run.items()
            }
            for run in (expected, series)
        )
    unvalidated: dict[str, Any] = {"val/loss": {}, "val/kl": {}}
    assert_alike(series | unvalidated, expected | unvalidated)


def test_too_many_in_a_row_end_the_run(broken: Run) -> None:
    (answer, _) = broken(1, "loss", 0, (2, 4, 5, 6, 7), **SKIP, trainer__kto__max_skipped_steps=2)[0]
    assert "The loss of step 6 is not finite." in answer
    assert "The 2 steps before it were not finite either" in answer and "trainer.kto.max_skipped_steps=2" in answer


def test_a_resumed_run_goes_on_counting(broken: Run, tmp_path: Path) -> None:
    limits = {**SKIP, **SAVING, "trainer__kto__max_skipped_steps": 3}
    broken(1, "gradient", 0, (1, 3, 4), trainer__kto__max_steps=4, **limits)
    (answer, _) = broken(1, "gradient", 0, (5, 6), trainer__kto__max_steps=8, **limits)[0]
    assert "The gradient of step 6 is not finite" in answer and "The 3 steps before it" in answer
    assert read_series(tmp_path / "log")["train/skipped_steps"] == {0: 1, 1: 1, 2: 2, 3: 3, 4: 4}


def test_the_first_step_does_not_blame_the_learning_rate(broken: Run) -> None:
    (answer, _) = broken(1, "loss", 0, (1,))[0]
    assert "it is not the learning rate" in answer and "Lower model.optim.lr" not in answer


def test_a_ruinous_learning_rate_is_blamed(root: Path, broken: Run) -> None:
    """Nothing is put in: the numbers of step 2 overflow by themselves."""
    (answer, _) = broken(1, "nothing", 0, (), model__optim__lr=1e30)[0]
    assert "The gradient of step 2 is not finite" in answer and "Lower model.optim.lr" in answer


def test_a_mixture_of_experts_forgets_what_was_computed_again(broken: Run, root: Path, tmp_path: Path) -> None:
    """The routers' loss is added up in every pass that makes gradients: that of later steps must not hold it."""
    changes = {
        **SKIP,
        "pretrained_checkpoint__restore_from_path": str(root / "experts"),
        "model__moe_aux_loss_coeff": 0.01,
        "model__optim__lr": 0.0,
        "model__optim__sched__min_lr": 0.0,
        "trainer__kto__max_steps": 3,
    }
    broken(1, "gradient", 0, (2,), **changes)
    broken(1, "nothing", 0, (), log_dir=tmp_path / "whole", **changes)
    series, whole = read_series(tmp_path / "log"), read_series(tmp_path / "whole")
    assert series["train/moe_aux_loss"] == whole["train/moe_aux_loss"]


def test_a_folder_with_weights_that_are_not_finite_is_named(root: Path, tmp_path: Path, run_ranks: Any) -> None:
    """On all ranks, though one has the broken row: not the learning rate is blamed."""
    folder = make_model_folder(tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[15, 3] = math.inf
    model.save_pretrained(folder)
    values = settings(root, tmp_path / "log", pretrained_checkpoint__restore_from_path=str(folder), **TP2)
    for kind, message in run_ranks(refusal_on_rank, 2, free_port(), values):
        assert kind == "CheckpointError"
        assert f"{folder}: model.layers.2.self_attn.v_proj.weight" in message and "not finite" in message


def test_weights_that_float16_cannot_hold_are_no_start(root: Path, tmp_path: Path, run_ranks: Any) -> None:
    """The file is fine, and what becomes of it is not."""
    folder = make_model_folder(tmp_path / "large")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 3] = 1e5
    model.save_pretrained(folder)
    changes = {"pretrained_checkpoint__restore_from_path": str(folder), "trainer__precision": "16-mixed"}
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), settings(root, tmp_path / "log", **changes))
    assert kind == "CheckpointError" and "embedding.word_embeddings.weight are not finite in torch.float16" in message
    assert "trainer.precision=bf16-mixed" in message


def test_an_adapter_that_is_not_finite_is_no_start(root: Path, tmp_path: Path, run_ranks: Any) -> None:
    lora = {"model__peft__peft_scheme": "lora", "model__peft__lora_tuning__adapter_dim": 2}
    exported = settings(root, tmp_path / "log", **lora, trainer__kto__max_steps=1, export__enabled=True)
    run_ranks(train_on_rank, 1, free_port(), exported)
    file = tmp_path / "log" / "hf" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = NAN
    save_file(tensors, file)
    start = {"model__peft__lora_tuning__restore_from_path": str(file.parent)}
    values = settings(root, tmp_path / "other", **lora, **start)
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), values)
    assert kind == "CheckpointError" and message.startswith(f"{file}: ") and "not finite" in message
