"""A file imports only from its own layer or those below it, in no circle; the lower layers import nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = {
    "__init__": 0,
    "errors": 0,
    "quiet": 0,
    "stopping": 0,
    "config": 0,
    "algorithms": 1,
    "data": 2,
    "data.reading": 2,
    "data.tokens": 2,
    "data.batches": 2,
    "runtime": 3,
    "network": 4,
    "network.families": 4,
    "weights": 5,
    "kto": 6,
    "generation": 6,
    "runs": 7,
    "reporting": 7,
    "planning": 7,
    "commands": 8,
    "cli": 8,
}
"""Part of nemo_kto (a folder, or a file at the top) -> its layer; examples are above all of them."""

HEAVY = {"torch", "megatron", "nemo", "lightning", "transformers"}
# part -> packages it must not import, not even in a function
FORBIDDEN = {
    "config": HEAVY,
    "algorithms": {"megatron", "nemo", "lightning", "transformers", "omegaconf", "hydra"},
    "data": {"megatron", "nemo", "omegaconf", "hydra"},
    "data.reading": {*HEAVY, "omegaconf", "hydra"},
    "data.tokens": {"megatron", "nemo", "lightning", "omegaconf", "hydra"},
    "data.batches": {"megatron", "nemo", "omegaconf", "hydra"},
    "network.families": HEAVY - {"torch"},
    "reporting": HEAVY,
}
# of parts of the same layer: part -> those that it must not import
APART = {
    "data.reading": {"data.tokens", "data.batches"},
    "data.tokens": {"data.batches"},
    "kto": {"generation"},
    "reporting": {"runs"},
}
# parts that take plain values, never a configuration
WITHOUT_CONFIG = {"algorithms", "data", "data.reading", "data.tokens", "data.batches", "network", "network.families"}
# the only part that reads or sets Megatron's global state
STATEFUL = "runtime"
# what is judged before anything heavy is loaded
LIGHT = (
    "nemo_kto",
    "nemo_kto.cli",
    "nemo_kto.config.compose",
    "nemo_kto.runs.early",
    "nemo_kto.network.families.llama",
)


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


def part_of(names: list[str]) -> str:
    """Return the part that the module with these names, below nemo_kto, is in."""
    return next((part for part in (".".join(names[:2]), names[0] if names else "") if part in LAYERS), "__init__")


def part_of_file(file: Path) -> str:
    names = list(file.relative_to(ROOT / "nemo_kto").with_suffix("").parts)
    assert names[0] in LAYERS, "give the new part a layer"
    return part_of(names)


def violations(part: str, source: str) -> list[str]:
    """Return what `source`, in this part of the package, must not import."""
    found = []
    for name in imports(source):
        top, *rest = name.split(".")
        if top == "nemo_kto":
            imported = part_of(rest)
            above = LAYERS[imported] > LAYERS[part] or imported in APART.get(part, ())
            if above or (part in WITHOUT_CONFIG and imported == "config"):
                found.append(name)
        elif top in FORBIDDEN.get(part, set()) or (part != STATEFUL and "parallel_state" in name.split(".")):
            found.append(name)
    return found


FILES = sorted((ROOT / "nemo_kto").rglob("*.py"))
# the list of public names is above everything, and below it what every part may ask for, such as the version
ROOMS = [file for file in FILES if file != ROOT / "nemo_kto" / "__init__.py"]


@pytest.mark.parametrize("file", ROOMS, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_only_from_below(file):
    assert violations(part_of_file(file), file.read_text(encoding="utf-8")) == []


def test_nothing_imports_the_examples():
    for file in FILES:
        assert not [name for name in imports(file.read_text(encoding="utf-8")) if name.split(".")[0] == "examples"]


@pytest.mark.parametrize(
    ("part", "source", "found"),
    [
        ("algorithms", "import torch\nfrom nemo_kto.errors import DataError", []),
        ("algorithms", "from nemo_kto.data.batches.dealing import Dealer", ["nemo_kto.data.batches.dealing.Dealer"]),
        ("algorithms", "def f():\n    import megatron.core", ["megatron.core"]),
        ("data", "from nemo_kto.config.schema import KTOConfig", ["nemo_kto.config.schema.KTOConfig"]),
        ("data.reading", "from nemo_kto.data.tokens import cache", ["nemo_kto.data.tokens.cache"]),
        ("data.batches", "from nemo_kto.data.tokens import cache", []),
        ("network", "from megatron.core import parallel_state", ["megatron.core.parallel_state"]),
        ("runtime", "from megatron.core import parallel_state", []),
        ("kto", "from nemo_kto.commands.train import train", ["nemo_kto.commands.train.train"]),
        ("kto", "from nemo_kto.generation.answers import X", ["nemo_kto.generation.answers.X"]),
        ("config", "import torch", ["torch"]),
    ],
)
def test_the_check_itself(part, source, found):
    assert violations(part, source) == found


def module_name(file: Path) -> str:
    names = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def needed_when_loaded(source: str, modules: set[str]) -> set[str]:
    """Return which of `modules` a module imports, those left out that only a type checker or a call imports."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else node.module for name in names}
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found & modules


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Yield the ways from a node back to itself that a walk through the graph finds."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> Iterator[list[str]]:
        if node in path:
            yield [*path[path.index(node) :], node]
        elif node not in done:
            for following in sorted(graph[node]):
                yield from walk(following, [*path, node])
            done.add(node)

    for node in sorted(graph):
        yield from walk(node, [])


