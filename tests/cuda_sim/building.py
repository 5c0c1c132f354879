"""Builds `device.cpp`, once for each state of it and each torch; without torch being imported."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
BUILT = FOLDER / "build"
"""What is built; git ignores it."""

NAME = "nemo_kto_simulated_device"
"""Of the module that the extension is."""


class NoDevice(Exception):
    """The extension cannot be had here; the message says why."""


@cache
def build() -> Path:
    """Return the extension, which is compiled unless it has been; several processes may want it at once.

    Raises:
        NoDevice: There is no compiler, or this torch has a CUDA of its own.
        RuntimeError: It does not compile.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        raise NoDevice("no C++ compiler was found")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr,arg-type]
    if any((torch_folder / "lib").glob("libtorch_cuda*")):
        raise NoDevice("this build of torch has CUDA")
    source = FOLDER / "device.cpp"
    versions = f"{importlib.metadata.version('torch')} {sysconfig.get_config_var('SOABI')} {compiler}"
    digest = hashlib.blake2b(source.read_bytes() + versions.encode(), digest_size=8).hexdigest()
    target = BUILT / digest / f"{NAME}.so"
    BUILT.mkdir(exist_ok=True)
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second finds it built
        if not target.exists():
            _compile(compiler, source, target, torch_folder)
    return target


def _compile(compiler: str, source: Path, target: Path, torch_folder: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    includes = [
        torch_folder / "include",
        torch_folder / "include/torch/csrc/api/include",
        sysconfig.get_path("include"),
    ]
    library = torch_folder / "lib"
    command = [
        compiler,
        *("-std=c++20", "-O0", "-fPIC", "-shared"),  # what is slow is compiling
        f"-DTORCH_EXTENSION_NAME={NAME}",
        *(f"-I{folder}" for folder in includes),
        *(str(source), "-o", str(unfinished)),
        *(f"-L{library}", f"-Wl,-rpath,{library}", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source} does not compile:\n{done.stderr}")
    unfinished.replace(target)
