"""The command as users run it: processes of its own, kills, resuming, export, and wrong input."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_kto.runtime.checkpoint_folders import is_finished, newest_whole
from tests.distributed_harness import free_port
from tests.integration.assets import make_model_folder, read_series, refusal_on_rank, settings, write_feedback
from tests.waiting import HANG

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "nlp" / "kto" / "train_gpt_kto.py"
ENDED = Path(__file__).with_name("killed_run.py")
"""The same, ended from within."""
TP2 = {"trainer__devices": 2, "model__tensor_model_parallel_size": 2}
PP2 = {"trainer__devices": 2, "model__pipeline_model_parallel_size": 2}
WITH_CHECKPOINTS = {
    "exp_manager__create_checkpoint_callback": True,
    "trainer__kto__save_interval": 3,
    "model__make_vocab_size_divisible_by": 64,  # not the default, which export-hf uses
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "it's a=b, [c] {d} ünï"  # for every run: no path has to be quoted
    make_model_folder(folder / "hf")
    write_feedback(folder / "train.jsonl", number=40, seed=1)
    write_feedback(folder / "validation.jsonl", number=9, seed=2)
    return folder


def command(root: Path, log_dir: Path, *, script: Path = SCRIPT, **changes: Any) -> list[str]:
    return [sys.executable, str(script), *as_overrides(settings(root, log_dir, **changes))]


def as_overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def run(arguments: list[str], **environment: str) -> tuple[int, str, str]:
    """Return a command's exit code, output and errors, when it and all its ranks have closed them."""
    ours = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    process = subprocess.Popen(
        arguments,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that it can be killed with all its ranks
    )
    try:
        output, errors = process.communicate(timeout=HANG)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output, errors


SECRETS = {
    name: f"planted_{hashlib.sha256(name.encode()).hexdigest()}"
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "X_PASSWORD",
        "MY_API_KEY",
    )
}
"""Variables of the run below; none of their values is to be found anywhere afterwards."""


def complete_command(root: Path, log_dir: Path) -> list[str]:
    changes = {
        **TP2,
        **WITH_CHECKPOINTS,
        "export__enabled": True,
        "report__enabled": True,
        "generation__num_prompts": 1,
        "model__data__data_prefix__validation": str(root / "validation.jsonl"),
        "trainer__kto__val_check_interval": 5,
        "exp_manager__checkpoint_callback_params__save_top_k": 1,
    }
    return command(root, log_dir, **changes)


