"""The pictures in docs/ are what their script draws, and its curves are the paper's, by hand."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest
import torch

from nemo_kto.algorithms.losses import LOSSES, kto_loss

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_pictures", DOCS / "tools" / "draw_pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_as_drawn(script: ModuleType, tmp_path: Path) -> None:
    script.main(tmp_path)
    assert {*script.PICTURES} == {path.name for path in tmp_path.iterdir()}
    for name in script.PICTURES:
        kept = (DOCS / "pictures" / name).read_text()
        if f"Matplotlib v{matplotlib.__version__}," in kept:  # another version places things otherwise
            assert (tmp_path / name).read_text() == kept, f"python docs/tools/draw_pictures.py draws {name} otherwise"


def test_every_picture_is_shown() -> None:
    pages = "".join(path.read_text() for path in [*DOCS.glob("*.md"), DOCS.parent / "README.md"])
    assert not [path.name for path in (DOCS / "pictures").iterdir() if f"pictures/{path.name}" not in pages]


def test_a_curve_by_hand(script: ModuleType) -> None:
    """Thumbs up at r = z: 1 - sigmoid(0), and beta / 4 falling; at r = z - 10 with beta 0.2: 1 - sigmoid(-2)."""
    losses, slope = script.loss_curve(kto_loss, desirable=True, baseline=10.0, beta=0.2)
    at = {round(float(ratio), 1): place for place, ratio in enumerate(script.LOG_RATIOS)}
    assert losses[at[10.0]].item() == pytest.approx(0.5)
    assert slope[at[10.0]].item() == pytest.approx(-0.05)
    assert losses[at[0.0]].item() == pytest.approx(1 - 1 / (1 + math.exp(2)))


def test_what_the_page_says_of_the_losses(script: ModuleType) -> None:
    """bco's slope is beta on the wrong side; those of the others are nothing there."""
    for name, loss in LOSSES.items():
        _, slope = script.loss_curve(loss.function, desirable=False, baseline=10.0)
        assert torch.isclose(slope[-1], torch.tensor(0.2 if name == "bco" else 0.0), atol=1e-3)
