"""The Dockerfile's own commands, as far as they install nothing; the rest: `make test-container`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import packaging
import pytest

from tests.container.run import ROOT, run_instructions

TEXT = (ROOT / "Dockerfile").read_text()
MISSING, INSTALL, CHECK = run_instructions(TEXT)


def holds(folder: Path, **packages: str) -> None:
    """Let an image hold packages of some versions, before those that are there."""
    for name, version in packages.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an instruction with this Python in the image's; what it would write beside the folder goes into it."""
    script = script.replace("/tmp/missing.txt", str(folder / "missing.txt"))
    variables = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": f"{folder}:{folder / 'alone'}"}
    return subprocess.run(["bash", "-ec", script], cwd=folder, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("numpy", ["2.4.6", "1.26.4"])
def test_only_what_is_missing_is_installed(tmp_path: Path, numpy: str) -> None:
    lines = [
        "# a comment",
        "numpy==2.4.6",
        "not-there==1.5",
        'nor-this==1; python_version < "3"',
        "ruff==99",
        "pandas==3",
        "# only `make docs` needs what follows",
        "not-there-either==1",
    ]
    (tmp_path / "constraints.txt").write_text("\n".join(lines) + "\n")
    holds(tmp_path, numpy=numpy, pandas="1.0", pytz="1.0", ml_dtypes="0.1")
    done = run(MISSING, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "missing.txt").read_text().split() == ["not-there==1.5"]


def test_beside_numpy_1_comes_what_takes_it(tmp_path: Path) -> None:
    """By what pandas 3.1 and ml_dtypes 0.6 require, and pyarrow 26 says when it is imported: they want numpy 2."""
    (tmp_path / "constraints.txt").write_text("pandas==3.1.1\nml-dtypes==0.6.0\npyarrow==26.0.1\n")
    holds(tmp_path, numpy="1.26.4")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "packaging").symlink_to(Path(packaging.__file__).parent)
    isolated = MISSING.replace("${PYTHON} -", "${PYTHON} -S -", 1)  # without this Python's own packages
    done = run(isolated, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "missing.txt").read_text().split() == [
        "pandas==2.3.3",
        "ml-dtypes==0.5.4",
        "pyarrow==24.0.0",
        "pytz==2026.2",
    ]


def test_what_does_not_fit_ends_the_build_in_a_sentence(tmp_path: Path) -> None:
    holds(tmp_path, nemo_kto="0.1", numpy="1.26.4", lightning="9.1")
    with (tmp_path / "nemo_kto-0.1.dist-info" / "METADATA").open("a") as file:
        for need in ("not-there>=1", "numpy>=1.26", "lightning>=2.4,<3", 'pytest>=99; extra == "test"'):
            file.write(f"Requires-Dist: {need}\n")
    done = run(CHECK, tmp_path)
    assert done.returncode == 1
    wanted = "this base image does not fit: not-there is missing; lightning<3,>=2.4, found 9.1"
    assert done.stderr.strip() == wanted


def test_root_installs_and_the_bases_user_comes_back() -> None:
    users = [line.split()[1] for line in TEXT.splitlines() if line.startswith("USER ")]
    assert users == ["root", "${RUN_AS}"]
    assert TEXT.index("USER root") < TEXT.index("\nRUN ") and TEXT.rindex("\nRUN ") < TEXT.rindex("USER ")
    assert "--no-deps -r" in INSTALL and INSTALL.count("--no-deps") == 2
