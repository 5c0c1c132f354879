"""Rows of so many tokens, and a part of the KL set, are the same under every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.assets import assert_alike, read_series

TOKENS = {"model__micro_batch_tokens": 24}
LORA = {
    "model__peft__peft_scheme": "lora",
    "model__peft__lora_tuning__adapter_dim": 4,
    "model__peft__lora_tuning__adapter_dropout": 0.25,
    "model__optim__lr": 1e-2,
}
VPP2 = {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def series(train: Callable[..., Path], root: Path) -> Callable[..., dict[str, dict[int, float]]]:
    """Return `series(world size, **changes)`: what three steps and a validation log."""

    def get(world_size: int, **changes: Any) -> dict[str, dict[int, float]]:
        return read_series(
            train(
                world_size,
                model__data__data_prefix__validation=str(root / "validation.jsonl"),
                trainer__kto__max_steps=3,
                trainer__kto__val_check_interval=3,
                **changes,
            )
        )

    return get


def test_rows_of_so_many_tokens_change_nothing(series: Any) -> None:
    """Also not what the adapters' dropout leaves out, which depends on places in the global batch."""
    expected = series(1, model__micro_batch_size=8, **LORA)
    for world_size, layout in ((1, {}), (2, {}), (2, VPP2)):
        actual = series(world_size, **TOKENS, **LORA, **layout)
        assert actual["train/loss"][0] == 0.5
        assert_alike(actual, expected)


def test_a_part_of_the_kl_set_is_the_same_for_every_layout(series: Any) -> None:
    expected = series(1, model__kto__kl_fraction=0.5, model__micro_batch_size=4)
    for layout in ({"model__micro_batch_size": 2}, {**VPP2, **TOKENS}):
        assert_alike(series(2, model__kto__kl_fraction=0.5, **layout), expected)
