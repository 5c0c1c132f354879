"""`nemo-kto doctor`: it finds what is wrong, says what to do, and says nothing is wrong where nothing is."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_kto import errors
from nemo_kto.cli import main
from nemo_kto.commands import doctor
from tests.commands.test_checkpoint_commands import make

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


def test_parts_that_a_template_leaves_out_are_told(run: Callable[..., Any], tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "I add.", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    turns = [{"role": "user", "content": "1 + 2?"}, call, {"role": "user", "content": "so?"}]
    rows = [{"messages": [*turns, {"role": "assistant", "content": "3"}], "label": label} for label in (True, False)]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, found = run(model__data__data_prefix__train=tmp_path / "calls.jsonl")
    assert ("warning", "in 2 of them, the chat template leaves out a tool call of an earlier answer") in [
        (level, text.partition(".")[0]) for level, text in of(found, "train data")
    ]
