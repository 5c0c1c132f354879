"""Damage to a checkpoint is noticed by whoever reads it, named, and survived where an older one is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_kto.runtime.checkpoint_folders import DAMAGED_FOLDER
from tests.distributed_harness import free_port, heard
from tests.integration.assets import read_series, refusal_on_rank, settings, train_on_rank
from tests.integration.test_evaluate import evaluate_on_rank

STEPS = 4
SAVING = {
    "exp_manager__create_checkpoint_callback": True,
    "trainer__kto__save_interval": 2,
    "trainer__kto__max_steps": STEPS,
    "model__optim__sched__name": "Constant",
    "model__data__data_prefix__validation": None,
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def fill(file: Path) -> None:
    file.write_bytes(b"\x80garbage" * (file.stat().st_size // 8 + 1))


FILES = (".metadata", "metadata.json", "common.pt", "__0_0.distcp", "hf/config.json", "hf/identity.json")
DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    f"{how.__name__} {name}": (lambda folder, _, how=how, name=name: how(folder / name), name)
    for name in FILES
    for how in (Path.unlink, flip, cut, fill)
} | {
    "an empty folder": (lambda folder, _: [shutil.rmtree(folder), folder.mkdir()], "metadata.json"),
    "common.pt of another step": (lambda folder, old: shutil.copy(old / "common.pt", folder), "common.pt"),
    "weights of another step": (lambda folder, old: shutil.copy(old / "__0_0.distcp", folder), "__0_0.distcp"),
    "a damaged manifest": (lambda folder, _: cut(folder / "manifest.json"), "manifest.json"),
}
"""Name -> what is done to the newest checkpoint, with an older one at hand, and the file that is named."""

COMMON = ("flip __0_0.distcp", "an empty folder", "common.pt of another step", "unlink .metadata")


@pytest.fixture(scope="module")
def log(root: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]) -> Path:
    """Return the log folder of a run that was stopped at step 4, whose checkpoint of step 2 is there too."""
    folder, kept = tmp_path_factory.mktemp("log"), tmp_path_factory.mktemp("kept")
    for steps in (2, STEPS):
        values = settings(root, folder, **{**SAVING, "trainer__kto__max_steps": steps})
        run_ranks(train_on_rank, 1, free_port(), values)
        if steps == 2:
            shutil.copytree(folder / "checkpoints", kept, dirs_exist_ok=True)
    shutil.copytree(kept, folder / "checkpoints", dirs_exist_ok=True)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "megatron_gpt-step=2-last",
        "megatron_gpt-step=4-last",
    ]
    return folder


@pytest.fixture
def damaged(log: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return `damaged(case)`: a copy of the log folder whose newest checkpoint is damaged."""

    def make(case: str) -> Path:
        copy = Path(shutil.copytree(log, tmp_path / "log"))
        newest, older = (copy / "checkpoints" / f"megatron_gpt-step={step}-last" for step in (STEPS, 2))
        DAMAGE[case][0](newest, older)
        return copy

    return make


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in COMMON else pytest.mark.slow) for case in DAMAGE]
)
def test_a_run_goes_on_from_the_newest_that_is_whole(
    root: Path, log: Path, damaged: Callable[[str], Path], run_ranks: Callable[..., Any], case: str
) -> None:
    """It takes the steps since then once more, and ends with the same numbers; what was damaged is kept."""
    copy = damaged(case)
    said = run_ranks(
        train_and_listen, 1, free_port(), settings(root, copy, **{**SAVING, "trainer__kto__max_steps": 6})
    )
    assert DAMAGE[case][1] in said[0] and "goes on from" in said[0] and "step=2-last" in said[0], said
    assert [path.name for path in (copy / DAMAGED_FOLDER).iterdir()] == ["megatron_gpt-step=4-last"]
    series, before = read_series(copy)["train/loss"], read_series(log)["train/loss"]
    assert {step: series[step] for step in before} == before and sorted(series) == [*range(6)]


def train_and_listen(port: int, overrides: dict[str, Any]) -> str:
    """Train; return what the log warned of."""
    import logging

    said = heard(logging.WARNING)
    train_on_rank(port, overrides)
    return "\n".join(said)


def test_two_ranks_find_a_flipped_bit_and_agree(
    root: Path, log: Path, damaged: Callable[[str], Path], run_ranks: Callable[..., Any]
) -> None:
    """Each looks at a share of the files."""
    copy = damaged("flip __0_0.distcp")
    values = settings(root, copy, **{**SAVING, "trainer__kto__max_steps": 6, "model__tensor_model_parallel_size": 2})
    said = run_ranks(train_and_listen, 2, free_port(), values)
    assert "__0_0.distcp" in said[0] and "goes on from" in said[0] and said[1] == ""
    assert read_series(copy)["train/loss"] == pytest.approx(
        read_series(log)["train/loss"] | read_series(copy)["train/loss"]
    )


def test_a_run_that_is_over_looks_closely_before_it_says_so(
    root: Path, damaged: Callable[[str], Path], run_ranks: Callable[..., Any]
) -> None:
    copy = damaged("flip __0_0.distcp")
    (said,) = run_ranks(train_and_listen, 1, free_port(), settings(root, copy, **SAVING))
    assert "__0_0.distcp" in said and (copy / "checkpoints" / "megatron_gpt-step=4-last" / "manifest.json").exists()


