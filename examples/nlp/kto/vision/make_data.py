"""Draws the pictures and writes the feedback on them: python examples/nlp/kto/vision/make_data.py <folder>

train.jsonl, validation.jsonl   a picture, a question and one answer each, with a thumb up (right) or down (wrong)
prompts.jsonl                   pictures and the question for the comparison before/after, of other pairs of colours
pictures/                       the pictures, as PNG files; the other files name them relative to where they are
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from shapes import QUESTION, Scene, scenes
from shared import draw_number, write_jsonl

NUM_TRAIN = 1920
NUM_VALIDATION = 96
NUM_HELDOUT = 192


def write_data(folder: Path) -> None:
    """Writes all of it into `folder`, which is made if necessary."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        write_jsonl(folder / f"{split}.jsonl", [_feedback(folder, scene) for scene in scenes(split, count)])
    write_jsonl(
        folder / "prompts.jsonl",
        [
            {"prompt": _prompt(folder, scene), "circle": scene.circle, "square": scene.square}
            for scene in scenes("heldout", NUM_HELDOUT)
        ],
    )


def _feedback(folder: Path, scene: Scene) -> dict[str, Any]:
    """Returns one of the two answers with its label: as from users of a product, a picture has no pair of them."""
    right, wrong = scene.answers
    label = draw_number(f"{scene.key}/label") % 2 == 0
    completion = [{"role": "assistant", "content": right if label else wrong}]
    return {"prompt": _prompt(folder, scene), "completion": completion, "label": label}


def _prompt(folder: Path, scene: Scene) -> list[dict[str, Any]]:
    """Draws the picture into `folder` and returns the message that shows it and asks."""
    name = f"pictures/{scene.key.replace('/', '_')}.png"
    scene.draw().save(folder / name)
    return [
        {"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": QUESTION}]},
    ]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_data.py <folder>")
    write_data(Path(sys.argv[1]))