@pytest.fixture(scope="module")
def uninterrupted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the log folder of a run under tensor parallelism, with checkpoints and export."""
    log_dir = tmp_path_factory.mktemp("uninterrupted") / 'log=dir, (1) "q"'
    code, output, errors = run(complete_command(root, log_dir), **SECRETS)
    assert code == 0, output + errors
    (log_dir / "output.txt").write_text(output + errors)
    return log_dir


def assert_continues(
    actual: dict[str, dict[int, float]], expected: dict[str, dict[int, float]], *, exactly: bool
) -> None:
    for name in ("train/loss", "train/grad_norm", "train/kl", "train/lr", "train/consumed_samples"):
        assert set(actual[name]) == set(range(10)), name
        if exactly:
            assert actual[name] == expected[name], name
        else:
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=2e-5), name


def test_logs_checkpoints_and_export(uninterrupted: Path, root: Path) -> None:
    checkpoints = uninterrupted / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert len(names) == 2 and sum(name.endswith("-last") for name in names) == 1  # the best one, and the last
    assert all(is_finished(checkpoints / name) for name in names)
    assert newest_whole(checkpoints)[0] == checkpoints / "megatron_gpt-step=10-last"
    series = read_series(uninterrupted)
    assert set(series["val/loss"]) == {4, 9}
    output = (uninterrupted / "output.txt").read_text()
    assert str(uninterrupted / "hf") in output
    assert len(re.findall(r"^First step after [1-9]\d* s$", output, re.MULTILINE)) == 1  # of two processes one

    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "hf")
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / "hf")
    assert tokenizer("red sea").input_ids == AutoTokenizer.from_pretrained(root / "hf")("red sea").input_ids
    before = AutoModelForCausalLM.from_pretrained(root / "hf").state_dict()
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_no_secret_of_the_environment_reaches_a_file(uninterrupted: Path, root: Path) -> None:
    files = [path for folder in (uninterrupted, root) for path in folder.rglob("*") if path.is_file()]
    assert {"report.html", "run.json", "README.md", "generations.jsonl", "output.txt"} <= {path.name for path in files}
    for file in files:
        content = file.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], file


def test_export_of_a_checkpoint_equals_the_export_of_the_run(uninterrupted: Path, tmp_path: Path) -> None:
    last = newest_whole(uninterrupted / "checkpoints")[0]
    code, output, errors = run([sys.executable, "-m", "nemo_kto.cli", "export-hf", str(last), str(tmp_path / "hf")])
    assert code == 0, output + errors
    for file in (uninterrupted / "hf").iterdir():
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_finished_run_only_writes_what_is_missing(root: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and the export."""
    log_dir = Path(shutil.copytree(uninterrupted, tmp_path / "log"))
    shutil.rmtree(log_dir / "hf")
    code, output, errors = run(complete_command(root, log_dir))
    assert code == 0, output + errors
    assert "has taken its 10 steps already" in output
    assert read_series(log_dir) == read_series(uninterrupted)
    for file in (uninterrupted / "hf").iterdir():
        assert (log_dir / "hf" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_command_trains_as_the_script_does(root: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """It starts its second rank itself, and the processes that write checkpoints import it again."""
    _, _, *overrides = command(root, tmp_path, **TP2, **WITH_CHECKPOINTS)
    code, output, errors = run([str(Path(sys.executable).with_name("nemo-kto")), "train", *overrides])
    assert (code, errors) == (0, ""), output + errors
    assert newest_whole(tmp_path / "checkpoints")[0] is not None
    assert_continues(read_series(tmp_path), read_series(uninterrupted), exactly=True)


def test_random_weights_under_torchrun(root: Path, tmp_path: Path) -> None:
    values = settings(root, tmp_path / "log", **{**TP2, "trainer__devices": "auto"}, trainer__kto__max_steps=2)
    del values["pretrained_checkpoint.restore_from_path"]
    sizes = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
    values |= {f"model.{name}": size for name, size in sizes.items()}
    values |= {"model.max_position_embeddings": 64, "model.tokenizer.path": str(root / "hf"), "export.enabled": True}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    code, output, errors = run([*launcher, str(SCRIPT), *as_overrides(values)])
    assert code == 0, output + errors
    assert read_series(tmp_path / "log")["train/loss"][0] == 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "log" / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "log" / "hf")
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None
    assert model.config.num_hidden_layers == 2 and model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("async_save", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_run_continues_as_if_it_had_not_been(
    root: Path, uninterrupted: Path, tmp_path: Path, async_save: bool
) -> None:
    moment = random.uniform(0, 8)  # in one of the first eight steps, in a save, before or after the first checkpoint
    print(f"killed {moment:.2f} steps after the start")
    saving = {**TP2, **WITH_CHECKPOINTS, "exp_manager__checkpoint_callback_params__async_save": async_save}
    code, output, errors = run(command(root, tmp_path, script=ENDED, **saving), KILL_AFTER_STEPS=str(moment))
    assert code == -signal.SIGKILL, output + errors
    code, output, errors = run(command(root, tmp_path, **saving))
    assert code == 0, output + errors
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["megatron_gpt-step=10-last"]
    assert_continues(read_series(tmp_path), read_series(uninterrupted), exactly=True)


@pytest.mark.parametrize("second", [TP2, pytest.param(PP2, marks=pytest.mark.slow)], ids=["TP2", "PP2"])
def test_sigterm_saves_and_another_layout_goes_on(
    root: Path, uninterrupted: Path, tmp_path: Path, second: dict[str, int]
) -> None:
    code, output, errors = run(command(root, tmp_path, script=ENDED, **WITH_CHECKPOINTS), TERMINATE_AT_STEP="4")
    assert code == 75, output + errors
    assert "Stopped at step 5 of 10 (SIGTERM); run the same command to continue" in output
    code, output, errors = run(command(root, tmp_path, **second, **WITH_CHECKPOINTS))
    assert code == 0, output + errors
    assert_continues(read_series(tmp_path), read_series(uninterrupted), exactly=False)


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(root: Path, tmp_path: Path) -> None:
    """It ends when its output does: no process of either rank is left that keeps it open."""
    changes = {**TP2, **WITH_CHECKPOINTS, "trainer__kto__save_interval": 1, "model__optim__lr": 1e30}
    code, output, errors = run(command(root, tmp_path, **changes))
    check_error(code, output, errors, "gradient of step 2 is not finite", ranks=2)
    last = newest_whole(tmp_path / "checkpoints")[0]
    assert last is not None and last.name.endswith("step=1-last")


def write(file: Path, text: str) -> str:
    file.write_text(text)
    return str(file)


def remove(folder: Path, name: str) -> str:
    (folder / name).unlink()
    return str(folder)


def edit_json(folder: Path, name: str, **changes: Any) -> str:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(folder)


GOOD_LINE = json.dumps({"prompt": "red", "response": "sea", "preference": "chosen"})
BAD_DATA = {
    "missing file": (None, "no such file"),
    "empty file": ("", "holds no record"),
    "broken JSON": (f"{GOOD_LINE}\n{{oops\n", ":2"),
    "missing field": (f'{GOOD_LINE}\n{{"prompt": "red", "preference": "chosen"}}\n', "response"),
    "unknown preference": (f"{GOOD_LINE}\n" + GOOD_LINE.replace("chosen", "good") + "\n", "preference"),
    "nothing left": ((GOOD_LINE.replace("red", "red " * 90) + "\n") * 9, "64"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_names_the_place(run_ranks: Any, root: Path, tmp_path: Path, case: str) -> None:
    text, expected = BAD_DATA[case]
    file = tmp_path / "bad.jsonl" if text is None else Path(write(tmp_path / "bad.jsonl", text))
    values = settings(root, tmp_path, model__data__data_prefix__train=str(file))
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), values)
    assert kind == "DataError" and expected in message and str(file) in message, message


BAD_FOLDERS: dict[str, tuple[Callable[[Path], str], str]] = {
    "no weights": (lambda folder: remove(folder, "model.safetensors"), "no weights"),
    "unsupported architecture": (
        lambda folder: edit_json(folder, "config.json", model_type="gpt_bigcode"),
        "gpt_bigcode",
    ),
    "no EOS": (lambda folder: edit_json(folder, "tokenizer_config.json", eos_token=None), "EOS"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_model_folder_is_named(run_ranks: Any, root: Path, tmp_path: Path, case: str) -> None:
    spoil, expected = BAD_FOLDERS[case]
    folder = spoil(Path(shutil.copytree(root / "hf", tmp_path / "hf")))
    values = settings(root, tmp_path / "log", pretrained_checkpoint__restore_from_path=folder)
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), values)
    assert kind != "nothing" and expected in message and folder in message, message


@pytest.mark.parametrize("named", [True, False])
def test_folders_of_others_are_not_overwritten(run_ranks: Any, root: Path, tmp_path: Path, named: bool) -> None:
    foreign = tmp_path / "log" / "hf"
    foreign.mkdir(parents=True)
    (foreign / "model.safetensors").write_text("precious")
    changes = {"export__folder": str(foreign)} if named else {}
    values = settings(root, tmp_path / ("other" if named else "log"), export__enabled=True, **changes)
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), values)
    assert kind == "ConfigError" and str(foreign) in message and "not empty" in message, message
    assert (foreign / "model.safetensors").read_text() == "precious"


