"""How Hydra composes a configuration, and what it is told."""

from __future__ import annotations

import pytest

from nemo_kto.config.compose import _forced


@pytest.mark.parametrize(
    ("argument", "forced"),
    [
        ("model.seed=1", "++model.seed=1"),
        ("+model.seed=1", "++model.seed=1"),
        ("++model.micro_batch_size=2", "++model.micro_batch_size=2"),
        ("~model.optim", "~model.optim"),
        ("hydra.job.name=x", "hydra.job.name=x"),
        ("--help", "--help"),
    ],
)
def test_overrides_are_forced_past_hydra(argument: str, forced: str) -> None:
    assert _forced(argument) == forced