def test_modules_import_each_other_in_no_circle():
    modules = {module_name(file) for file in FILES}
    graph = {module_name(file): needed_when_loaded(file.read_text(encoding="utf-8"), modules) for file in FILES}
    assert sum(map(len, graph.values())) > 200, "the imports are not found any more"
    assert list(circles(graph)) == []


def test_packages_import_each_other_in_no_circle():
    """Imports that a call makes count too: what a room needs at any time is below it."""
    graph: dict[str, set[str]] = {part: set() for part in LAYERS}
    for file in FILES:
        part = part_of_file(file)
        names = (name.split(".") for name in imports(file.read_text(encoding="utf-8")))
        graph[part] |= {part_of(rest) for top, *rest in names if top == "nemo_kto"} - {part, "__init__"}
    # the public names of the package are loaded from everywhere; a family's file is an entry of its room's table
    graph["__init__"] = set()
    graph["network.families"] -= {"network"}
    assert list(circles(graph)) == []


def test_circles_are_found():
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == [["b", "c", "b"]]
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": set()})) == []
    source = (
        "from nemo_kto.b import x\n"
        "if TYPE_CHECKING:\n    from nemo_kto.c import y\n"
        "def f():\n    from nemo_kto.d import z"
    )
    assert needed_when_loaded(source, {"nemo_kto.b", "nemo_kto.c", "nemo_kto.d"}) == {"nemo_kto.b"}


FAMILIES = sorted(
    file.stem for file in (ROOT / "nemo_kto" / "network" / "families").glob("*.py") if file.stem[0] != "_"
)


def named_families(source: str) -> list[str]:
    """Return the texts of a module, docstrings apart, that are names of families."""
    tree = ast.parse(source)
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in FAMILIES]


def test_a_family_is_named_by_its_own_file_only():
    """Nothing else compares `model_type` with a name, so a new family is one new file."""
    assert {"llama", "qwen3_moe", "phi3", "smollm3"} <= set(FAMILIES)
    assert named_families('x = hf.model_type == "phi3"') == ["phi3"]
    for file in FILES:
        assert named_families(file.read_text(encoding="utf-8")) == [], file


@pytest.mark.parametrize("module", LIGHT)
def test_what_is_judged_first_loads_nothing_heavy(module):
    program = f"import sys, {module}; print(sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "'nemo_kto'" in loaded
    assert not [name for name in HEAVY if f"'{name}'" in loaded]