def test_bad_data_ends_a_run_of_two_ranks_with_one_line(root: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "bad.jsonl", f"{GOOD_LINE}\n{{oops\n")
    check_refused(command(root, tmp_path, **TP2, model__data__data_prefix__train=file), f"{file}:2")


def test_weights_of_another_model_end_all_ranks(root: Path, tmp_path: Path) -> None:
    """Found only when every rank reads its part: both must end, though the other one may wait for it."""
    folder = shutil.copytree(root / "hf", tmp_path / "hf")
    edit_json(folder, "config.json", num_hidden_layers=6)
    arguments = command(root, tmp_path / "log", **TP2, pretrained_checkpoint__restore_from_path=str(folder))
    check_refused(arguments, "layers", str(folder), ranks=2)


def test_an_unknown_key_ends_with_one_line(root: Path, tmp_path: Path) -> None:
    check_refused(command(root, tmp_path, model__micro_batch_sise=2), "micro_batch_sise", "model.micro_batch_size")


def test_an_impossible_layout_is_refused(run_ranks: Any, root: Path, tmp_path: Path) -> None:
    values = settings(root, tmp_path, model__pipeline_model_parallel_size=3)
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), values)
    assert kind == "ConfigError" and "1 processes" in message and "multiple of 3" in message, message


