"""`nemo-kto doctor`: it finds what is wrong, says what to do, and says nothing is wrong where nothing is."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_kto import errors
from nemo_kto.cli import main
from nemo_kto.commands import doctor, doctor_places
from nemo_kto.runtime import log_lock, space
from nemo_kto.runtime.processes import this_process
from nemo_kto.runtime.versions import TESTED
from tests.commands.test_checkpoint_commands import make
from tests.faults.forked_commands import ForkedCommand

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "nlp" / "kto" / "quickstart"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run the command over a configuration that works, with some keys changed; return (exit code, findings)."""
    for name in ("MASTER_PORT", "MASTER_ADDR", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(errors, "_leave", lambda: pytest.fail("an error ended the command"))

    def call(**changes: Any) -> tuple[int, list[dict[str, str]]]:
        values = {
            "pretrained_checkpoint.restore_from_path": QUICKSTART / "model",
            "model.data.data_prefix.train": QUICKSTART / "data" / "train.jsonl",
            "exp_manager.explicit_log_dir": tmp_path / "log",
            "trainer.accelerator": "cpu",
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        code = 0
        try:
            main(["doctor", "--json", *(f"{key}={value}" for key, value in values.items())])
        except SystemExit as end:
            code = int(end.code or 0)
        return code, json.loads(capsys.readouterr().out)

    return call


def of(findings: list[dict[str, str]], topic: str) -> list[tuple[str, str]]:
    return [(one["level"], one["text"]) for one in findings if one["topic"] == topic]


def test_nothing_is_wrong(run: Callable[..., Any], tmp_path: Path) -> None:
    code, found = run()
    assert code == 0 and not [one for one in found if one["level"] == "error"]
    assert of(found, "model") == [("ok", "llama, 4 layers")]
    (data,) = of(found, "train data")
    # counted by hand in the first 256 lines
    lines = (QUICKSTART / "data" / "train.jsonl").read_text().splitlines()[:256]
    up = sum(json.loads(line)["label"] for line in lines)
    assert data[0] == "ok" and f"{up} thumbs up and {256 - up} down" in data[1]
    assert not (tmp_path / "log").exists()


def test_what_is_wrong_is_found_together(run: Callable[..., Any], tmp_path: Path) -> None:
    """One topic does not hide the others."""
    model = Path(shutil.copytree(QUICKSTART / "model", tmp_path / "model"))
    (model / "model.safetensors").write_bytes(b"x")
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}], "label": True}
        for text in ("b", "")
    ]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    damaged = make(tmp_path / "log", 4)
    (damaged / "common.pt").unlink()
    make(tmp_path / "log", 2)
    code, found = run(
        pretrained_checkpoint__restore_from_path=model, model__data__data_prefix__train=tmp_path / "bad.jsonl"
    )
    assert code == 1
    ((level, text),) = of(found, "model")
    assert level == "error" and str(model / "model.safetensors") in text
    levels = [level for level, _ in of(found, "train data")]
    assert levels == ["error", "ok", "warning"] and "1 of the first 2 records" in of(found, "train data")[0][1]
    assert of(found, "checkpoint") == [
        ("warning", f"{damaged.name} is damaged: common.pt is missing"),
        ("ok", "the run goes on from run-step=2-last"),
    ]


@pytest.mark.parametrize(
    ("changes", "topic", "text"),
    [
        ({"model__seeed": 1}, "configuration", "Did you mean model.seed?"),
        ({"trainer__devices": 3, "model__tensor_model_parallel_size": 3}, "configuration", "cannot be divided"),
        ({"model__data__data_prefix__train": "none.jsonl"}, "configuration", "no such file"),
    ],
)
def test_a_configuration_that_cannot_work(run: Callable[..., Any], changes: Any, topic: str, text: str) -> None:
    code, found = run(**changes)
    ((level, said),) = of(found, topic)
    assert code == 1 and level == "error" and text in said


def test_a_port_that_is_taken(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        code, found = run()
    ((level, text),) = of(found, "port")
    assert code == 1 and level == "error" and f"MASTER_PORT={port}" in text


def test_packages_that_do_not_fit(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "no-such-package", 'pytest>=99; extra == "dev"'])
    code, found = run()
    wrong = [text for level, text in of(found, "versions") if level == "error"]
    assert code == 1 and len(wrong) == 2
    assert "where >=99 is needed" in wrong[0] and wrong[1].startswith("no-such-package is missing")


