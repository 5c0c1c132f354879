"""Random kills: a run that is killed, and started again until it has finished, ends as one that never was.

    PYTHONPATH=. python tests/faults/random_kills.py 100 --variants TP2 async --seed 1 --folder /tmp/kills

A round is a run of two ranks, of which a process, a rank or one of its helpers, or all are killed at a random moment:
when the run has computed for so long, as its processes count it, so that a busy machine changes nothing. Then it is
started again, and may be killed again. What it logs and exports is compared bit by bit with a run that was not killed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults.forked_commands import ForkedCommand
from tests.integration.assets import make_model_folder, read_series, settings, without_times, write_feedback
from tests.waiting import wait_until

STEPS = 6
VARIANTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2": {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True},
    "PP2": {"model__pipeline_model_parallel_size": 2},
    "EP2": {"model__expert_model_parallel_size": 2},
    "async": {"exp_manager__checkpoint_callback_params__async_save": True},
    "LoRA": {
        "model__peft__peft_scheme": "lora",
        "model__peft__lora_tuning__adapter_dim": 4,
        "model__peft__lora_tuning__adapter_dropout": 0.2,
    },
    "cached": {"model__kto__reference__mode": "cached"},
    "loaders": {"model__data__num_workers": 1},
}
"""Name -> what its runs are set to besides; two ranks each."""

COMMON: dict[str, Any] = {
    "trainer__devices": 2,
    "trainer__timeout_minutes": 3,  # one whose companion was killed before they met waits for as long
    "trainer__kto__max_steps": STEPS,
    "trainer__kto__save_interval": 2,
    "trainer__kto__val_check_interval": 3,
    "model__micro_batch_size": 4,
    "exp_manager__create_checkpoint_callback": True,
    "exp_manager__checkpoint_callback_params__save_top_k": 1,
    "export__enabled": True,
}

KINDS = ("all", "all", "rank", "rank", "helper")
"""What is killed."""

MOST_KILLS = 4
"""Of one round; then it may finish."""


def make_assets(folder: Path) -> Path:
    """Make the models and the feedback of all variants."""
    make_model_folder(folder / "hf")
    make_model_folder(folder / "experts", kind="experts")
    write_feedback(folder / "train.jsonl", number=40, seed=1)
    write_feedback(folder / "validation.jsonl", number=11, seed=2)
    return folder


class Kills:
    """Runs of one variant.

    Args:
        variant: Which one.
        root: What `make_assets` made.
        folder: For their log folders.

    Attributes:
        notes: What was killed and what the others said, without numbers -> how often.
    """

    def __init__(self, variant: str, root: Path, folder: Path) -> None:
        self.variant = variant
        self.notes: Counter[str] = Counter()
        self._root, self._folder = root, folder
        whole = self._start("whole")
        self._length = 1
        while not whole.ended():
            self._length = max(self._length, whole.computed())
        ended = whole.end()
        assert [code for code, _, _ in ended] == [0, 0], ended
        self._expected = self._outcome("whole")

    def round(self, number: int, generator: random.Random, *, kinds: Sequence[str] = KINDS) -> int:
        """Kill a run and start it again until it has finished; return how often it was killed."""
        name = f"round{number}"
        kills = 0
        while True:
            command = self._start(name)
            if kills < MOST_KILLS and (kills == 0 or generator.random() < 0.5):
                killed = self._kill(command, generator, kinds)
            else:
                killed = False
            ended = command.end()
            if not killed:
                assert [code for code, _, _ in ended] == [0, 0], ended
                break
            kills += 1
            self._judge(command, ended)
        actual = self._outcome(name)
        for what, value in self._expected.items():
            assert actual[what] == value, f"{self._folder / name}: {what} is not that of a run that was not killed"
        shutil.rmtree(self._folder / name)
        return kills

    def _start(self, name: str) -> ForkedCommand:
        changes = {
            **COMMON,
            **VARIANTS[self.variant],
            "model__data__data_prefix__validation": str(self._root / "validation.jsonl"),
        }
        values = settings(self._root, self._folder / name, **changes)
        if self.variant == "EP2":
            values["pretrained_checkpoint.restore_from_path"] = str(self._root / "experts")
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        return ForkedCommand(["train", *overrides], self._folder / "printed", ranks=2)

    def _kill(self, command: ForkedCommand, generator: random.Random, kinds: Sequence[str]) -> bool:
        """Kill a process of a run, or all, at a random moment; return whether it was still running then."""
        moment = generator.uniform(0, self._length)
        wait_until(lambda: command.ended() or command.computed() >= moment)
        leaders = [rank.pid for rank in command.ranks]
        kind = generator.choice(kinds)
        if kind == "helper":  # those that write checkpoints live for moments only
            wait_until(lambda: command.ended() or set(command.processes()) - set(leaders), every=0.002)
        victims = command.processes()
        if kind != "all":
            victims = [pid for pid in victims if (pid in leaders) == (kind == "rank")]
            victims = [generator.choice(victims)] if victims else []
        if command.ended() or not victims:
            return False
        self.notes[f"killed: {f'rank {leaders.index(victims[0])}' if kind == 'rank' else kind}"] += 1
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True

    def _judge(self, command: ForkedCommand, ended: list[tuple[int, str, str]]) -> None:
        """Check that those that were not killed have ended with a sentence and exit code 1, or finished."""
        for code, output, errors in ended:
            assert code in (0, 1, -signal.SIGKILL), ended
            # of one that was not needed any more, PyTorch lets Python print what it ignores
            assert code == 0 or "Traceback" not in output + errors, ended
            for line in [*errors.splitlines(), *(line for line in output.splitlines() if "could not be" in line)]:
                self.notes["said: " + re.sub(r"\d+", "N", line.replace(str(self._folder), "..."))] += 1

    def _outcome(self, name: str) -> dict[str, Any]:
        """Return what a run has logged, and the digests of what it has exported."""
        series = read_series(self._folder / name)
        files = {
            f"hf/{file.name}": hashlib.blake2b(file.read_bytes()).hexdigest()
            for file in sorted((self._folder / name / "hf").iterdir())
        }
        return without_times(series) | files


def main() -> None:
    """Run as many rounds of each variant as are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", type=int, help="of each variant")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--folder", type=Path, required=True, help="for models and log folders")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    root = make_assets(options.folder)
    runs = {variant: Kills(variant, root, options.folder / variant) for variant in options.variants}
    kills = dict.fromkeys(runs, 0)
    for number in range(options.rounds):
        for variant, trial in runs.items():
            kills[variant] += trial.round(number, generator)
        print(f"seed {options.seed}, {number + 1} rounds of each; kills survived: {kills}", flush=True)
    for note, count in sorted(sum((trial.notes for trial in runs.values()), Counter[str]()).items()):
        print(f"{count:6} {note}")


if __name__ == "__main__":
    main()
