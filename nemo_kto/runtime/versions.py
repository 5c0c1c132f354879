"""The versions this package has been tried with, in one place; without torch. docs/versions.md says with which tests.

`setup.py` says what may be installed, which is more: a container's own version is kept, and one not tried is told.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from nemo_kto.errors import ConfigError

TESTED = {
    "torch": ">=2.12,<2.14",
    "megatron-core": ">=0.16.1,<0.20",
    "transformers": ">=5.8.1,<5.24",
    "lightning": ">=2.4,<2.6",
    "nemo_toolkit": ">=3.0,<3.1",
}
"""Package -> the range whose ends the tests have run with."""


def untested() -> list[str]:
    """Return what is installed outside of those ranges, as `package version (tested: range)`."""
    found = []
    for package, tested in TESTED.items():
        try:
            there = version(package)
        except PackageNotFoundError:  # its import says so
            continue
        # NVIDIA's images hold commits of what is released later: 2.13.0a0+4c2b2a is taken for 2.13.0
        if not SpecifierSet(tested).contains(Version(there).base_version):
            found.append(f"{package} {there} (tested: {tested})")
    return found


def check_triton() -> None:
    """Raise a ConfigError where Megatron-Core cannot be imported, as 0.18.2 and 0.19 cannot be without triton."""
    if importlib.util.find_spec("triton") is not None:
        return
    try:
        there = version("megatron-core")
    except PackageNotFoundError:  # its import says so
        return
    if Version(there).release > (0, 18, 0):
        raise ConfigError(
            f"megatron-core {there} cannot be imported without triton, which CPU builds of torch do not bring along. "
            "`pip install triton`, or take the megatron-core of constraints.txt."
        )
