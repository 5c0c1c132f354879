"""What `make test-container` does: an imitation of a container, in which the Dockerfile's own commands are run.

An environment of Python 3.12 gets the versions of `nemo-26.06.txt`; then it is treated as the Dockerfile treats the
image, nothing that was there may have changed, and the tests that touch models and Megatron run in it. What it cannot
show: CUDA, Transformer Engine, and the packages of the image that this one has nothing to do with.

    python tests/container/run.py                          # nvcr.io/nvidia/nemo:26.06
    python tests/container/run.py --image pytorch-26.06    # nvcr.io/nvidia/pytorch:26.06-py3
    python tests/container/run.py --megatron 0.19.2        # the same with another megatron-core
    python tests/container/run.py -- tests/runtime         # other tests
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGES = sorted(file.stem for file in Path(__file__).parent.glob("*.txt"))
TESTS = ["tests/config", "tests/network", "tests/weights", "tests/runtime", "tests/integration"]
NOT_OF_THE_IMAGE = ("hypothesis", "pytest", "pytest-xdist", "execnet", "sortedcontainers")
"""What the tests need besides; installed without dependencies, as the Dockerfile installs."""

KNOWN_CONFLICTS = {
    "opentelemetry": "NeMo's one-logger wants exporters of a newer OpenTelemetry than the image's; it is switched off",
    "lightning": "written for older fsspec and packaging than the image's; both are used through what they still have",
    "nv-one-logger": "see opentelemetry",
    "httpx2": "wanted by a newer hub client than the image's, which has its own",
    "aistore": "wanted by NeMo's readers of speech data, which are not used",
    "pytest-xdist": "a tool of the tests",
}
"""Start of a package's name -> why its line in `pip check` is no fault."""


def main() -> int:
    """Make the environment if need be, run the Dockerfile's commands in it, then the tests; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", choices=IMAGES, default="nemo-26.06", help="what is imitated")
    parser.add_argument("--megatron", help="another version of megatron-core than the image's")
    parser.add_argument("--folder", type=Path, help="the environment; default: .venv-container-<image>")
    parser.add_argument("tests", nargs="*", default=TESTS, help="what pytest is given")
    options = parser.parse_args()
    folder: Path = (options.folder or ROOT / f".venv-container-{options.image}").absolute()
    python = folder / "bin" / "python"
    if not (folder / ".made").exists():
        make_environment(folder, Path(__file__).with_name(f"{options.image}.txt"))
    if options.megatron:
        install(python, "--no-deps", f"megatron-core=={options.megatron}")
    before = versions(python)
    conflicts_before = conflicts(python)
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary) / "nemo_kto"
        copy_clone(clone)
        for script in run_instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
            print("RUN", script.splitlines()[0], flush=True)
            subprocess.run(["bash", "-ec", script], cwd=clone, env=environment(python), check=True)
    after = versions(python)
    changed = {name: (old, after.get(name)) for name, old in before.items() if after.get(name) != old}
    changed.pop("nemo-kto", None)
    if changed:
        print("error: the Dockerfile changed what the image holds:", changed, file=sys.stderr)
        return 1
    print("added:", ", ".join(f"{name} {after[name]}" for name in sorted(after.keys() - before.keys())))
    new = [line for line in conflicts(python) if line not in conflicts_before]
    unknown = [line for line in new if not line.startswith(tuple(KNOWN_CONFLICTS))]
    for line in new:
        print("pip check:", line)
    if unknown:
        print("error: conflicts that nobody has looked at:", *unknown, sep="\n  ", file=sys.stderr)
        return 1
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    if lacking := [name for name in NOT_OF_THE_IMAGE if name not in after]:
        install(python, "--no-deps", *constraints, *lacking)

    command = [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", *options.tests]
    return subprocess.run(
        command, cwd=ROOT, env={**environment(python), "OMP_NUM_THREADS": "1"}, check=False
    ).returncode


def make_environment(folder: Path, lock: Path) -> None:
    """Make an environment of Python 3.12 with what the image holds, as a file lists it."""
    interpreter = os.environ.get("PYTHON312") or shutil.which("python3.12")
    if interpreter is None:
        raise SystemExit("error: no python3.12 found; install one, or name it in PYTHON312")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    torch = next(line for line in lock.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    install(python, torch)  # with the libraries that it cannot be imported without
    install(python, "--no-deps", "--requirement", str(lock))  # which does not agree with itself everywhere
    (folder / ".made").touch()


def install(python: Path, *arguments: str) -> None:
    """Run pip."""
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def environment(python: Path) -> dict[str, str]:
    """Return the variables for commands of that Python's environment."""
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHON": str(python), "VIRTUAL_ENV": str(python.parent.parent)}


def copy_clone(target: Path) -> None:
    """Copy what git knows of, as `COPY . .` does with .dockerignore."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def run_instructions(dockerfile: str) -> list[str]:
    """Return the scripts of a Dockerfile's RUN instructions, here-documents and continued lines included."""
    scripts, lines = [], iter(dockerfile.splitlines())
    for line in lines:
        if not line.startswith("RUN "):
            continue
        script = line.removeprefix("RUN ")
        if here := re.search(r"<<'?(\w+)'?", script):
            for line in lines:
                script += f"\n{line}"
                if line == here[1]:
                    break
            script += "\n"
        while script.endswith("\\"):
            script += f"\n{next(lines)}"
        scripts.append(script)
    return scripts


def versions(python: Path) -> dict[str, str]:
    """Return package -> version of an environment."""
    site = next((python.parent.parent / "lib").glob("python*/site-packages"))
    return {
        re.sub(r"[-_.]+", "-", found.metadata["Name"].lower()): found.version
        for found in distributions(path=[str(site)])
    }


def conflicts(python: Path) -> list[str]:
    """Return the lines of `pip check`."""
    done = subprocess.run([python, "-m", "pip", "check"], check=False, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if line != "No broken requirements found."]


if __name__ == "__main__":
    sys.exit(main())
