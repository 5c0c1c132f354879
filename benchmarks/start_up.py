"""How long a command takes to its answer, and what it has imported by then.

python benchmarks/start_up.py [--rounds N]

Errors of a training command, looks at data and at a run, and the first step of the quickstart on two processes (from
the command to the line that says so; there is no validation before it). Each command is a process of its own, on the
quickstart's model and feedback; they run one after the other, in turns. Ratios are to `python -c "import torch"`,
which is measured among them: seconds are the machine's. Cold files make the first round slow; it is not counted.
Modules are those of the process that was started, when it ends.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import median_and_range, publish

KTO = Path(__file__).resolve().parent.parent / "examples" / "nlp" / "kto"
TRAIN = str(KTO / "train_gpt_kto.py")
MODEL, DATA = KTO / "quickstart" / "model", KTO / "quickstart" / "data"
COMMAND = str(Path(sys.executable).with_name("nemo-kto"))
FIRST_STEP = "First step after"
YARDSTICK = 'python -c "import torch"'

LOADED_MODULES = Path(__file__).resolve().parent.parent / "tests" / "commands" / "loaded_modules.py"


@dataclass
class Measured:
    """A command and what was found of it.

    Attributes:
        arguments: A script and its arguments.
        code: Exit code that it has to have.
        until: Beginning of the line of its output that ends the measurement; None for its end.
        seconds: Of each round.
        modules: Imported at its end.
    """

    arguments: Sequence[str]
    code: int = 0
    until: str | None = None
    seconds: list[float] = field(default_factory=list)
    modules: int = 0


def main() -> None:
    """Measure all commands in turns and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command that count")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commands = commands_in(folder)
        for number in range(options.rounds + 1):
            for measured in commands.values():
                seconds = run(measured, folder)
                if number:
                    measured.seconds.append(seconds)
    torch = commands[YARDSTICK]
    rows = [
        {
            "command": name,
            "seconds": median_and_range(measured.seconds),
            "of import torch": f"{statistics.median(measured.seconds) / statistics.median(torch.seconds):.2f}",
            "modules": measured.modules,
            "of its modules": f"{measured.modules / torch.modules:.2f}",
        }
        for name, measured in commands.items()
    ]
    publish("start_up", rows, rounds=options.rounds)


def commands_in(folder: Path) -> dict[str, Measured]:
    """Return the commands to measure, by what they are called; what they need is written to `folder`."""
    for package in ("torch", "nemo_kto"):
        (folder / f"import_{package}.py").write_text(f"import {package}\n", encoding="utf-8")
    run(Measured([TRAIN, *overrides(folder / "run", steps=10)]), folder)
    small = str(DATA / "validation.jsonl")
    training = overrides(folder / "log", steps=1)
    return {
        YARDSTICK: Measured([str(folder / "import_torch.py")]),
        'python -c "import nemo_kto"': Measured([str(folder / "import_nemo_kto.py")]),
        "nemo-kto --help": Measured([COMMAND, "--help"]),
        "train, a misspelt key": Measured([TRAIN, *training, "model.micro_batch_sise=4"], code=1),
        "train, an impossible layout": Measured(
            [TRAIN, *training, "trainer.devices=3", "model.tensor_model_parallel_size=3"], code=1
        ),
        "train, a missing data file": Measured([TRAIN, *training, "model.data.data_prefix.train=none.jsonl"], code=1),
        "nemo-kto data check, 240 records": Measured(
            [COMMAND, "data", "check", str(small), "--tokenizer", str(MODEL)]
        ),
        "nemo-kto report, 10 steps": Measured([COMMAND, "report", str(folder / "run"), "-o", str(folder / "report")]),
        "train, first step on 2 processes": Measured(
            [
                TRAIN,
                *training,
                "trainer.devices=2",
                "model.tensor_model_parallel_size=2",
                "exp_manager.create_checkpoint_callback=false",
            ],
            until=FIRST_STEP,
        ),
    }


def overrides(log_dir: Path, *, steps: int) -> list[str]:
    """Return the keys of a run of so many steps of the quickstart, on one process."""
    return [
        f"pretrained_checkpoint.restore_from_path={MODEL}",
        f"model.data.data_prefix.train={DATA / 'train.jsonl'}",
        f"exp_manager.explicit_log_dir={log_dir}",
        "trainer.accelerator=cpu",
        f"trainer.kto.max_steps={steps}",
        "model.global_batch_size=32",
        "model.micro_batch_size=32",
        "export.enabled=false",
        "report.enabled=false",
    ]


def run(measured: Measured, folder: Path) -> float:
    """Run a command to its end; return the seconds to its answer, and keep the number of its modules."""
    modules = folder / "modules.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LOADED": str(modules)}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(LOADED_MODULES), *measured.arguments],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    output, answered = [], None
    for line in process.stdout:
        output.append(line)
        if answered is None and measured.until is not None and measured.until in line:
            answered = time.perf_counter()
    code = process.wait()
    ended = time.perf_counter()
    if code != measured.code or (measured.until is not None and answered is None):
        raise SystemExit(f"{measured.arguments} ended with exit code {code}:\n{''.join(output)}")
    measured.modules = len(modules.read_text(encoding="utf-8").splitlines())
    return (ended if answered is None else answered) - started


if __name__ == "__main__":
    main()
