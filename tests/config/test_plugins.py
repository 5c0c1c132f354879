"""What is named by dotted path: found where Python looks and in the current folder, or an error that says it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_kto.algorithms.losses import LOSSES
from nemo_kto.config import plugins
from nemo_kto.config.compose import load_config
from nemo_kto.config.objective_checks import has_kl_set
from nemo_kto.config.plugins import check_callbacks, check_functions, load_object
from nemo_kto.config.schema import KTOLossConfig
from nemo_kto.errors import ConfigError

MODULE = """
number = 3

class Maker:
    @staticmethod
    def make():
        return None

def read(path):
    return []

def loss(log_ratios, desirable, baseline, *, beta, desirable_weight=1.0, undesirable_weight=1.0):
    return log_ratios, log_ratios

def loss_without_weights(log_ratios, desirable, baseline, *, beta):
    return log_ratios, log_ratios
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a package, a module that cannot be imported, and one whose import is missing."""
    (tmp_path / "plugged").mkdir()
    (tmp_path / "plugged" / "__init__.py").write_text("")
    (tmp_path / "plugged" / "inner.py").write_text(MODULE)
    (tmp_path / "plugged" / "broken.py").write_text("1 / 0")
    (tmp_path / "plugged" / "lacking.py").write_text("import no_such_dependency")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "plugged"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_module_of_the_current_folder_is_found_and_hides_nothing(here: Path) -> None:
    (here / "json.py").write_text("raise AssertionError('the wrong json')")
    assert load_object("plugged.inner.number", key="some.key") == 3
    assert sys.path[-1] == str(here)
    assert load_object("json.decoder.JSONDecoder", key="some.key").__module__ == "json.decoder"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("my_package.Callback", ["no module 'my_package'", "PYTHONPATH"]),
        ("plugged.outer.read", ["plugged (", "has no 'outer'"]),
        ("plugged.inner.Maker.mke", ["plugged.inner.Maker has no 'mke'. Did you mean plugged.inner.Maker.make?"]),
        ("plugged.inner.raed", ["plugged.inner", "no 'raed'", "Did you mean plugged.inner.read?"]),
        ("plugged.broken.read", ["'plugged.broken' cannot be imported", "ZeroDivisionError"]),
        ("plugged.lacking.read", ["'plugged.lacking' cannot be imported", "no_such_dependency"]),
        ("plugged", ["no dotted path"]),
        ("plugged.inner.", ["no dotted path"]),
    ],
)
def test_what_is_not_there(here: Path, path: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_object(path, key="some.key")
    for words in (f"some.key={path}", *said):
        assert words in str(caught.value)
    if path == "my_package.Callback":
        assert str(here) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            {"trainer.callbacks": [{"_target_": "plugged.inner.Nothing"}]},
            "trainer.callbacks[0]._target_=plugged.inner.No",
        ),
        ({"model.data.reader": "plugged.inner.number"}, "model.data.reader=plugged.inner.number is no function"),
        ({"model.kto.loss": "plugged.inner.lss"}, "Did you mean plugged.inner.loss?"),
        ({"model.kto.loss": "plugged.inner.loss_without_weights"}, "the keywords beta, desirable_weight"),
    ],
)
def test_each_place_is_checked(override: dict[str, object], said: str) -> None:
    config = load_config(override)
    with pytest.raises(ConfigError) as caught:
        check_callbacks(config)
        check_functions(config)
    assert said in str(caught.value)


def test_what_is_there_passes() -> None:
    named = {"model.data.reader": "plugged.inner.read", "model.kto.loss": "plugged.inner.loss"}
    made = {"trainer.callbacks": [{"_target_": "plugged.inner.Maker.make"}]}
    for config in (load_config({**named, **made}), load_config()):
        check_callbacks(config)
        check_functions(config)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.callbacks=[{target: plugged.X}]", "Write {_target_: my_package.MyCallback}"),
        ("trainer.callbacks=[plugged.X]", "a mapping or a list of mappings"),
        ("model.kto.loss=dpo", "kto, apo_zero_unpaired, bco, or the dotted path"),
        ("model.data.reader=[a]", "It takes text"),
    ],
)
def test_values_that_name_nothing(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    assert said in str(caught.value)


def test_the_losses_that_need_no_path_are_those_of_the_table() -> None:
    assert set(plugins.LOSSES) == set(LOSSES)
    for name, loss in LOSSES.items():
        assert has_kl_set(KTOLossConfig(loss=name)) is (loss.baseline == "kl")
    assert has_kl_set(KTOLossConfig(loss="my_package.my_loss"))
