"""What this example shares with the one on pictures: drawn numbers, files, and a training measured by its answers."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[4]
TRAINER = REPOSITORY / "examples" / "nlp" / "kto" / "train_gpt_kto.py"
PYTHON = Path(sys.executable)
MARKER = ".made-by-quickstart"
REQUIRED_SHARE = 0.95
SAMPLES = 2
"""Answers to each held-out question, sampled with `SEED`."""
SEED = 7
NUM_EXAMPLES = 4


@dataclass(frozen=True)
class Evaluation:
    """Answers to the held-out questions, `SAMPLES` to each, and what share of them is what, each between 0 and 1."""

    answers: list[str]
    shares: dict[str, float]

    def __str__(self) -> str:
        """The shares as one line."""
        return "  " + "   ".join(f"{name} {share:.1%}" for name, share in self.shares.items())


def draw_number(key: str) -> int:
    """A number that looks random but depends on `key` alone: the same on every machine and Python version."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes records, one a line; the same bytes on every machine."""
    path.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode())
    print(f"{path}: {len(records)} records")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results_folder(description: str | None, default: Path) -> Path:
    """Reads the command line and returns the results folder that it names, made and empty.

    Args:
        description: What `--help` says.
        default: The folder of a command line that names none.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=default, help="folder of logs, checkpoints and model")
    results: Path = parser.parse_args().results.absolute()
    prepare_results(results, default)
    return results


def prepare_results(folder: Path, default: Path) -> None:
    """Makes an empty results folder, so that training starts afresh rather than resuming.

    A folder with something in it is emptied only if it is the default one and an earlier run made it.

    Raises:
        SystemExit: The folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()):
        if folder != default or not (folder / MARKER).is_file():
            raise SystemExit(f"{folder} is not empty. Move it away, or name another folder with --results.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def training_command(
    model: Path, data: Path, log_dir: Path, *, layout: list[str], steps: int, learning_rate: str
) -> list[str]:
    """Returns the training command: the ordinary entry point on two CPU processes, and what suits so small a model.

    Args:
        model: Hugging Face folder.
        data: Folder of train.jsonl and validation.jsonl.
        log_dir: Folder of the run's logs, checkpoints and exported model.
        layout: Overrides that say how the two processes share the model.
        steps: How many; validation is in the middle and at the end.
        learning_rate: As it is written.
    """
    train, validation = (in_repository(data / name) for name in ("train.jsonl", "validation.jsonl"))
    return [
        in_repository(PYTHON),
        in_repository(TRAINER),
        f"pretrained_checkpoint.restore_from_path={in_repository(model)}",
        f"model.data.data_prefix={{train: [{train}], validation: [{validation}]}}",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        *layout,
        "model.global_batch_size=32",
        "model.micro_batch_size=32",
        f"trainer.kto.max_steps={steps}",
        f"trainer.kto.val_check_interval={steps // 2}",
        "model.kto.ref_policy_kl_penalty=0.5",
        f"model.optim.lr={learning_rate}",
        "generation.num_prompts=4",
        "generation.max_new_tokens=24",
        f"exp_manager.explicit_log_dir={in_repository(log_dir)}",
    ]


def compare(
    command: list[str],
    *,
    evaluate: Callable[[Path], Evaluation],
    folders: tuple[Path, Path],
    prompts: tuple[str, list[str]],
) -> tuple[Evaluation, Evaluation] | None:
    """Asks a model before and after its training, prints what came of it, and returns it; None if training failed.

    Args:
        command: The training command.
        evaluate: Has the model in a Hugging Face folder answer.
        folders: The model before and after.
        prompts: What is asked: what it is called, and how each is shown in the examples.
    """
    kind, texts = prompts
    print(f"{len(texts)} held-out {kind}, {SAMPLES} sampled answers each, before training:", flush=True)
    before = evaluate(folders[0])
    print(before)
    if not train(command):
        return None
    after = evaluate(folders[1])
    print(f"\nThe same {kind}, answered by the exported model:\n{after}\n\nFor example:")
    for row in range(0, len(texts), -(-len(texts) // NUM_EXAMPLES)):
        print(f"  {texts[row]}\n    before: {before.answers[row]}\n    after:  {after.answers[row]}")
    return before, after


def train(command: list[str]) -> bool:
    """Shows the training command and runs it; returns whether it ended well."""
    print(f"\nKTO on two processes:\n{shown(command)}\n", flush=True)
    # one thread per process, and no GPU even where there is one
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    code = subprocess.run(command, env=environment, cwd=REPOSITORY, check=False).returncode
    if code != 0:
        print(f"\nThe training stopped with exit code {code}; its messages are above.", file=sys.stderr)
    return code == 0


def verdict(before: Evaluation, after: Evaluation, goal: str, start: float) -> int:
    """Prints how far it came and returns the exit code: 0, or 1 with a message when too few answers are as desired.

    Args:
        before: Before training.
        after: After it.
        goal: Which share counts.
        start: `time.monotonic()` at the beginning.
    """
    print(
        f"\n{goal.capitalize()} answers: {before.shares[goal]:.1%} before, {after.shares[goal]:.1%} after, in "
        f"{time.monotonic() - start:.0f} seconds.",
        flush=True,
    )
    if after.shares[goal] >= REQUIRED_SHARE:
        return 0
    print(
        f"The quickstart failed: {after.shares[goal]:.1%} of the answers after training are {goal}, expected at least "
        f"{REQUIRED_SHARE:.0%}.",
        file=sys.stderr,
    )
    return 1


def share_of(hits: Iterable[bool]) -> float:
    """Returns how many of at least one are true."""
    listed = list(hits)
    return sum(listed) / len(listed)


def in_repository(path: Path) -> str:
    """Returns `path` relative to the repository, where the commands run; a path outside of it is returned as it is."""
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def shown(command: list[str]) -> str:
    """Returns a command as one would type it, indented, the program and then an argument a line."""
    words = [shlex.quote(word) for word in command]
    return "  " + " \\\n    ".join([" ".join(words[:2]), *words[2:]])


def print_places(results: Path, content: str) -> None:
    """Prints where everything is that a run wrote; `content` is what its report shows."""
    report = in_repository(results / "report" / "report.html")
    print(f"\nReport:          {report} ({content}; open it in a browser)")
    print(f"Checkpoints:     {in_repository(results / 'checkpoints')}")
    print(f"Exported model:  {in_repository(results / 'hf')} (an ordinary Hugging Face folder)")


def print_commands(commands: dict[str, list[str]]) -> None:
    """Prints commands to go on with: what each is for, and the words of it."""
    print(f"\nWhat to try next, in {REPOSITORY}:")
    for number, (purpose, command) in enumerate(commands.items(), start=1):
        print(f"{number}. {purpose}\n{shown(command)}")
