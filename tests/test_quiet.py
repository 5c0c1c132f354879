"""Start-up of NeMo, Lightning and Megatron prints nothing, and what this package says is never hidden."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.waiting import HANG

ROOT = Path(__file__).resolve().parents[1]

IMPORTS = """
from nemo_kto.quiet import silence_loaded_packages, silence_startup_noise
silence_startup_noise()
import lightning.pytorch, nemo.utils.exp_manager, megatron.core
import nemo_kto.commands.train
silence_loaded_packages()
"""

OURS = """
import logging, warnings
warnings.warn_explicit("our warning", UserWarning, "records.py", 3, module="nemo_kto.data.records")
warnings.warn_explicit("a user's warning", UserWarning, "script.py", 3, module="__main__")
logging.getLogger("nemo_kto.config").warning("our log line")
"""

WITHOUT_GPU = """
import logging
from torch.utils import cpp_extension
cpp_extension.logger.warning("No CUDA runtime is found, using CUDA_HOME='/usr/local'")
"""


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("NEMO_KTO_VERBOSE", "PYTHONWARNINGS")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=HANG
    )


def test_imports_are_silent_and_own_messages_stay():
    done = run(IMPORTS + WITHOUT_GPU + OURS)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "records.py:3: UserWarning: our warning",
        "script.py:3: UserWarning: a user's warning",
        "our log line",
    ]


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="Megatron then has nothing to warn of")
def test_verbose_shows_everything():
    assert "not installed" in run(IMPORTS, NEMO_KTO_VERBOSE="1").stderr


ELSEWHERE = """
from nemo_kto import cli
from nemo_kto.config import compose
from nemo_kto.runs import early

silence, cli.silence_startup_noise = cli.silence_startup_noise, lambda: None
early.check_early = lambda *_: None

def run_configured(run, overrides, *, around):
    cli.silence_startup_noise = silence
    try:
        run(None)
    except AttributeError:  # there is no configuration
        print("imported")

compose.run_configured = run_configured
cli.run_script("train", [])
"""


def test_a_run_that_another_process_begins_is_silent_too():
    """Those of a sweep, which submitit hands to jobs of a cluster: only what is called for each run happens there."""
    done = run(ELSEWHERE)
    assert (done.stdout, done.stderr) == ("imported\n", "")
