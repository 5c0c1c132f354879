"""The quickstart, what `make quickstart` runs: KTO on two CPU processes (tensor parallel), and what it changed.

python examples/nlp/kto/quickstart/run.py [--results FOLDER]

The shipped model answers in a polite or a curt style, each about half of the time. The shipped feedback has a thumb up
on polite answers and a thumb down on curt ones. The held-out questions that measure the change occur nowhere in it.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import shared
from style import is_correct, style_of

HERE = Path(__file__).resolve().parent
MODEL_FOLDER = HERE / "model"
DATA_FOLDER = HERE / "data"
DEFAULT_RESULTS = shared.REPOSITORY / "results" / "quickstart"


def main() -> int:
    """Runs the quickstart and returns its exit code."""
    start = time.monotonic()
    results = shared.results_folder(__doc__, DEFAULT_RESULTS)
    prompts = read_prompts(DATA_FOLDER / "prompts.jsonl")
    found = shared.compare(
        command_of(results, "model.tensor_model_parallel_size=2"),
        evaluate=partial(evaluate, prompts=prompts),
        folders=(MODEL_FOLDER, results / "hf"),
        prompts=("questions", [question for question, _ in prompts]),
    )
    if found is None:
        return 1
    print_what_next(results)
    return shared.verdict(*found, goal="polite", start=start)


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Returns the held-out questions, each with the word or words that a correct answer contains."""
    return [(record["prompt"][0]["content"], record["answer"]) for record in shared.read_jsonl(path)]


def evaluate(folder: Path, prompts: list[tuple[str, str]]) -> shared.Evaluation:
    """Samples answers to each question from the model in `folder` and judges them."""
    from answers import sample_answers  # imports torch and transformers: not before the folder has been checked

    repeated = prompts * shared.SAMPLES
    answers = sample_answers(folder, [question for question, _ in repeated], seed=shared.SEED)
    styles = [style_of(answer) for answer in answers]
    shares = {style: shared.share_of(found == style for found in styles) for style in ("polite", "curt")}
    shares["correct"] = shared.share_of(
        is_correct(answer, word) for answer, (_, word) in zip(answers, repeated, strict=True)
    )
    return shared.Evaluation(answers, shares)


def command_of(log_dir: Path, layout: str) -> list[str]:
    """Returns the training command.

    Args:
        log_dir: Folder of the run's logs, checkpoints and exported model.
        layout: Override that says how the two processes share the model.
    """
    return shared.training_command(MODEL_FOLDER, DATA_FOLDER, log_dir, layout=[layout], steps=40, learning_rate="2e-4")


def print_what_next(results: Path) -> None:
    """Prints where everything is and three commands to go on with."""
    shared.print_places(results, "curves, data and answers")
    python, exported = shared.in_repository(shared.PYTHON), shared.in_repository(results / "hf")
    own = [
        python,
        shared.in_repository(shared.TRAINER),
        "pretrained_checkpoint.restore_from_path=<Hugging Face folder>",
        "model.data.data_prefix={train: [<your.jsonl>], validation: [<another.jsonl>]}",
        "trainer.devices=2",
        "model.tensor_model_parallel_size=2",
    ]
    shared.print_commands(
        {
            "Ask the model yourself": [
                python,
                shared.in_repository(HERE / "answers.py"),
                exported,
                "What is the capital of Norway?",
            ],
            "Do the same with the layers in two pipeline stages": command_of(
                results.with_name(results.name + "-pipeline"), "model.pipeline_model_parallel_size=2"
            ),
            "Use your own model and feedback": own,
        }
    )


if __name__ == "__main__":
    sys.exit(main())
