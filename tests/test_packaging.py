"""What an installed package must offer: its configuration, its command, and a fast start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.waiting import HANG

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "nemo_kto", "conf", "docs")


def run_python(
    *arguments: str, cwd: Path = ROOT, path: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANG
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built offline from a copy, so that no build files are left in the repository."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, source / name)
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    built = run_python("-m", "pip", "wheel", *offline, "--wheel-dir", str(target), str(source))
    assert built.returncode == 0, built.stderr
    return next(target.glob("*.whl"))


def test_wheel_has_configuration_command_and_license(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "nemo_kto/conf/gpt_kto.yaml" in names
    assert [name for name in names if name.startswith("nemo_kto/docs/")] == ["nemo_kto/docs/configuration.md"]
    assert "nemo_kto/py.typed" in names
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "nemo_kto").rglob("*.py")}
    assert len(modules) > 50 and modules <= set(names)
    assert not [name for name in names if name.startswith(("tests", "examples"))]
    assert any(name.endswith("LICENSE") for name in names)
    assert "nemo-kto = nemo_kto.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata or "License: Apache-2.0" in metadata


def test_installed_package_finds_its_configuration(wheel, tmp_path):
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    program = "from nemo_kto.config.folders import config_dir; print(config_dir())"
    found = run_python("-c", program, cwd=tmp_path, path=installed)
    assert found.stdout.strip() == str(installed / "nemo_kto" / "conf"), found.stderr
    assert (installed / "nemo_kto" / "conf" / "gpt_kto.yaml").read_bytes() == (ROOT / "conf/gpt_kto.yaml").read_bytes()


def test_an_installed_package_explains_its_keys(wheel, tmp_path):
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    explained = run_python("-m", "nemo_kto.cli", "config", "model.optim.lr", cwd=tmp_path, path=installed)
    assert explained.returncode == 0 and "takes a number" in explained.stdout, explained.stderr


def test_help_imports_nothing_but_this_package():
    """It is to be there at once, which it is as long as Python's own modules are all that it needs."""
    program = """
import runpy, sys
before = set(sys.modules)
sys.argv = ["nemo-kto", "--help"]
try:
    runpy.run_module("nemo_kto.cli", run_name="__main__")
finally:
    found = {name.partition(".")[0] for name in set(sys.modules) - before}
    print(*sorted(found - sys.stdlib_module_names - {"__mp_main__"}), file=sys.stderr)  # multiprocessing's alias
"""
    shown = run_python("-c", program)
    assert shown.returncode == 0 and "export-hf" in shown.stdout
    assert shown.stderr == "nemo_kto\n"


def test_an_error_is_one_line(tmp_path):
    checkpoint = tmp_path / "none"
    failed = run_python("-m", "nemo_kto.cli", "export-hf", str(checkpoint), str(tmp_path / "out"))
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith(f"error: {checkpoint}")
    assert failed.stderr.count("\n") == 1


def test_an_error_has_a_traceback_on_request():
    program = """
from nemo_kto.errors import ConfigError, run_guarded

def fail():
    raise ConfigError("broken")

run_guarded(fail)
"""
    plain, full = run_python("-c", program), run_python("-c", program, HYDRA_FULL_ERROR="1")
    assert plain.stderr == "error: broken\n"
    assert full.stderr.startswith("Traceback") and full.stderr.endswith("error: broken\n")
    assert plain.returncode == full.returncode == 1


def test_another_rank_repeats_an_error_only_where_the_first_has_not_ended_with_it():
    program = """
import os, sys
from nemo_kto import errors

errors._PEER_DELAY = 0
print("started", flush=True)
while "orphan" in sys.argv and os.getppid() == errors._PARENT:
    os.sched_yield()

def fail():
    raise errors.DataError("broken")

errors.run_guarded(fail)
"""
    leaving = """
import subprocess, sys
other = subprocess.Popen([sys.executable, "-c", sys.argv[1], "orphan"], stdout=subprocess.PIPE, text=True)
print(other.stdout.readline(), end="")
"""
    repeats = run_python("-c", program, LOCAL_RANK="1")
    assert (repeats.returncode, repeats.stdout, repeats.stderr) == (1, "started\n", "[rank 1] error: broken\n")
    silent = run_python("-c", leaving, program, LOCAL_RANK="1")
    assert (silent.stdout, silent.stderr) == ("started\n", "")
