"""Whole runs of models that see images: ways to hold the reference, stops and kills, evaluation, pairs of prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed_harness import RankFailure, free_port
from tests.integration.assets import read_series, refusal_on_rank, train_on_rank, without_times
from tests.integration.oracle import BETA
from tests.integration.test_evaluate import evaluate_on_rank
from tests.integration.test_matrix import ADAPTERS, PP2, SP2
from tests.integration.test_reference_modes import NAMES, killed_in_training
from tests.integration.test_resume import CONSTANT
from tests.integration.test_vision_oracle import VisionPair, train_and_keep_batches
from tests.integration.vision_assets import (
    Readings,
    make_model_folder,
    spoken,
    vision_settings,
    write_feedback,
    write_images,
)

STEPS = 5
QWEN, LLAVA = "qwen2_5_vl", "llava_clip"
TRAINED: dict[str, dict[str, Any]] = {
    "none": {"model__vision__train": "none"},
    "all": {"model__vision__train": "all"},
    "adapters": ADAPTERS,
}
Series = dict[str, dict[int, float]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    write_images(folder / "images")
    write_feedback(folder / "train.jsonl", number=40, seed=5)
    write_feedback(folder / "validation.jsonl", number=11, seed=6)
    for kind in (QWEN, LLAVA):
        make_model_folder(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def run(
    root: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]
) -> Callable[..., tuple[Path, Series]]:
    """Return `run(kind, world_size=1, **changes)`: log folder and series of a run of five steps."""

    def get(kind: str, world_size: int = 1, *, log_dir: Path | None = None, **changes: Any) -> tuple[Path, Series]:
        log_dir = log_dir or tmp_path_factory.mktemp("run")
        values = vision_settings(root, log_dir, kind, **{"trainer__kto__max_steps": STEPS, **changes})
        run_ranks(train_on_rank, world_size, free_port(), values)
        return log_dir, read_series(log_dir)

    return get


def validated(root: Path) -> dict[str, Any]:
    held_out = str(root / "validation.jsonl")
    return {"model__data__data_prefix__validation": held_out, "trainer__kto__val_check_interval": STEPS}


# the reference


@pytest.fixture(scope="module")
def swapped(root: Path, run: Callable[..., tuple[Path, Series]]) -> Callable[[str], Series]:
    """Return `swapped(trained)`: the series with the reference in CPU memory."""
    known: dict[str, Series] = {}

    def get(trained: str) -> Series:
        if trained not in known:
            mode = {"model__kto__reference__mode": "cpu_swap"}
            known[trained] = run(QWEN, **validated(root), **TRAINED[trained], **mode)[1]
        return known[trained]

    return get


@pytest.mark.parametrize(
    ("trained", "mode"),
    [
        pytest.param("none", "resident", marks=pytest.mark.slow),
        ("none", "cached"),
        ("all", "resident"),
        pytest.param("all", "cached", marks=pytest.mark.slow),
        ("adapters", "adapter_off"),
        pytest.param("adapters", "resident", marks=pytest.mark.slow),
        pytest.param("adapters", "cached", marks=pytest.mark.slow),
    ],
)
def test_all_modes_give_the_same_series(
    root: Path,
    run: Callable[..., tuple[Path, Series]],
    swapped: Callable[[str], Series],
    trained: str,
    mode: str,
) -> None:
    _, actual = run(QWEN, **validated(root), **TRAINED[trained], model__kto__reference__mode=mode)
    expected = swapped(trained)
    assert actual["train/loss"][0] == 0.5 and actual["train/loss"][STEPS - 1] != 0.5
    for name in NAMES:
        assert len(actual[name]) == (STEPS if name.startswith("train") else 1)
        assert actual[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name


def test_a_cache_made_of_other_images_is_refused(
    root: Path, tmp_path: Path, run: Callable[..., tuple[Path, Series]], run_ranks: Callable[..., Any]
) -> None:
    """The same texts and as many tokens: only what the images show is another."""
    shutil.copytree(root / "images", tmp_path / "images")
    train = Path(shutil.copy(root / "train.jsonl", tmp_path))
    changes = {
        "model__data__data_prefix__train": str(train),
        "model__kto__reference__mode": "cached",
        "model__kto__reference__cache_dir": str(tmp_path / "reference"),
        "trainer__kto__max_steps": 1,
    }
    run(LLAVA, **changes)
    first, second = sorted((tmp_path / "images").iterdir())[:2]
    shutil.copy(second, first)
    values = vision_settings(root, tmp_path / "log", LLAVA, **changes)
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), values)
    assert kind == "ConfigError" and "train data" in message and "model.kto.reference.cache_dir" in message, message


# stops and kills


@pytest.mark.parametrize("trained", [pytest.param("none", marks=pytest.mark.slow), "all"])
def test_a_stopped_run_goes_on_exactly(run: Callable[..., tuple[Path, Series]], tmp_path: Path, trained: str) -> None:
    """Every number that is logged, to the last bit."""
    changes = {**CONSTANT, **TRAINED[trained]}
    for steps in (2, STEPS):
        _, parts = run(LLAVA, log_dir=tmp_path / "parts", **{**changes, "trainer__kto__max_steps": steps})
    _, whole = run(LLAVA, **changes)
    assert without_times(parts) == without_times(whole)
    assert len(whole["train/loss"]) == STEPS


@pytest.mark.parametrize("trained", ["none", pytest.param("all", marks=pytest.mark.slow)])
def test_killed_in_training_it_goes_on_exactly(
    root: Path,
    tmp_path: Path,
    run: Callable[..., tuple[Path, Series]],
    run_ranks: Callable[..., Any],
    trained: str,
) -> None:
    changes = {**CONSTANT, **TRAINED[trained], "trainer__kto__max_steps": STEPS + 1, "trainer__kto__save_interval": 3}
    with pytest.raises(RankFailure, match="died"):
        run_ranks(killed_in_training, 2, free_port(), vision_settings(root, tmp_path / "killed", QWEN, **changes))
    _, actual = run(QWEN, 2, log_dir=tmp_path / "killed", **changes)
    _, expected = run(QWEN, 2, **changes)
    for name in ("train/loss", "train/grad_norm", "train/kl", "train/rewards/margins"):
        assert actual[name] == expected[name], name


def test_a_run_goes_on_under_another_layout(run: Callable[..., tuple[Path, Series]], tmp_path: Path) -> None:
    """A tower that is trained is divided among nobody, and moves with the first stage."""
    changes = {**CONSTANT, **TRAINED["all"]}
    for steps, (world_size, layout) in zip((2, 4, STEPS), [(1, {}), (2, SP2), (2, PP2)], strict=True):
        layout = {**layout, "trainer__kto__max_steps": steps}
        _, chain = run(QWEN, world_size, log_dir=tmp_path / "chain", **changes, **layout)
    _, whole = run(QWEN, **changes)
    for name in ("train/loss", "train/grad_norm"):
        assert chain[name] == pytest.approx(whole[name], rel=1e-5), name


# what comes of it


@pytest.mark.parametrize("trained", [pytest.param("none", marks=pytest.mark.slow), "all"])
def test_evaluation_says_what_training_and_transformers_say(
    root: Path, run: Callable[..., tuple[Path, Series]], run_ranks: Callable[..., Any], trained: str
) -> None:
    changes = {**CONSTANT, **TRAINED[trained], **validated(root), "export__enabled": True}
    log_dir, logged = run(QWEN, **changes)
    values = vision_settings(root, log_dir, QWEN, **changes)
    (((_, kind, message),),) = run_ranks(evaluate_on_rank, 1, free_port(), [values])
    assert (kind, message) == ("", "")
    results = json.loads((log_dir / "evaluation.json").read_text())["overall"]
    for name in ("loss", "kl", "rewards/chosen", "rewards/rejected"):
        assert results[name] == pytest.approx(logged[f"val/{name}"][STEPS - 1], rel=1e-6, abs=1e-6), name
    assert rewards_of_folder(root, log_dir / "hf") == pytest.approx(
        [results["rewards/chosen"], results["rewards/rejected"]], rel=1e-4, abs=2e-5
    )


@torch.no_grad()
def rewards_of_folder(root: Path, folder: Path) -> list[float]:
    """Return the mean rewards of both classes of the held-out records, of an exported model."""
    readings = Readings(root / "validation.jsonl", QWEN)
    pair = VisionPair(folder, trained="none", reference=root / QWEN)
    numbers = range(len(readings.rows))
    rewards = BETA * pair.ratios([readings.document(number, number) for number in numbers])
    good = torch.tensor([row["label"] for row in readings.rows])
    return [rewards[good].mean().item(), rewards[~good].mean().item()]


# answers of a checkpoint, built again without its run


def answers_of(log_dir: Path, prompts: list[Any]) -> list[str]:
    """Return what the newest checkpoint answers, by the function behind `nemo-kto generate`."""
    import torch.distributed as dist

    from nemo_kto.commands.generate import answer_prompts
    from nemo_kto.generation.decoding import Sampling

    dist.destroy_process_group()  # the harness's
    checkpoint = log_dir / "checkpoints" / f"megatron_gpt-step={STEPS}-last"
    return [answer for _, answer in answer_prompts(checkpoint, prompts, Sampling(max_new_tokens=6))]


@pytest.mark.parametrize("trained", ["none", "all", "adapters"])
def test_a_checkpoint_answers_as_its_run_did(
    root: Path, run: Callable[..., tuple[Path, Series]], run_ranks: Callable[..., Any], trained: str
) -> None:
    """What sees images is in it as far as it was trained, and else where training began."""
    answering = {"generation__num_prompts": 4, "generation__max_new_tokens": 6, "generation__temperature": 0.0}
    log_dir, _ = run(QWEN, **{**CONSTANT, **TRAINED[trained], **validated(root), **answering})
    told = [json.loads(line) for line in (log_dir / "generations.jsonl").read_text().splitlines()]
    assert len(told) == 4 and any("images" in row for row in told)
    rows = Readings(root / "validation.jsonl", QWEN).rows
    prompts = list({json.dumps(row["messages"][:-1]).replace("images/", f"{root}/images/"): 0 for row in rows})[:4]
    (answers,) = run_ranks(answers_of, 1, log_dir, [json.loads(prompt) for prompt in prompts])
    assert answers == [row["policy"] for row in told]
    assert len(set(answers)) > 1


def test_one_text_with_other_images_is_another_prompt(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    """Of eight prompts of one text four show one image, and four another, each in a file of its own.

    Joined with the response after its own, each but two would meet an answer to itself.
    """
    rows = []
    for number in range(8):
        file = tmp_path / f"{number}.png"
        shutil.copy(root / "images" / f"{number // 4}.png", file)
        answer = {"role": "assistant", "content": " ".join(["red"] * (number + 1))}
        rows.append({"messages": [spoken("user", "sea sky", [file.name]), answer], "label": number % 2 == 0})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = vision_settings(
        tmp_path,
        tmp_path / "log",
        LLAVA,
        pretrained_checkpoint__restore_from_path=str(root / LLAVA),
        model__tokenizer__path=str(root / LLAVA / "tokenizer"),
        trainer__kto__max_steps=1,
    )
    (((batch,)),) = run_ranks(train_and_keep_batches, 1, free_port(), values)
    assert len(batch.kl_pairs) == 8
    assert all(prompt // 4 != response // 4 for prompt, response in batch.kl_pairs.tolist())