def test_packages_that_were_not_tested(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning; one that may not be installed at all is an error, and said once."""
    monkeypatch.setattr(doctor, "requires", lambda _: ["lightning>=99"])
    monkeypatch.setattr(doctor, "untested", lambda: ["torch 3.1 (tested: <3)", "lightning 2.9 (tested: <2.6)"])
    code, found = run()
    said = of(found, "versions")
    assert code == 1 and [text.split()[0] for level, text in said if level == "error"] == ["lightning"]
    (warning,) = [text for level, text in said if level == "warning"]
    assert warning == "torch 3.1 (tested: <3). It may work; docs/versions.md says what was tried."
    assert {text.split()[0] for level, text in said if level == "ok"} == set(TESTED) - {"torch", "lightning"}


def test_parts_that_a_template_leaves_out_are_told(run: Callable[..., Any], tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "I add.", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    turns = [{"role": "user", "content": "1 + 2?"}, call, {"role": "user", "content": "so?"}]
    rows = [{"messages": [*turns, {"role": "assistant", "content": "3"}], "label": label} for label in (True, False)]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, found = run(model__data__data_prefix__train=tmp_path / "calls.jsonl")
    assert ("warning", "in 2 of them, the chat template leaves out a tool call of an earlier answer") in [
        (level, text.partition(".")[0]) for level, text in of(found, "train data")
    ]


def lock_of(log_dir: Path, *, age: float = 0.0, **changes: Any) -> None:
    """Make the lock of a run: of this process but for `changes`, touched so many seconds ago."""
    (log_dir / "lock").mkdir(parents=True)
    owner = log_dir / "lock" / "owner.json"
    owner.write_text(json.dumps({**dataclasses.asdict(this_process()), "lock": "lock-1", **changes}))
    touched = owner.stat().st_mtime - age
    os.utime(owner, (touched, touched))


ELSEWHERE = {"machine": "another", "host": "node7", "pid": 12}


@pytest.mark.parametrize(
    ("changes", "age", "level", "said"),
    [
        ({}, 0, "error", "is writing to"),
        ({"born": 1}, 0, "warning", "is gone; the next run takes over"),  # another process has its number now
        (ELSEWHERE, 20, "warning", "process 12 on node7) holds it, whose last sign of life is"),
        (ELSEWHERE, 2 * log_lock._LONG_AGO, "warning", "process 12 on node7) held it and is silent"),
    ],
)
def test_locks(run: Callable[..., Any], tmp_path: Path, changes: Any, age: float, level: str, said: str) -> None:
    lock_of(tmp_path / "log", age=age, **changes)
    code, found = run()
    ((how, text),) = of(found, "lock")
    assert how == level and said in text and code == (level == "error")
    assert of(found, "configuration")[0][0] == "ok" and of(found, "train data")  # the rest is looked at all the same
    assert (tmp_path / "log" / "lock" / "owner.json").exists()


def test_what_is_no_lock_and_a_file_that_stops_runs(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "log" / "lock").mkdir(parents=True)
    (tmp_path / "log" / "STOP").touch()
    code, found = run()
    ((level, text),) = of(found, "lock")
    assert code == 1 and level == "error" and f"{tmp_path / 'log' / 'lock'} is in the way" in text
    assert [level for level, _ in of(found, "log folder")] == ["ok", "warning"]


def numbers_of_quickstart() -> int:
    from safetensors import safe_open

    with safe_open(QUICKSTART / "model" / "model.safetensors", framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


LORA = {
    "model__peft__peft_scheme": "lora",
    "model__peft__lora_tuning__target_modules": "[mlp_fc2]",
    "model__peft__lora_tuning__adapter_dim": 8,
}


@pytest.mark.parametrize("adapters", [False, True])
def test_what_a_run_writes_is_compared_with_what_is_free(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    """In float32: a trained number takes its value, its master copy, and Adam's two moments, 16 bytes."""
    config = json.loads((QUICKSTART / "model" / "config.json").read_text())
    inner, hidden, layers = (config[key] for key in ("intermediate_size", "hidden_size", "num_hidden_layers"))
    trained = layers * 8 * (inner + hidden) if adapters else numbers_of_quickstart()
    checkpoint, export = 16 * trained, 4 * trained
    dtype = {"export__dtype": "float32"}
    changes = {**(LORA if adapters else {}), **dtype}
    code, found = run(**changes)
    assert code == 0 and [level for level, _ in of(found, "disk")] == ["ok", "ok"]
    assert of(found, "disk")[0][1].startswith(f"{space.as_size(2 * checkpoint)} are going to be written to ")
    assert f"checkpoints, {space.as_size(checkpoint)} each and up to 2 at a time" in of(found, "disk")[0][1]
    for free, fits in ((2 * checkpoint + export, True), (2 * checkpoint + export - 1, False)):
        monkeypatch.setattr(space, "free_bytes", lambda place, free=free: free)
        code, found = run(**changes)
        assert code == 0 and ("warning" in [level for level, _ in of(found, "disk")]) == (not fits)


def test_clocks() -> None:
    agree = [("node1", 100.0), ("node2", 100.4), ("node3", 99.5)]
    assert [one.level for one in doctor_places._clocks(agree)] == ["ok"]
    found = list(doctor_places._clocks([*agree, ("node4", 40.0), ("node4", 40.1), ("node5", 3700.0)]))
    assert [one.level for one in found] == ["warning", "warning"]
    assert found[0].text.startswith("that of node4 is 60 s behind that of node1")
    assert found[1].text.startswith("that of node5 is 3600 s ahead of that of node1")


def test_ranks_that_torchrun_has_started_meet(tmp_path: Path) -> None:
    keys = {
        "pretrained_checkpoint.restore_from_path": QUICKSTART / "model",
        "model.data.data_prefix.train": QUICKSTART / "data" / "train.jsonl",
        "exp_manager.explicit_log_dir": tmp_path / "log",
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
    }
    arguments = ["doctor", "--json", *(f"{key}={value}" for key, value in keys.items())]
    ended = ForkedCommand(arguments, tmp_path / "printed", ranks=2, TORCHELASTIC_RUN_ID="a").end()
    assert [code for code, _, _ in ended] == [0, 0], ended
    found = json.loads(ended[0][1])
    assert of(found, "ranks") == [("ok", "all 2 have met"), ("ok", "all have the same versions of packages")]
    assert of(found, "clocks") == [("ok", "those of all ranks agree within 1 s")]
    assert not of(found, "port") and not [one for one in found if one["level"] == "error"]
    assert ended[1][1] == ""  # one speaks
