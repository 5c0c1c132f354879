"""What the numbers of thumbs up and down mean for the loss weights, and what a configuration means for the data."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError, DataError
from nemo_kto.network.families import family_of, parts_of_wholes
from nemo_kto.network.vision import PROJECTORS
from nemo_kto.runs import data as run_data
from nemo_kto.runs import records
from nemo_kto.runs.data import read_data, settle_loss_weights
from tests.integration.assets import make_tokenizer


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


def read_pairs(
    folder: Path, *, shuffle: bool, kl_scope: str = "micro_batch", validation: int = 0
) -> list[list[tuple[int, int]]]:
    """Read ten records, two of each prompt side by side, and return the pairs of records of each batch's KL set."""
    config = KTOConfig()
    for split, number in (("train", 10), ("validation", validation)):
        rows = [
            {"prompt": f"{('red', 'sea', 'dog', 'sun', 'hill')[i // 2]} {split}", "completion": " tree", "label": True}
            for i in range(number)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if number:
            setattr(config.model.data.data_prefix, split, [str(folder / f"{split}.jsonl")])
    config.exp_manager.explicit_log_dir = str(folder)
    config.model.data.shuffle = shuffle
    config.model.global_batch_size, config.model.micro_batch_size = 4, 2
    config.model.kto.kl_scope = kl_scope  # type: ignore[assignment]
    data = read_data(config, make_tokenizer(), max_positions=64, vocab_size=1000)
    data.set_position(dp_rank=0, dp_size=1, num_steps=2, steps_per_epoch=2, start_step=int)
    return [
        [(index.prompt, index.response) for index in batch if index.in_kl_set]
        for batch in data.global_batches("train")
    ]


def test_micro_batches_that_pair_a_prompt_with_its_own_response_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="nemo_kto.runs.data")
    # records 0 to 7 are trained on in order; of the three validated ones the last is a group of its own
    assert read_pairs(tmp_path, shuffle=False, validation=3)[0] == [(0, 1), (1, 0), (2, 3), (3, 2)]
    train, validation = caplog.messages
    assert train.startswith("train data: the KL response of 8 of 10 samples is one to their own prompt")
    assert "kl_scope=global_batch" in train and "model.data.shuffle=true" in train
    assert validation.startswith("validation data: the KL response of 3 of 3") and "shuffle" not in validation

    caplog.clear()
    pairs = read_pairs(tmp_path, shuffle=True)
    meetings = sum(prompt // 2 == response // 2 for batch in pairs for prompt, response in batch)
    assert [f"KL response of {meetings} of 10 " in message for message in caplog.messages] == [True] * bool(meetings)
    caplog.clear()
    pairs = read_pairs(tmp_path, shuffle=False, kl_scope="global_batch")
    assert not caplog.messages and all(prompt // 2 != response // 2 for batch in pairs for prompt, response in batch)


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


def test_what_the_data_knows_of_models_that_see_is_what_the_network_does() -> None:
    """Two tables, as the commands that only look at data do without Megatron."""
    assert set(records._PROCESSORS) == set(PROJECTORS)
    sectioned = {
        whole
        for names in parts_of_wholes().values()
        for name in names
        if (family := family_of(SimpleNamespace(model_type=name))).rotary_sections
        for whole in family.part_of
    }
    assert set(records._COUNTS_GRID) == sectioned


class Told(SimpleNamespace):
    """Samples of which a message tells one."""

    def __getitem__(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(prompt=[1])


def test_what_stands_for_images_needs_no_embedding() -> None:
    index = np.array([(0, 4)], dtype=[("start", "<i8"), ("prompt", "<i4")])
    store = SimpleNamespace(tokens=np.array([1, 70, 70, 2, 3]), samples=index)
    lengths = {"prompt_kept": np.array([4]), "response_kept": np.array([1])}
    samples = Told(stores=[store], store_of=np.array([0]), place=np.array([0]), **lengths)
    tokenizer: Any = SimpleNamespace(decode=lambda _: "a", convert_ids_to_tokens=lambda token: f"<{token}>")
    module: Any = SimpleNamespace(splits={"train": samples}, files_of=lambda _: (["f"], np.array([0])))
    module.image_token_id = 70
    run_data._check_tokens(module, tokenizer, 64)
    module.image_token_id = None
    with pytest.raises(DataError, match="1 samples hold tokens that the model lacks, such as '<70>', number 70"):
        run_data._check_tokens(module, tokenizer, 64)
