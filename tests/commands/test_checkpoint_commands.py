"""`nemo-kto checkpoint`: what it says of whole, damaged and unfinished checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_kto import errors
from nemo_kto.cli import main
from nemo_kto.runtime.checkpoint_manifest import write_manifest


def make(folder: Path, step: int, *, kind: str = "last") -> Path:
    checkpoint = folder / "checkpoints" / f"run-step={step}-{kind}"
    checkpoint.mkdir(parents=True)
    for name in ("metadata.json", ".metadata", "common.pt", "__0_0.distcp"):
        (checkpoint / name).write_bytes(bytes(1000))
    write_manifest(checkpoint, {})
    return checkpoint


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Return a log folder with a checkpoint in each state; the newest whole one is of step 4."""
    make(tmp_path, 2, kind="val_loss=0.5")
    make(tmp_path, 4)
    (make(tmp_path, 6) / "manifest.json").unlink()
    (make(tmp_path, 8) / "__0_0.distcp").write_bytes(bytes(999))
    flipped = make(tmp_path, 10)
    (flipped / "__0_0.distcp").write_bytes(bytes(999) + b"\1")
    unfinished = make(tmp_path, 12)
    unfinished.with_name(unfinished.name + "-unfinished").touch()
    (tmp_path / "damaged_checkpoints" / "run-step=3-last").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "200")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(errors, "_leave", leave)  # a real one ends this process

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = 0
        try:
            main(["checkpoint", *map(str, arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.mark.parametrize(("action", "of_ten", "code"), [("list", "whole", 0), ("verify", "damaged", 1)])
def test_states(run: Any, log: Path, action: str, of_ten: str, code: int) -> None:
    """A flipped bit is found by reading the files only."""
    ended, output, _ = run(action, log, "--json")
    found = json.loads(output)
    assert ended == code
    assert [(one["step"], one["state"]) for one in found] == [
        (12, "unfinished"),
        (10, of_ten),
        (8, "damaged"),
        (6, "unverifiable"),
        (4, "whole"),
        (2, "whole"),
    ]
    assert found[2]["fault"] == "__0_0.distcp has 999 bytes, not the 1,000 it was written with"
    assert found[3]["bytes"] == 4000


def test_what_a_person_reads(run: Any, log: Path) -> None:
    code, output, _ = run("verify", log)
    assert code == 1 and "A run goes on from run-step=6-last." in output
    assert "damaged: __0_0.distcp is not what was written" in output and "1 damaged before are in" in output
    assert run("list", log / "checkpoints")[0] == 0


def test_a_folder_without_checkpoints(run: Any, tmp_path: Path) -> None:
    code, _, error = run("list", tmp_path)
    assert code == 1 and f"{tmp_path} holds no checkpoints" in error
