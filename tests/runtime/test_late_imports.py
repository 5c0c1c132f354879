"""Modules that wait until they are needed: they are there, and are what they would have been."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from nemo_kto.runtime.late_imports import LATE, late_imports

WriteModule = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteModule]:
    """Write modules that can be imported in this test only."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str) -> None:
        file = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def is_loaded(module: ModuleType) -> bool:
    return type(module) is ModuleType


def test_waits_until_a_name_is_asked_for(write: WriteModule) -> None:
    write("late_one", "value = 3\ndef double(): return 2 * value\n")
    with late_imports({"late_one": {}}):
        import late_one  # type: ignore[import-not-found]
    assert not is_loaded(late_one) and late_one.__name__ == "late_one" and late_one.__file__
    assert late_one.double() == 6 and is_loaded(late_one)
    assert late_one is sys.modules["late_one"] and late_one.__loader__ is late_one.__spec__.loader
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        late_one.absent  # noqa: B018


def test_from_import_loads_it(write: WriteModule) -> None:
    write("late_two", "value = 3\n")
    with late_imports({"late_two": {}}):
        from late_two import value  # type: ignore[import-not-found]
    assert value == 3 and is_loaded(sys.modules["late_two"])


def test_who_looks_at_every_module_loads_none(write: WriteModule) -> None:
    write("late_three", "raise AssertionError('loaded')\n")
    with late_imports({"late_three": {}}):
        import late_three  # type: ignore[import-not-found]
    inspect.getmodule(inspect.currentframe())
    assert not hasattr(late_three, "__warningregistry__") and not is_loaded(late_three)


def test_version_loads_it(write: WriteModule) -> None:
    write("late_four", "__version__ = '1.2'\n")
    with late_imports({"late_four": {}}):
        import late_four  # type: ignore[import-not-found]
    assert late_four.__version__ == "1.2"


def test_another_module_answers_for_a_name(write: WriteModule) -> None:
    write("late_five.__init__", "from late_five.part import inside\nown = 1\n")
    write("late_five.part", "inside = 2\n")
    with late_imports({"late_five": {"inside": "late_five.part"}}):
        import late_five  # type: ignore[import-not-found]
    assert late_five.inside == 2 and not is_loaded(late_five)
    assert late_five.own == 1 and is_loaded(late_five)


def test_its_submodules_can_be_imported(write: WriteModule) -> None:
    write("late_six.__init__", "raise AssertionError('loaded')\n")
    write("late_six.part", "inside = 2\n")
    with late_imports({"late_six": {}}):
        import late_six.part  # type: ignore[import-not-found]
    assert late_six.part.inside == 2


def test_what_is_not_installed_is_not_found() -> None:
    with late_imports({"late_seven": {}}), pytest.raises(ModuleNotFoundError, match="late_seven"):
        import late_seven  # type: ignore[import-not-found]  # noqa: F401


def test_an_error_in_it_is_raised_when_it_is_needed(write: WriteModule) -> None:
    write("late_eight", "import nowhere_to_be_found\n")
    with late_imports({"late_eight": {}}):
        import late_eight  # type: ignore[import-not-found]
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        late_eight.value  # noqa: B018


def test_others_and_what_comes_later_are_loaded_at_once(write: WriteModule) -> None:
    write("late_nine", "")
    write("late_ten", "")
    with late_imports({"late_nine": {}}):
        import late_ten  # type: ignore[import-not-found]
    import late_nine  # type: ignore[import-not-found]

    assert is_loaded(late_nine) and is_loaded(late_ten)
    assert not any("late_imports" in type(finder).__module__ for finder in sys.meta_path)


@pytest.mark.parametrize("name", list(LATE))
def test_the_real_ones(name: str) -> None:
    """They may be loaded by now; names that another module answers for have to be there."""
    for inside, place in LATE[name].items():
        assert hasattr(importlib.import_module(place), inside)
    assert importlib.import_module(name).__spec__ is not None
