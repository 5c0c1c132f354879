"""What the environment says of a run's processes."""

from __future__ import annotations

import pytest

from nemo_kto.errors import ConfigError
from nemo_kto.runtime.launch import check_launched
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.parallel import device_count


def test_devices_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert device_count(4, "cpu") == 4
    assert device_count("auto", "cpu") == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert device_count("auto", "cpu") == 3


def test_torchrun_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_launched(Layout(world_size=4))
    with pytest.raises(ConfigError, match="torchrun started 4 processes, but .* is 2"):
        check_launched(Layout(world_size=2))
