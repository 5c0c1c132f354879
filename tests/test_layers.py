"""A file imports only from its own layer or those below it, and the lower layers stay free of heavy packages."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = {
    "__init__": 0,
    "errors": 0,
    "log_files": 0,
    "quiet": 0,
    "config": 0,
    "config_checks": 0,
    "config_legacy": 0,
    "config_objective_checks": 0,
    "config_reader": 0,
    "algorithms": 1,
    "data": 2,
    "runtime": 3,
    "models": 4,
    "cli": 5,
    "data_commands": 5,
    "evaluate": 5,
    "facts": 5,
    "generate": 5,
    "report": 5,
    "reporting": 5,
    "resolve": 5,
    "resolve_data": 5,
    "resolve_records": 5,
    "resolve_reference": 5,
    "resume": 5,
    "run": 5,
    "train": 5,
}
"""Part of nemo_kto (a folder or a file) -> its layer; examples are above all of them."""

# part -> top-level packages it must not import
FORBIDDEN = {
    "algorithms": {"megatron", "nemo", "lightning", "transformers", "omegaconf", "hydra"},
    "data": {"megatron", "nemo", "omegaconf", "hydra"},
    "config": {"torch", "megatron", "nemo", "lightning", "transformers"},
    "quiet": {"torch", "megatron", "lightning", "transformers"},
    "resolve_records": {"megatron", "nemo", "lightning"},
    "data_commands": {"megatron", "nemo", "lightning"},
    "report": {"torch", "megatron", "nemo", "lightning", "transformers"},
    "reporting": {"torch", "megatron", "nemo", "lightning", "transformers"},
}
# parts that take plain values, never a configuration
WITHOUT_CONFIG = {"algorithms", "data"}
# the only part that reads or sets Megatron's global state
STATEFUL = "runtime"


def imports(source: str) -> list[str]:
    """Return the dotted names a module imports, at any depth of its code."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def part_of(file: Path) -> str:
    return file.relative_to(ROOT / "nemo_kto").with_suffix("").parts[0]


def violations(part: str, source: str) -> list[str]:
    """Return what `source`, in this part of the package, must not import."""
    found = []
    for name in imports(source):
        top, *rest = name.split(".")
        if top == "nemo_kto":
            imported = rest[0] if rest and rest[0] in LAYERS else "__init__"
            if LAYERS[imported] > LAYERS[part] or (part in WITHOUT_CONFIG and imported.startswith("config")):
                found.append(name)
        elif top in FORBIDDEN.get(part, set()) or (part != STATEFUL and "parallel_state" in name.split(".")):
            found.append(name)
    return found


FILES = sorted((ROOT / "nemo_kto").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_only_from_below(file):
    assert part_of(file) in LAYERS, "give the new part a layer"
    assert violations(part_of(file), file.read_text(encoding="utf-8")) == []


def test_nothing_imports_the_examples():
    for file in FILES:
        assert not [name for name in imports(file.read_text(encoding="utf-8")) if name.split(".")[0] == "examples"]


@pytest.mark.parametrize(
    ("part", "source", "found"),
    [
        ("algorithms", "import torch\nfrom nemo_kto.errors import DataError", []),
        ("algorithms", "from nemo_kto.data.batching import KTOBatch", ["nemo_kto.data.batching.KTOBatch"]),
        ("algorithms", "def f():\n    import megatron.core", ["megatron.core"]),
        ("data", "from nemo_kto.config import KTOConfig", ["nemo_kto.config.KTOConfig"]),
        ("models", "from megatron.core import parallel_state", ["megatron.core.parallel_state"]),
        ("runtime", "from megatron.core import parallel_state", []),
        ("models", "from nemo_kto.train import train", ["nemo_kto.train.train"]),
        ("config", "import torch", ["torch"]),
    ],
)
def test_the_check_itself(part, source, found):
    assert violations(part, source) == found
