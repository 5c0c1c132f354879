"""Which checkpoint a run goes on from; what a kill leaves behind. Saving and loading: tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_kto.errors import CheckpointError, DamagedCheckpointError
from nemo_kto.runtime import checkpoint
from nemo_kto.runtime.checkpoint import ShardedCheckpointIO, load_common, own_writer, separate_step_counters
from nemo_kto.runtime.checkpoint_folders import is_finished, newest_whole, step_of


def make(folder: Path, name: str, *, metadata: bool = True, marker: bool = False) -> Path:
    checkpoint = folder / name
    checkpoint.mkdir()
    for part in ("common.pt", ".metadata"):
        (checkpoint / part).touch()
    if metadata:
        (checkpoint / "metadata.json").touch()
    if marker:
        (folder / f"{name}-unfinished").touch()
    return checkpoint


def test_the_newest_of_two_by_step_not_by_name(tmp_path: Path) -> None:
    make(tmp_path, "run-step=9-last")
    newest = make(tmp_path, "run-step=10-last")
    make(tmp_path, "run-step=8-val_loss=0.4000")
    assert newest_whole(tmp_path)[0] == newest and step_of(newest) == 10
    best = make(tmp_path, "run-step=12-val_loss=0.3000")  # killed before the last one was written
    assert newest_whole(tmp_path)[0] == best


@pytest.mark.parametrize("state", [{"metadata": False}, {"marker": True}])
def test_a_checkpoint_cut_off_while_written_does_not_count(tmp_path: Path, state: dict[str, bool]) -> None:
    finished = make(tmp_path, "run-step=4-last")
    cut_off = make(tmp_path, "run-step=8-last", **state)
    assert not is_finished(cut_off) and newest_whole(tmp_path)[0] == finished


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert newest_whole(tmp_path)[0] is None and newest_whole(tmp_path / "none")[0] is None


def test_names_without_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step=<number>"):
        step_of(tmp_path / "model")


def test_loading_what_is_unfinished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        ShardedCheckpointIO().load_checkpoint(make(tmp_path, "run-step=8-last", metadata=False))


def test_a_newer_megatrons_checkpoint_is_told_from_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path, "run-step=8-last")
    (folder / ".metadata").write_bytes(b"common_state/shard_0_1")
    monkeypatch.setattr(checkpoint, "megatron_version", "0.18.2")
    wanted = "Megatron-Core 0.19 or newer, whose checkpoints 0.18.2 cannot read"
    with pytest.raises(CheckpointError, match=wanted) as told:
        load_common(folder)
    assert not isinstance(told.value, DamagedCheckpointError)
    monkeypatch.setattr(checkpoint, "megatron_version", "0.19.0rc1")
    with pytest.raises(DamagedCheckpointError):
        load_common(folder)


def test_removal_starts_with_what_makes_it_look_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make(tmp_path, "run-step=8-last")
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (removed.append(path.name), unlink(path, **options)))
    ShardedCheckpointIO().remove_checkpoint(checkpoint)
    assert removed[0] == "metadata.json" and not checkpoint.exists()


def test_each_parameter_gets_its_own_step_counter() -> None:
    """Adam's bias correction would otherwise count a step once for each parameter."""

    class Wrapper:
        """As much of Megatron's optimizer as is looked at."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    adam = torch.optim.Adam(parameters)
    shared = torch.tensor(5.0)
    for parameter in parameters:
        adam.state[parameter] = {
            "step": shared,
            "exp_avg": torch.zeros(2),
            "exp_avg_sq": torch.zeros(2),
        }
        parameter.grad = torch.ones(2)
    separate_step_counters(Wrapper(adam))  # type: ignore[arg-type]
    adam.step()
    assert [adam.state[parameter]["step"].item() for parameter in parameters] == [6.0] * 3


def save_of_0_16(sharded_state_dict: object, checkpoint_dir: str, async_sharded_save: bool = False) -> None:
    """Megatron-Core 0.16's, as far as it matters."""


def save_of_0_18(
    sharded_state_dict: object,
    checkpoint_dir: str,
    async_sharded_save: bool = False,
    async_strategy: str | None = "nvrx",
) -> None:
    """Megatron-Core 0.17's to 0.19's."""


def test_megatrons_own_writer_is_asked_for_where_there_is_another() -> None:
    assert own_writer(save_of_0_16) == {}
    assert own_writer(save_of_0_18) == {"async_strategy": "mcore"}