def check_refused(arguments: list[str], *expected: str, ranks: int = 1) -> None:
    """Run a command that must end with its error and say nothing else."""
    code, output, errors = run(arguments)
    found = check_error(code, output, errors, *expected, ranks=ranks)
    assert len([line for line in errors.splitlines() if line.strip()]) == found, errors


def check_error(code: int, output: str, errors: str, *expected: str, ranks: int) -> int:
    """Check that a command ended with an error that is a user's to mend; return in how many lines it said so.

    One, but with other ranks that is a matter of speed: where the first takes long to end, another says it too, and
    then the launcher kills the first, which may not have come to it. tests/test_packaging.py tests what each does.
    """
    found = re.findall(r"^(\[rank 1\] )?error: (.*)$", errors, re.MULTILINE)
    assert 1 <= len(found) <= ranks and len(dict(found)) == len(found), errors
    assert all(part in message for _, message in found for part in expected), errors
    assert "Traceback" not in output + errors
    assert code == 1 or (code == -signal.SIGKILL and ("[rank 1] ", found[-1][1]) in found), output + errors
    return len(found)


def test_a_reference_is_cached_by_a_job_of_its_own(root: Path, tmp_path: Path) -> None:
    """Under tensor parallelism; training then looks everything up, and a wrong key is one line."""
    short = {"trainer__kto__max_steps": 2, "model__kto__reference__cache_dir": str(tmp_path / "cache")}
    job = [sys.executable, "-m", "nemo_kto.cli", "cache-reference"]
    code, output, errors = run([*job, *as_overrides(settings(root, tmp_path / "log", **TP2, **short))])
    assert code == 0, output + errors
    assert str(tmp_path / "cache") in output and "Reference: 2 of 2 batches\n" in output
    written = sorted((tmp_path / "cache").iterdir())
    code, output, errors = run(command(root, tmp_path / "log", **short, model__kto__reference__mode="cached"))
    assert code == 0, output + errors
    assert read_series(tmp_path / "log")["train/loss"][0] == pytest.approx(0.5, rel=1e-6)
    assert sorted((tmp_path / "cache").iterdir()) == written
    code, _, errors = run([*job, "model.kto.reference.cach_dir=x"])
    assert code == 1 and errors.splitlines()[-1].endswith("Did you mean model.kto.reference.cache_dir?")
