"""What the numbers of thumbs up and down mean for the loss weights, and what a configuration means for the data."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError
from nemo_kto.runs.data import read_data, settle_loss_weights


def settle(counts: tuple[int, int], **weights: float | str) -> KTOConfig:
    config = KTOConfig()
    for name, weight in weights.items():
        setattr(config.model.kto, f"{name}_loss_weight", weight)
    train = SimpleNamespace(class_totals=counts)
    return settle_loss_weights(config, SimpleNamespace(splits={"train": train}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counts", "weights", "expected"),
    [
        ((90, 10), {"desirable": "auto", "undesirable": "auto"}, (1.0, 6.75)),  # 90 / 67.5 = 4/3
        ((10, 90), {"desirable": "auto", "undesirable": "auto"}, (9.0, 1.0)),
        ((10, 90), {"desirable": "auto", "undesirable": 2.0}, (18.0, 2.0)),
        ((90, 10), {"undesirable": "auto"}, (1.0, 6.75)),
        ((90, 10), {}, (1.0, 1.0)),
        ((90, 0), {"desirable": "auto", "undesirable": "auto"}, (1.0, 1.0)),
    ],
)
def test_loss_weights(counts: tuple[int, int], weights: dict[str, Any], expected: tuple[float, float]) -> None:
    kto = settle(counts, **weights).model.kto
    assert (kto.desirable_loss_weight, kto.undesirable_loss_weight) == pytest.approx(expected)


def test_unbalanced_data_is_warned_about_with_the_lines_to_write(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="nemo_kto")
    settle((90, 10))
    (message,) = caplog.messages
    assert "90 desirable" in message and "10 undesirable" in message and "ratio is 9," in message
    assert message.splitlines()[1:] == [
        "    model.kto.desirable_loss_weight=1",
        "    model.kto.undesirable_loss_weight=6.75",
    ]
    caplog.clear()
    settle((90, 10), undesirable=6.75)
    settle((49, 51))
    settle((90, 10), undesirable=0.0)
    settle((90, 10), undesirable="auto")
    assert not caplog.messages


def test_automatic_weights_are_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nemo_kto")
    settle((90, 10), undesirable="auto")
    assert caplog.messages == ["Loss weights: 1 for desirable and 6.75 for undesirable samples"]


def test_data_of_one_kind_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    settle((90, 0))
    assert caplog.messages == ["All samples that count are desirable: KTO learns more from data with both kinds."]


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"data_prefix": {}}, ["no training data", "model.data.data_prefix.train"]),
        ({"format": "xml"}, ["'xml'", "nemo_aligner"]),
        ({"fields": {"reply": "x"}}, ["'reply'", "response"]),
        ({"desirable_if": "good"}, ["desirable_if='good'", "'>= 4'"]),
        ({"data_prefix": {"train": [{"weight": 2}]}}, ["'path' is missing"]),
        ({"data_prefix": {"train": [{"path": "a", "weight": 0}]}}, ["weight=0", "above 0"]),
    ],
)
def test_refused(data: dict[str, Any], parts: list[str]) -> None:
    config = KTOConfig()
    config.model.data.data_prefix.train = ["a.jsonl"]
    for name, value in data.items():
        if name == "data_prefix":
            config.model.data.data_prefix.train = value.get("train")
        else:
            setattr(config.model.data, name, value)
    with pytest.raises(ConfigError) as caught:
        read_data(config, tokenizer=None, max_positions=64, vocab_size=8)  # type: ignore[arg-type]  # it is not asked for
    assert all(part in str(caught.value) for part in parts), caught.value
