"""Rows of the files that trainers take -> answers: prompts with one rated response each, not yet checked."""

import math
from typing import Any

from nemo_kto.data.reading.columns import Answer, Columns
from nemo_kto.data.reading.conversations import split_conversation
from nemo_kto.data.reading.exports import asked
from nemo_kto.data.reading.json_strings import parsed_json
from nemo_kto.data.reading.labels import number_in
from nemo_kto.data.reading.paths import setting_of
from nemo_kto.data.reading.records import RecordError, json_type, shown


def single(row: Columns) -> list[Answer]:
    """prompt, response, label."""
    prompt, response = _common_beginning(row.need("prompt"), row.need("response"))
    return [Answer(prompt, response, row.label(), (row.column("prompt"), row.column("response")))]


def pair(row: Columns) -> list[Answer]:
    """chosen and rejected, with the prompt apart or at the beginning of both."""
    chosen, rejected = row.need("chosen"), row.need("rejected")
    prompt = row.get("prompt")
    if prompt is None:
        prompt, chosen, rejected = _shared_prompt(chosen, rejected, row)
    answers = []
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        own_prompt, own_response = _common_beginning(prompt, response)
        answers.append(Answer(own_prompt, own_response, name == "chosen", (row.column("prompt"), row.column(name))))
    return answers


def prompted_pair(row: Columns) -> list[Answer]:
    """chosen and rejected, with the prompt apart; without one, a beginning that the two share is none."""
    if row.need("prompt") is None:
        raise RecordError("is null.", row.column("prompt"))
    return pair(row)


def _common_beginning(prompt: Any, response: Any) -> tuple[Any, Any]:
    """Takes a prompt that a list of messages repeats off it: some data sets hold the whole conversation twice."""
    if not isinstance(response, list) or len(response) < 2:
        return prompt, response
    if isinstance(prompt, list) and response[: len(prompt)] == prompt:
        return prompt, response[len(prompt) :]
    asked = next((m.get("content") for m in response if isinstance(m, dict) and m.get("role") == "user"), None)
    if isinstance(prompt, str) and asked == prompt:
        return response[:-1], response[-1:]
    return prompt, response


_QUESTIONS = ("question", "query", "input", "context", "text")
"""Columns that may hold the prompt of a pair without saying so."""


def _shared_prompt(chosen: Any, rejected: Any, row: Columns) -> tuple[Any, Any, Any]:
    """What both answers begin with; both keep at least their last character or message.

    As TRL's `extract_prompt` does, a space in front of the first difference goes to the answers.
    """
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise RecordError(
            f"is a {json_type(chosen)} and field '{row.column('rejected')}' a {json_type(rejected)}; without a prompt "
            "both must be strings or both lists of messages.",
            row.column("chosen"),
        )
    if isinstance(chosen, str):  # what two answers happen to begin with is not the prompt
        likely = next((column for column in _QUESTIONS if row.values.get(column) is not None), None)
        if likely is not None:
            setting = setting_of("prompt", likely)
            raise RecordError(f"is missing. If '{likely}' holds it, set {setting}.", row.column("prompt"))
        if row.column("prompt") in row.values:
            raise RecordError("is null.", row.column("prompt"))
    limit = min(len(chosen), len(rejected))
    length = 0
    while length < limit and chosen[length] == rejected[length]:
        length += 1
    if length == limit:
        raise RecordError(
            "and the rejected answer are the same, or one begins with the other; without a prompt nothing tells where "
            "the answers begin.",
            row.column("chosen"),
        )
    if isinstance(chosen, str) and length and chosen[length - 1] == " ":
        length -= 1
    if length < 1:
        raise RecordError(
            "and the rejected answer have no common beginning that could be the prompt.", row.column("chosen")
        )
    return chosen[:length], chosen[length:], rejected[length:]