def test_without_any_whole_one_nothing_is_started_afresh(
    root: Path, damaged: Callable[[str], Path], run_ranks: Callable[..., Any]
) -> None:
    copy = damaged("an empty folder")
    (copy / "checkpoints" / "megatron_gpt-step=2-last" / "common.pt").unlink()
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), settings(root, copy, **SAVING))
    assert kind == "CheckpointError" and "none can be used" in message
    assert "step=4-last: metadata.json is missing" in message and "step=2-last: common.pt is missing" in message
    assert len(list((copy / "checkpoints").iterdir())) == 2  # nothing was moved or removed


def test_damage_that_was_not_asked_for_is_not_looked_for(
    root: Path, damaged: Callable[[str], Path], run_ranks: Callable[..., Any]
) -> None:
    copy = damaged("flip __0_0.distcp")
    changes = {**SAVING, "trainer__kto__max_steps": 6, "exp_manager__verify_checkpoints": False}
    (said,) = run_ranks(train_and_listen, 1, free_port(), settings(root, copy, **changes))
    assert "damaged" not in said and not (copy / DAMAGED_FOLDER).exists()


def read_all(cases: list[tuple[Path, Path]]) -> list[tuple[str, str]]:
    """Return how exporting each checkpoint and answering with it ended."""
    import torch.distributed as dist

    from nemo_kto.commands.export import export_checkpoint
    from nemo_kto.commands.generate import answer_prompts
    from nemo_kto.errors import KTOError
    from nemo_kto.generation.decoding import Sampling

    dist.destroy_process_group()
    outcomes = []
    for checkpoint, folder in cases:
        ends = []
        for action in (
            lambda checkpoint=checkpoint, folder=folder: export_checkpoint(checkpoint, folder),
            lambda checkpoint=checkpoint: answer_prompts(checkpoint, ["red"], Sampling(max_new_tokens=2)),
        ):
            try:
                action()
                ends.append("")
            except KTOError as error:
                ends.append(str(error))
        outcomes.append((ends[0], ends[1]))
    return outcomes


def damaged_copies(log: Path, folder: Path) -> list[Path]:
    """Return copies of the newest checkpoint with each kind of damage."""
    copies = []
    for number, case in enumerate(DAMAGE):
        newest, older = (log / "checkpoints" / f"megatron_gpt-step={step}-last" for step in (STEPS, 2))
        copies.append(Path(shutil.copytree(newest, folder / str(number) / newest.name)))
        DAMAGE[case][0](copies[-1], older)
    return copies


def test_export_and_generate_name_the_file(log: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    cases = [(copy, tmp_path / f"hf{number}") for number, copy in enumerate(damaged_copies(log, tmp_path))]
    (outcomes,) = run_ranks(read_all, 1, cases)
    for (case, (_, name)), (copy, folder), outcome in zip(DAMAGE.items(), cases, outcomes, strict=True):
        for message in outcome:
            assert str(copy) in message and (name in message or "not a finished" in message), (case, message)
        assert not folder.exists(), case


def test_evaluation_names_the_file(root: Path, log: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    """And writes no results."""
    changes = {**SAVING, "model__data__data_prefix__validation": str(root / "validation.jsonl")}
    whole = log / "checkpoints" / f"megatron_gpt-step={STEPS}-last"
    copies = [*damaged_copies(log, tmp_path), Path(shutil.copytree(whole, tmp_path / "whole" / whole.name))]
    values = [
        settings(
            root,
            log,
            **{**changes, "evaluation__checkpoint": str(copy), "evaluation__output": str(copy.parent / "found.json")},
        )
        for copy in copies
    ]
    (outcomes,) = run_ranks(evaluate_on_rank, 1, free_port(), values)
    for (case, (_, name)), copy, (_, kind, message) in zip(DAMAGE.items(), copies, outcomes, strict=False):
        assert kind in ("CheckpointError", "DamagedCheckpointError"), (case, kind)
        assert str(copy) in message and (name in message or "not a finished" in message), (case, message)
        assert not (copy.parent / "found.json").exists(), case
    assert outcomes[-1][1:] == ("", "")  # what is whole is evaluated in the same way


def test_evaluation_does_not_choose_an_older_one_by_itself(
    root: Path, damaged: Callable[[str], Path], run_ranks: Callable[..., Any]
) -> None:
    """Its numbers would be taken for those of the newest. And it moves nothing, as a run may be writing there."""
    copy = damaged("flip __0_0.distcp")
    values = settings(root, copy, **{**SAVING, "model__data__data_prefix__validation": str(root / "validation.jsonl")})
    (((_, kind, message),),) = run_ranks(evaluate_on_rank, 1, free_port(), [values])
    assert kind == "DamagedCheckpointError" and "step=4-last" in message and "__0_0.distcp" in message
    assert len(list((copy / "checkpoints").iterdir())) == 2 and not (copy / DAMAGED_FOLDER).exists()


def test_a_checkpoint_of_before_there_were_manifests(log: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    copy = Path(shutil.copytree(log / "checkpoints" / "megatron_gpt-step=4-last", tmp_path / "run-step=4-last"))
    (copy / "manifest.json").unlink()
    assert run_ranks(read_all, 1, [(copy, tmp_path / "hf")]) == [[("", "")]]
    state = torch.load(copy / "common.pt", weights_only=True)
    assert state["global_step"] == STEPS
