"""Answers during a run and of a checkpoint, against transformers' greedy ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from nemo_kto import cli
from nemo_kto.errors import KTOError
from tests.distributed_harness import free_port
from tests.integration.assets import (
    make_model_folder,
    make_tokenizer,
    settings,
    train_on_rank,
    write_feedback,
)
from tests.waiting import HANG

NEW_TOKENS = 6
STEPS = 4
ASKED = {
    "generation__num_prompts": 3,
    "generation__max_new_tokens": NEW_TOKENS,
    "trainer__kto__max_steps": STEPS,
    "trainer__kto__val_check_interval": 2,
    "model__optim__lr": 1e-2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    make_model_folder(folder / "hf")
    make_model_folder(folder / "other", seed=9)
    write_feedback(folder / "train.jsonl", number=40, seed=5)
    write_feedback(folder / "validation.jsonl", number=8, seed=6)
    return folder


def prompts(root: Path) -> list[str]:
    """Return the first three prompts of the validation data; they differ."""
    found = [json.loads(line)["prompt"] for line in (root / "validation.jsonl").read_text().splitlines()[:3]]
    assert len(set(found)) == 3
    return found


def greedy(folder: Path, texts: list[str]) -> list[str]:
    """Return transformers' answers."""
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    answers = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=[0, 2],  # the tokenizer's, and that of generation_config.json
            pad_token_id=0,
        )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def run(root: Path, log_dir: Path, run_ranks: Callable[..., Any], ranks: int, **changes: Any) -> list[dict[str, Any]]:
    values = {"export__enabled": True, "model__data__data_prefix__validation": str(root / "validation.jsonl"), **ASKED}
    run_ranks(train_on_rank, ranks, free_port(), settings(root, log_dir, **{**values, **changes}))
    return [json.loads(line) for line in (log_dir / "generations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("layout", "reference"),
    [
        ("pipeline_model_parallel_size", {"mode": "cpu_swap"}),
        ("tensor_model_parallel_size", {"mode": "cached"}),
        pytest.param("context_parallel_size", {"mode": "resident", "checkpoint": "other"}, marks=pytest.mark.slow),
        pytest.param(
            "pipeline_model_parallel_size", {"mode": "cached", "checkpoint": "other"}, marks=pytest.mark.slow
        ),
    ],
)
def test_policy_and_reference_answer_as_in_transformers(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], layout: str, reference: dict[str, str]
) -> None:
    """After the last step the policy is what is exported; the reference is what it was all along."""
    folder = root / reference.get("checkpoint", "hf")
    changes = {f"model__{layout}": 2, "model__kto__reference__mode": reference["mode"]}
    if "checkpoint" in reference:
        changes["model__kto__reference__checkpoint"] = str(folder)
    lines = run(root, tmp_path, run_ranks, 2, **changes)
    assert [line["step"] for line in lines] == [2] * 3 + [4] * 3
    assert [line["prompt"] for line in lines] == prompts(root) * 2
    assert [line["reference"] for line in lines] == greedy(folder, prompts(root)) * 2
    expected = greedy(tmp_path / "hf", prompts(root))
    assert [line["policy"] for line in lines[3:]] == expected != greedy(root / "hf", prompts(root))


def test_adapters_and_the_base_answer(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    changes = {"model__peft__peft_scheme": "lora", "export__merge_adapters": True, "model__optim__lr": 0.1}
    lines = run(root, tmp_path, run_ranks, 2, **changes, model__tensor_model_parallel_size=2)
    assert [line["reference"] for line in lines[3:]] == greedy(root / "hf", prompts(root))
    assert [line["policy"] for line in lines[3:]] == greedy(tmp_path / "hf", prompts(root))
    assert lines[3]["policy"] != lines[3]["reference"]


def test_answers_change_nothing_else(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    """A run that answers ends with the very weights of one that does not; with parameters that arrive late."""
    for name, number in (("asked", 2), ("plain", 0)):
        changes = {"generation__num_prompts": number, "generation__every_n_validations": 2}
        changes |= {"model__optim__overlap_param_sync": True, "model__kto__reference__mode": "cpu_swap"}
        if number:
            lines = run(root, tmp_path / name, run_ranks, 2, **changes)
            assert [line["step"] for line in lines] == [4, 4]
        else:
            with pytest.raises(FileNotFoundError):
                run(root, tmp_path / name, run_ranks, 2, **changes)
    weights = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("asked", "plain")]
    assert weights[0] == weights[1]


def test_a_reference_that_moves_answers_anew(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    """It becomes the policy after every step, so both say the same."""
    changes = {"model__kto__reference__sync_every_n_steps": 1, "model__kto__reference__sync_mixup_alpha": 1.0}
    lines = run(root, tmp_path, run_ranks, 1, **changes)
    assert [line["reference"] for line in lines] == [line["policy"] for line in lines]
    assert [line["policy"] for line in lines[3:]] != greedy(root / "hf", prompts(root))


def test_without_validation_the_end_is_answered(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    lines = run(root, tmp_path, run_ranks, 1, model__data__data_prefix__validation=None)
    assert [line["step"] for line in lines] == [4] * 3
    training = [json.loads(line)["prompt"] for line in (root / "train.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == list(dict.fromkeys(training))[:3]


def test_tensorboard_has_the_answers_as_text(root: Path, tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    lines = run(root, tmp_path, run_ranks, 1, generation__num_prompts=1)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    found = events.Tensors("generations/text_summary")
    assert [event.step for event in found] == [2, 4]
    for event, line in zip(found, lines, strict=True):
        text = event.tensor_proto.string_val[0].decode()
        assert f"| {line['prompt']} | {line['policy']} | {line['reference']} |" in text


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "-m"]


@pytest.mark.parametrize(
    ("launcher", "layout"),
    [(TORCHRUN, ["--tensor-parallel", "2"]), pytest.param([], [], marks=pytest.mark.slow)],
    ids=["two", "one"],
)
def test_the_command_answers_under_any_layout(
    root: Path, tmp_path: Path, run_ranks: Callable[..., Any], launcher: list[str], layout: list[str]
) -> None:
    """A checkpoint of two stages."""
    changes = {"model__pipeline_model_parallel_size": 2, "exp_manager__create_checkpoint_callback": True}
    run(root, tmp_path, run_ranks, 2, **changes)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*-last")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": prompts(root)[2]}) + "\n")
    asked = [str(checkpoint), *prompts(root)[:2], "--file", str(tmp_path / "asked.jsonl")]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "nemo_kto.cli", "generate", *asked, *layout]
        + ["--max-new-tokens", str(NEW_TOKENS), "--json"],
        capture_output=True,
        text=True,
        timeout=HANG,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = zip(prompts(root), greedy(tmp_path / "hf", prompts(root)), strict=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [{"prompt": text, "answer": answer} for text, answer in answers]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["/no/such"], ["There is no prompt"]),
        (["/no/such", "hi"], ["/no/such is not a finished nemo_kto checkpoint"]),
        (["/no/such", "--file", "/no/file.jsonl"], ["/no/file.jsonl", "no such file"]),
        (["/no/such", "hi", "--temperature", "-1"], ["temperature=-1.0", "at least 0"]),
        (["/no/such", "hi", "--top-p", "0"], ["top_p=0.0", "above 0"]),
    ],
)
def test_refused(arguments: list[str], parts: list[str]) -> None:
    options = cli._parser().parse_args(["generate", *arguments])
    with pytest.raises(KTOError) as error:
        options.run(options)
    assert all(part in str(error.value) for part in parts), error.value
