"""The script of docs/python.md runs as it is printed, and the page names what is public."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import nemo_kto
from nemo_kto.algorithms.losses import kto_loss
from tests.waiting import HANG

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
LOSSES = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
SCRIPT = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "__main__" in block)


def run_script(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script, kept in `folder`, in the root of the clone, where the page says it is run."""
    file = folder / "script.py"
    file.write_text(script.replace("results/from_python", str(folder / "run")), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(file)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG
    )


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_script(tmp_path: Path, devices: int) -> None:
    steps = '"trainer.kto.max_steps": 3,'
    assert steps in SCRIPT
    layout = f'"trainer.devices": {devices}, "model.tensor_model_parallel_size": {devices},'
    done = run_script(tmp_path, SCRIPT.replace(steps, f"{steps} {layout}"))
    assert done.returncode == 0, done.stderr
    assert "Unknown configuration key model.micro_batch_sise. Did you mean model.micro_batch_size?" in done.stdout
    expected = kto_loss(torch.tensor([0.5, -0.2]), torch.tensor([True, False]), torch.tensor(0.1), beta=0.2)
    assert f"losses {expected.losses.tolist()}" in done.stdout
    assert "samples [[5, 6, 7, 8, 2], [9, 10, 2, 2, 2]] with the next response" in done.stdout
    assert "held-out loss 0." in done.stdout
    assert "[NeMo" not in done.stdout + done.stderr and "UserWarning" not in done.stderr
    exported = [AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name) for name in ("hf", "again")]
    for one, other in zip(*(model.state_dict().values() for model in exported), strict=True):
        assert torch.equal(one, other)


def test_the_page_names_what_is_public() -> None:
    named = set(re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE))
    assert named == set(nemo_kto.__all__) == set(nemo_kto._MODULE_OF)
    for name in nemo_kto.__all__:
        assert getattr(nemo_kto, name).__name__ == name
        assert name in dir(nemo_kto)
    with pytest.raises(AttributeError, match="no attribute 'Train'"):
        nemo_kto.Train  # noqa: B018


def test_importing_the_package_loads_next_to_nothing() -> None:
    program = "import sys; before = set(sys.modules); import nemo_kto; print(*sorted(set(sys.modules) - before))"
    shown = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = [name for name in shown.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names]
    assert loaded == ["nemo_kto", "nemo_kto.quiet"]


def test_the_loss_of_the_losses_page_by_hand() -> None:
    """Thumbs up: r - z = 0.4, 1 - 0.5 * 0.4 = 0.8; thumbs down: z - r = 0.3, 2 * (1 - 0.5 * 0.3) = 1.7."""
    (block,) = re.findall(r"```python\n(.*?)```", LOSSES, re.DOTALL)
    names: dict[str, object] = {}
    exec(block, names)
    arguments = torch.tensor([0.5, -0.2]), torch.tensor([True, False]), torch.tensor(0.1)
    losses, rewards = names["hinge"](*arguments, beta=0.5, undesirable_weight=2.0)  # type: ignore[operator]
    assert losses.tolist() == pytest.approx([0.8, 1.7])
    assert rewards.tolist() == pytest.approx([0.25, -0.1])
