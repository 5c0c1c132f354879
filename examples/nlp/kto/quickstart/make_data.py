"""Writes the quickstart's feedback: python examples/nlp/kto/quickstart/make_data.py [folder]

train.jsonl, validation.jsonl   one answer with a thumb up (polite) or down (curt) each, in TRL's conversational form
prompts.jsonl                   questions for the comparison before/after; none occurs in the other two files

The same files, byte for byte, come out on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from facts import Question, all_questions
from shared import draw_number, write_jsonl

DATA_FOLDER = Path(__file__).resolve().parent / "data"
NUM_TRAIN = 2400
NUM_VALIDATION = 240


def write_data(folder: Path) -> None:
    """Writes the three files into `folder`, which is made if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = list(all_questions())
    write_jsonl(folder / "train.jsonl", _feedback(questions, "train")[:NUM_TRAIN])
    write_jsonl(folder / "validation.jsonl", _feedback(questions, "validation")[:NUM_VALIDATION])
    write_jsonl(folder / "prompts.jsonl", _prompts(questions))


def _feedback(questions: Iterable[Question], split: str) -> list[dict[str, Any]]:
    """Returns every answer to every question of a split, in a shuffled order.

    Feedback comes answer by answer, as from users of a product: a question has some of the answers, not a pair.
    """
    records = []
    for question in questions:
        if question.split == split:
            records += [_record(question.text, answer, True) for answer in question.polite]
            records += [_record(question.text, answer, False) for answer in question.curt]
    return sorted(records, key=_shuffled_position)


def _record(question: str, answer: str, label: bool) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        "label": label,
    }


def _shuffled_position(record: dict[str, Any]) -> int:
    return draw_number(record["prompt"][0]["content"] + "\n" + record["completion"][0]["content"])


def _prompts(questions: Iterable[Question]) -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": question.text}], "answer": question.answer}
        for question in questions
        if question.split == "heldout"
    ]


if __name__ == "__main__":
    write_data(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA_FOLDER)
