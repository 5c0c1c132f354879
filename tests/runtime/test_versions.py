"""What was tried is said in one place, and what was not is said when it runs."""

from __future__ import annotations

import ast
import logging
import re
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError, KTOError
from nemo_kto.runs.run import prepare
from nemo_kto.runtime import versions
from nemo_kto.runtime.versions import TESTED, check_triton, untested

ROOT = Path(__file__).resolve().parents[2]


def with_versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    """Let packages have some versions; those that are not named have one that was tested."""

    def version(package: str) -> str:
        key = package.replace("-", "_")
        return installed.get(key, TESTED[package].removeprefix(">=").partition(",")[0])

    monkeypatch.setattr(versions, "version", version)


def pinned(file: Path) -> dict[str, str]:
    """Return package -> version of a list of them."""
    lines = (line for line in file.read_text().splitlines() if line and not line.startswith("#"))
    found = [
        (re.sub(r"[-_.]+", "-", name.lower()), rest) for name, _, rest in (line.partition("==") for line in lines)
    ]
    return {name: rest.partition(";")[0].strip() for name, rest in found}


@pytest.mark.parametrize(
    "file",
    [ROOT / "constraints.txt", *sorted((ROOT / "tests" / "container").glob("*.txt"))],
    ids=lambda file: file.name,
)
def test_what_the_tests_run_with_is_in_the_ranges(file: Path) -> None:
    listed = pinned(file)
    named = {package: listed[key] for package in TESTED if (key := package.replace("_", "-")) in listed}
    assert "torch" in named
    for package, version in named.items():
        assert SpecifierSet(TESTED[package]).contains(version), package


def test_the_ranges_may_be_installed_and_are_documented() -> None:
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    (lines,) = [ast.literal_eval(call.value) for call in calls if call.arg == "install_requires"]
    asked = {need.name: need for need in map(Requirement, lines)}
    page = (ROOT / "docs" / "versions.md").read_text()
    for package, tested in TESTED.items():
        for end in SpecifierSet(tested):
            inside = Version(end.version)
            if end.operator == "<":  # the newest before it
                inside = Version(f"{inside.major}.{inside.minor - 1}.99")
            assert asked[package].specifier.contains(inside), (package, end)
        assert f"`{tested}`" in page, package


def test_a_commit_that_precedes_a_release_is_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, torch="2.13.0a0+4c2b2a.nv26.6", megatron_core="0.18.0rc3")
    assert untested() == []


def test_a_run_warns_once_in_a_sentence(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with_versions(monkeypatch, megatron_core="0.97.1", transformers="4.57.0")
    with caplog.at_level(logging.WARNING), pytest.raises(KTOError):  # the configuration names no model
        prepare(KTOConfig())
    (said,) = [record.getMessage() for record in caplog.records if "Not tested" in record.getMessage()]
    ranges = TESTED["megatron-core"], TESTED["transformers"]
    wanted = "Not tested with what is installed: megatron-core 0.97.1 (tested: %s), transformers 4.57.0 (tested: %s); "
    assert said == wanted % ranges + "see docs/versions.md."


def test_nothing_is_said_of_what_was_tested(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with_versions(monkeypatch)
    with caplog.at_level(logging.WARNING), pytest.raises(KTOError):
        prepare(KTOConfig())
    assert "Not tested" not in caplog.text


@pytest.mark.parametrize(
    ("installed", "fits"), [("0.16.1", True), ("0.18.0", True), ("0.18.2", False), ("0.19.2", False)]
)
def test_a_megatron_that_wants_triton(monkeypatch: pytest.MonkeyPatch, installed: str, fits: bool) -> None:
    """As found: 0.18.2 and 0.19.2 import it unasked."""
    with_versions(monkeypatch, megatron_core=installed)
    monkeypatch.setattr(versions.importlib.util, "find_spec", lambda name: None)
    wanted = f"megatron-core {installed} cannot be imported without triton"
    with nullcontext() if fits else pytest.raises(ConfigError, match=wanted):
        check_triton()


def test_what_is_not_there_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(versions, "version", version)
    assert untested() == []