def messages(row: Columns) -> list[Answer]:
    """A conversation whose last message is rated; or whose end is, in a chosen and a rejected form."""
    name, found = row.column("messages"), row.need("messages")
    found = [found] if isinstance(found, dict) else found
    if row.get("chosen") or row.get("rejected"):
        return [
            Answer(found, row.need(side), side == "chosen", (name, row.column(side)))
            for side in ("chosen", "rejected")
        ]
    prompt, response = split_conversation(found, name)
    return [Answer(prompt, response, row.label(), (name, name))]


def alpaca(row: Columns) -> list[Answer]:
    """instruction, input and history make the prompt; output is rated, or chosen and rejected are."""
    parts = [("instruction", row.need("instruction")), ("input", row.get("input") or "")]
    for name, part in parts:
        if not isinstance(part, str):
            raise RecordError(f"must be a string, not a {json_type(part)}.", row.column(name))
    question = "\n".join(part for _, part in parts if part)
    prompt = [*_history(row.get("history"), row.column("history")), {"role": "user", "content": question}]
    if row.get("chosen") or row.get("rejected"):
        sides = [("chosen", True), ("rejected", False)]
    else:
        sides = [("response", row.label())]
    answers = []
    for side, desirable in sides:
        response = row.need(side)
        if isinstance(response, str):
            response = [{"role": "assistant", "content": response}]
        answers.append(Answer(prompt, response, desirable, (row.column("instruction"), row.column(side))))
    return answers


def _history(value: Any, name: str) -> list[dict[str, Any]]:
    value = parsed_json(value, name)
    if value in (None, "", []):
        return []
    pairs = value if isinstance(value, list) else [value]
    if not all(isinstance(turn, list) and [*map(type, turn)] == [str, str] for turn in pairs):
        raise RecordError("must be a list of [question, answer], both strings.", name)
    return [
        {"role": role, "content": text}
        for turn in pairs
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def compared_pair(row: Columns) -> list[Answer]:
    """output_A is the chosen one of label 1, output_B that of label 0."""
    column, value = row.column("label"), row.need("label")
    number = number_in(value)
    if math.isfinite(number) and number not in (0, 1) and row.judge.meaning(value) is None:
        raise RecordError(
            f"must be 1 where '{row.column('output_A')}' is the better one, 0 where '{row.column('output_B')}' is, "
            f"got {shown(value)}. If it is below 0 where the first one is better and above where the second one is, "
            "set model.data.format=helpsteer3.",
            column,
        )
    first = row.judge.kind(value, column)  # which of the two, whatever ratings mean
    return _two_sides(row, row.need("prompt"), first)


def signed_pair(row: Columns) -> list[Answer]:
    """output_A is the better one where the label is below 0, output_B where it is above."""
    column, value = row.column("label"), row.need("label")
    number, threshold, meaning = number_in(value), row.judge.threshold, row.judge.meaning(value)
    if meaning is not None:
        return _two_sides(row, row.need("prompt"), meaning)
    if math.isnan(number):
        raise RecordError(
            f"must be a number, below 0 where the first answer is better, above where the second one is, got "
            f"{shown(value)}.",
            column,
        )
    if threshold is None:
        first, second = number < 0, number > 0
    else:
        first, second = threshold.holds(number, column), threshold.holds(-number, column)
    if first == second:
        why = (
            "" if threshold is None else f" '{threshold.text}' holds for {'both' if first else 'none'} of the answers."
        )
        raise RecordError(f"is a tie: {shown(value)}.{why} Nothing says which answer is the better one.", column)
    return _two_sides(row, row.need("prompt"), first)


def _two_sides(row: Columns, prompt: Any, first: bool) -> list[Answer]:
    return [
        Answer(prompt, row.need(name), first == (name == "output_A"), (row.column("prompt"), row.column(name)))
        for name in ("output_A", "output_B")
    ]


def exported_pair(row: Columns) -> list[Answer]:
    """chosen and rejected, with the prompt in an object that is sent to a service."""
    prompt = asked(row)
    return [
        Answer(prompt, row.need(name), name == "chosen", (row.column("prompt"), row.column(name)))
        for name in ("chosen", "rejected")
    ]
