"""The quickstart, what `make quickstart` runs: KTO on two CPU processes (tensor parallel), and what it changed.

python examples/nlp/kto/quickstart/run.py [--results FOLDER]

The shipped model answers in a polite or a curt style, each about half of the time. The shipped feedback has a thumb up
on polite answers and a thumb down on curt ones. The held-out questions that measure the change occur nowhere in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from style import is_correct, style_of

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[3]
MODEL_FOLDER = HERE / "model"
DATA_FOLDER = HERE / "data"
TRAINER = HERE.parent / "train_gpt_kto.py"
PYTHON = Path(sys.executable)
DEFAULT_RESULTS = REPOSITORY / "results" / "quickstart"
MARKER = ".made-by-quickstart"
REQUIRED_SHARE = 0.95
SAMPLES_PER_QUESTION = 2
SEED = 7
NUM_EXAMPLES = 4


@dataclass(frozen=True)
class Evaluation:
    """Answers to the held-out questions and their shares, each between 0 and 1."""

    answers: list[str]
    polite: float
    curt: float
    correct: float


def main() -> int:
    """Runs the quickstart and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS, help="folder of logs, checkpoints and model")
    results = parser.parse_args().results.absolute()
    start = time.monotonic()
    prepare_results(results)

    prompts = read_prompts(DATA_FOLDER / "prompts.jsonl")
    print(
        f"{len(prompts)} held-out questions, {SAMPLES_PER_QUESTION} sampled answers each, before training:", flush=True
    )
    before = evaluate(MODEL_FOLDER, prompts)
    print(describe(before))

    command = training_command(results, "model.tensor_model_parallel_size=2")
    print(f"\nKTO on two processes:\n{shown(command)}\n", flush=True)
    code = subprocess.run(command, env=training_environment(), cwd=REPOSITORY, check=False).returncode
    if code != 0:
        print(f"\nThe training stopped with exit code {code}; its messages are above.", file=sys.stderr)
        return 1

    after = evaluate(results / "hf", prompts)
    print(f"\nThe same questions, answered by the exported model:\n{describe(after)}")
    print_examples(prompts, before, after)
    print_what_next(results)
    seconds = time.monotonic() - start
    print(
        f"\nPolite answers: {before.polite:.1%} before, {after.polite:.1%} after, in {seconds:.0f} seconds.",
        flush=True,
    )
    return verdict(after)


def prepare_results(folder: Path) -> None:
    """Makes an empty results folder, so that training starts afresh rather than resuming.

    A folder with something in it is emptied only if it is the default one and an earlier quickstart made it.

    Raises:
        SystemExit: The folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()):
        if folder != DEFAULT_RESULTS or not (folder / MARKER).is_file():
            raise SystemExit(f"{folder} is not empty. Move it away, or name another folder with --results.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Returns the held-out questions, each with the word or words that a correct answer contains."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(record["prompt"][0]["content"], record["answer"]) for record in records]


def evaluate(folder: Path, prompts: list[tuple[str, str]]) -> Evaluation:
    """Samples `SAMPLES_PER_QUESTION` answers to each question from the model in `folder` and judges them."""
    from answers import sample_answers  # imports torch and transformers: not before the folder has been checked

    repeated = prompts * SAMPLES_PER_QUESTION
    answers = sample_answers(folder, [question for question, _ in repeated], seed=SEED)
    styles = [style_of(answer) for answer in answers]
    num_correct = sum(is_correct(answer, word) for answer, (_, word) in zip(answers, repeated, strict=True))
    return Evaluation(
        answers=answers,
        polite=styles.count("polite") / len(answers),
        curt=styles.count("curt") / len(answers),
        correct=num_correct / len(answers),
    )


def describe(evaluation: Evaluation) -> str:
    """Returns the shares as one line."""
    return f"  polite {evaluation.polite:.1%}   curt {evaluation.curt:.1%}   correct {evaluation.correct:.1%}"


def verdict(after: Evaluation) -> int:
    """Returns the exit code: 0, or 1 with a message when too few answers have the desired style."""
    if after.polite >= REQUIRED_SHARE:
        return 0
    print(
        f"The quickstart failed: {after.polite:.1%} of the answers after training are polite, expected at least "
        f"{REQUIRED_SHARE:.0%}.",
        file=sys.stderr,
    )
    return 1


def training_command(log_dir: Path, layout: str) -> list[str]:
    """Returns the training command: the ordinary entry point with the overrides that suit so small a model.

    Args:
        log_dir: Folder of the run's logs, checkpoints and exported model.
        layout: Override that says how the two processes share the model.
    """
    train, validation = (in_repository(DATA_FOLDER / name) for name in ("train.jsonl", "validation.jsonl"))
    return [
        in_repository(PYTHON),
        in_repository(TRAINER),
        f"pretrained_checkpoint.restore_from_path={in_repository(MODEL_FOLDER)}",
        f"model.data.data_prefix={{train: [{train}], validation: [{validation}]}}",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        layout,
        "model.global_batch_size=32",
        "model.micro_batch_size=32",
        "trainer.kto.max_steps=40",
        "trainer.kto.val_check_interval=20",
        "model.kto.ref_policy_kl_penalty=0.5",
        "model.optim.lr=2e-4",
        "generation.num_prompts=4",
        "generation.max_new_tokens=24",
        f"exp_manager.explicit_log_dir={in_repository(log_dir)}",
    ]


def training_environment() -> dict[str, str]:
    """Returns the environment of the training: one thread per process, and no GPU even where there is one."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def in_repository(path: Path) -> str:
    """Returns `path` relative to the repository, where the commands run; a path outside of it is returned as it is."""
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def shown(command: list[str]) -> str:
    """Returns a command as one would type it, indented, the program and then an argument a line."""
    words = [shlex.quote(word) for word in command]
    return "  " + " \\\n    ".join([" ".join(words[:2]), *words[2:]])


def print_examples(prompts: list[tuple[str, str]], before: Evaluation, after: Evaluation) -> None:
    """Prints some questions, evenly spread over the families, with the answers before and after."""
    print("\nFor example:")
    for index in range(0, len(prompts), -(-len(prompts) // NUM_EXAMPLES)):
        print(f"  {prompts[index][0]}\n    before: {before.answers[index]}\n    after:  {after.answers[index]}")


def print_what_next(results: Path) -> None:
    """Prints where everything is and three commands to go on with."""
    python, exported = in_repository(PYTHON), in_repository(results / "hf")
    ask = [python, in_repository(HERE / "answers.py"), exported, "What is the capital of Norway?"]
    pipeline = training_command(results.with_name(results.name + "-pipeline"), "model.pipeline_model_parallel_size=2")
    own = [
        python,
        in_repository(TRAINER),
        "pretrained_checkpoint.restore_from_path=<Hugging Face folder>",
        "model.data.data_prefix={train: [<your.jsonl>], validation: [<another.jsonl>]}",
        "trainer.devices=2",
        "model.tensor_model_parallel_size=2",
    ]
    report = in_repository(results / "report" / "report.html")
    print(f"\nReport:          {report} (curves, data and answers; open it in a browser)")
    print(f"Checkpoints:     {in_repository(results / 'checkpoints')}")
    print(f"Exported model:  {exported} (an ordinary Hugging Face folder)")
    print(f"\nWhat to try next, in {REPOSITORY}:")
    print(f"1. Ask the model yourself\n{shown(ask)}")
    print(f"2. Do the same with the layers in two pipeline stages\n{shown(pipeline)}")
    print(f"3. Use your own model and feedback\n{shown(own)}")


if __name__ == "__main__":
    sys.exit(main())
