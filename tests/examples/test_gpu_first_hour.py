"""`benchmarks/gpu_first_hour.sh`, which nobody can run here: what it starts, how it ends, and the page it fills."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_first_hour.sh"
PARTS = ("machine", "tests", "layouts", "attention", "step_1b", "step_8b_lora", "reference_modes", "page")


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """The script on a machine of two GPUs, whose Python notes what it is told, and fails in `attention.py`."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    programs = {
        "nvidia-smi": 'if [ "$1" = --list-gpus ]; then echo "GPU 0: a"; echo "GPU 1: b"; else echo "driver 1"; fi',
        "python": f'echo "$@" >>{tmp_path}/told; echo "output of $1"; case "$*" in *attention.py) exit 3;; esac',
    }
    for name, lines in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
    return tmp_path


def run(node: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{node / 'bin'}:{os.environ['PATH']}"}
    environment.pop("PYTHON", None)
    return subprocess.run([node / "benchmarks" / SCRIPT.name, *parts], env=environment, capture_output=True, text=True)


def told(node: Path) -> list[list[str]]:
    return [line.split() for line in (node / "told").read_text().splitlines()]


def test_a_part_that_fails_does_not_stop_the_others(node: Path) -> None:
    ended = run(node)
    assert ended.returncode == 1
    assert ended.stderr == "error: these parts failed, see results/gpu: attention\n"
    results = node / "results" / "gpu"
    codes = {file.stem: file.read_text().split("\t")[1] for file in results.glob("*.tsv")}
    assert codes == {**dict.fromkeys(PARTS[:-1], "0"), "attention": "3", "page": "0"}
    assert (results / "layouts.txt").read_text() == "output of benchmarks/layouts.py\n"
    assert "driver 1\n" in (results / "machine.txt").read_text()


def test_parts_are_run_in_the_order_given(node: Path) -> None:
    ended = run(node, "page", "layouts")
    assert ended.returncode == 0 and not ended.stderr
    assert told(node) == [["benchmarks/gpu_page.py", "results/gpu"], ["benchmarks/layouts.py"]]


def test_what_cannot_be_run_is_a_sentence(node: Path) -> None:
    assert run(node, "latouts").stderr == f"error: there is no part latouts; there are: {' '.join(PARTS)}\n"
    (node / "bin" / "nvidia-smi").unlink()
    ended = run(node)
    assert ended.returncode == 1
    assert ended.stderr == "error: nvidia-smi lists no GPU; this script is for a machine that has one.\n"
    assert not (node / "told").exists()


ASK_EACH = """
import argparse, json, runpy, sys

parse = argparse.ArgumentParser.parse_args

def only_parse(*arguments, **keywords):
    parse(*arguments, **keywords)
    sys.exit("understood")

argparse.ArgumentParser.parse_args = only_parse
sys.path.insert(0, "benchmarks")
found = []
for program, *options in json.loads(sys.argv[1]):
    sys.argv = [program, *options]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as ended:
        found.append(ended.code)
print(json.dumps(found))
"""
"""Goes as far in each program as its options, in one process: they import the same libraries for ten seconds."""


def test_every_program_knows_its_options(node: Path) -> None:
    run(node)
    programs = [line for line in told(node) if line[0].startswith("benchmarks/")]
    assert len(programs) == len(PARTS) - 2
    ended = subprocess.run([sys.executable, "-c", ASK_EACH, json.dumps(programs)], cwd=ROOT, capture_output=True)
    assert json.loads(ended.stdout.splitlines()[-1]) == ["understood"] * len(programs), ended.stderr.decode()


def test_the_page_is_filled_from_what_was_left(tmp_path: Path) -> None:
    page, parts, results = tmp_path / "gpu.md", tmp_path / "parts", tmp_path / "results"
    shutil.copy(ROOT / "docs" / "gpu.md", page)
    parts.mkdir()
    (parts / "layouts.tsv").write_text("layouts\t0\t90\n")
    results.mkdir()
    machine = {"cpu": "x86", "cores": 4, "memory_gib": 9, "gpus": ["G 1", "G 1"], "threads": 1, "torch": "2.12.0"}
    rows = [{"layout": "TP2", "first loss": 0.5}]
    content = {"benchmark": "layouts-dense", "machine": machine, "rows": rows, "where_the_time_goes": [{"part": "a"}]}
    (results / "a.json").write_text(json.dumps(content))
    on_cpu = {**content, "benchmark": "start_up", "machine": {**machine, "gpus": []}}
    (results / "b.json").write_text(json.dumps(on_cpu))
    program = [sys.executable, "benchmarks/gpu_page.py", str(parts), "--page", str(page), "--results", str(results)]
    for _ in range(2):  # the second time it replaces what the first has written
        subprocess.run(program, cwd=ROOT, check=True, capture_output=True)
    before, _, measured = page.read_text(encoding="utf-8").partition("## Measured\n")
    assert (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").startswith(before)
    assert "2 x G 1; 4 cores (x86), 9 GiB; torch 2.12.0." in measured
    assert "| layouts | 0 | 1.5 |" in measured
    assert "| layout | first loss |\n|---|---|\n| TP2 | 0.5 |" in measured
    assert "Where the time goes:\n\n| part |" in measured
    assert "start_up" not in measured and measured.count("### layouts-dense") == 1
