"""KTO on pictures, what `make quickstart-vision` runs: two CPU processes (tensor parallel), and what it changed.

python examples/nlp/kto/vision/run.py [--results FOLDER]

The shipped model is asked for the colour of the circle in pictures of a circle and a square, and names the colour of
either, each about half of the time. The feedback, drawn anew, has a thumb up on right answers and a thumb down on
wrong ones. The pictures that measure the change show pairs of colours that occur nowhere in it.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from make_data import write_data
from shapes import QUESTION, REQUEST, Scene
from shared import (
    PYTHON,
    REPOSITORY,
    SAMPLES,
    SEED,
    Evaluation,
    compare,
    in_repository,
    print_commands,
    print_places,
    read_jsonl,
    results_folder,
    share_of,
    training_command,
    verdict,
)

HERE = Path(__file__).resolve().parent
MODEL_FOLDER = HERE / "model"
TENSOR_PARALLEL = "model.tensor_model_parallel_size=2"
DEFAULT_RESULTS = REPOSITORY / "results" / "quickstart-vision"


def main() -> int:
    """Runs the example and returns its exit code."""
    start = time.monotonic()
    results = results_folder(__doc__, DEFAULT_RESULTS)
    write_data(results / "data")
    asked = read_jsonl(results / "data" / "prompts.jsonl")
    pictures = [picture_of(results / "data", record) for record in asked]
    found = compare(
        command_of(results / "data", results, TENSOR_PARALLEL),
        evaluate=partial(evaluate, pictures=pictures, asked=asked),
        folders=(MODEL_FOLDER, results / "hf"),
        prompts=("pictures", pictures),
    )
    if found is None:
        return 1
    print_what_next(results, pictures[0])
    return verdict(*found, goal="right", start=start)


def evaluate(folder: Path, pictures: list[str], asked: list[dict[str, Any]]) -> Evaluation:
    """Samples answers about each picture from the model in `folder` and judges them."""
    from answers import prompt_of, sample_answers  # imports torch and transformers: not before the folder is there

    prompts = [prompt_of(REPOSITORY / picture, QUESTION) for picture in pictures * SAMPLES]
    answers = sample_answers(folder, prompts, seed=SEED)
    scenes = [Scene(record["circle"], record["square"], key="") for record in asked * SAMPLES]
    judged = list(zip(scenes, answers, strict=True))
    shares = {
        "right": share_of(scene.is_right(answer) for scene, answer in judged),
        "the square's colour": share_of(scene.swapped().is_right(answer) for scene, answer in judged),
    }
    return Evaluation(answers, shares)


def picture_of(data: Path, record: dict[str, Any]) -> str:
    """Returns the file of a record's picture."""
    (image,) = (part["image"] for part in record["prompt"][0]["content"] if part["type"] == "image")
    return in_repository(data / image)


def command_of(data: Path, log_dir: Path, *layout: str) -> list[str]:
    """Returns the training command.

    Args:
        data: Folder of the data.
        log_dir: Folder of the run's logs, checkpoints and exported model.
        layout: Overrides that say how the processes share the model, or what is trained.
    """
    return training_command(MODEL_FOLDER, data, log_dir, layout=list(layout), steps=60, learning_rate="4e-4")


def print_what_next(results: Path, picture: str) -> None:
    """Prints where everything is and three commands to go on with."""
    print_places(results, "curves, data, pictures and answers")
    python, exported = (in_repository(path) for path in (PYTHON, results / "hf"))
    again = {
        "Do the same with the layers in two pipeline stages": ("pipeline", "model.pipeline_model_parallel_size=2"),
        "Train the vision tower and the projector too": ("tower", TENSOR_PARALLEL, "model.vision.train=all"),
    }
    print_commands(
        {"Ask the model yourself": [python, in_repository(HERE / "answers.py"), exported, picture, REQUEST]}
        | {
            purpose: command_of(results / "data", results.with_name(f"{results.name}-{name}"), *settings)
            for purpose, (name, *settings) in again.items()
        }
    )


if __name__ == "__main__":
    sys.exit(main())
