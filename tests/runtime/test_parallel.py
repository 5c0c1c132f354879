"""What the environment says of a run's processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nemo_kto.errors import ConfigError
from nemo_kto.runtime.launch import check_environment, check_launched
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.parallel import device_count


def test_devices_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert device_count(4, "cpu") == 4
    assert device_count("auto", "cpu") == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert device_count("auto", "cpu") == 3


LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_JOB_NAME",
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set variables of launchers, and no others."""

    def set_only(**variables: str) -> None:
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_only


def test_torchrun_must_agree(environment: Callable[..., None]) -> None:
    environment(TORCHELASTIC_RUN_ID="x", WORLD_SIZE="4", RANK="1", LOCAL_RANK="1")
    check_launched(Layout(world_size=4))
    with pytest.raises(ConfigError, match="torchrun started 4 processes, but .* is 2"):
        check_launched(Layout(world_size=2))


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"},
        {"LOCAL_RANK": "1", "NODE_RANK": "1", "RANK": "5", "WORLD_SIZE": "2", "MASTER_PORT": "29500"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "kto"},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "interactive"},
    ],
)
def test_what_launchers_set_is_accepted(environment: Callable[..., None], variables: dict[str, str]) -> None:
    environment(**variables)
    check_environment()
    if variables != {"RANK": "0", "WORLD_SIZE": "1"}:
        check_launched(Layout(world_size=2))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "says RANK=1 WORLD_SIZE=2, but neither torchrun nor Slurm has started"),
        ({"RANK": "3"}, "says RANK=3, but neither"),
        ({"WORLD_SIZE": "8"}, "says WORLD_SIZE=8, but neither"),
        (
            {"RANK": "0", "WORLD_SIZE": "1"},
            "says RANK=0 WORLD_SIZE=1, but neither",
        ),  # its other ranks would inherit it
        ({"RANK": "one"}, "RANK=one is no number"),
        ({"LOCAL_RANK": "5", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, r"rank 5 of 2 \(LOCAL_RANK\)"),
        ({"LOCAL_RANK": "-1", "MASTER_PORT": "29500"}, r"rank -1 of 2 \(LOCAL_RANK\)"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "1"}, "started 4 processes, but .* is 2"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 says .* MASTER_PORT does not say where they meet"),
        ({"LOCAL_RANK": "0", "RANK": "1", "MASTER_PORT": "1"}, "RANK=1 and LOCAL_RANK=0 contradict each other"),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "5"}, r"rank 5 of 2 \(RANK\)"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "2"}, r"rank 2 of 2 \(SLURM_PROCID\)"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "Slurm started 1 processes, but .* is 2"),
    ],
)
def test_what_is_left_over_is_named(environment: Callable[..., None], variables: dict[str, str], message: str) -> None:
    """A process that believed it would wait for others for ever, or say and write nothing."""
    environment(**variables)
    with pytest.raises(ConfigError, match=message):
        check_launched(Layout(world_size=2))
