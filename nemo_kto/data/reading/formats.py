"""Rows of a feedback file -> `FeedbackRecord`, for each format that people have such files in.

A format says which columns hold a prompt, a response and a label, and how the three are read. docs/data.md shows a
sample of each. Field names and meanings are those of

    trl, pairs       TRL docs/source/dataset_formats.md and trl/data_utils.py (f2cd57710a)
    nemo_aligner     NeMo-Aligner nemo_aligner/data/nlp/datasets.py (af2b3bd96a)
    alpaca, sharegpt, messages
                     LLaMA-Factory src/llamafactory/data/converter.py (ff6d4d12ee); of `messages` also ms-swift
                     docs/source_en/Customization/Custom-dataset.md (3602360a56)
    halos            HALOs train/data.py (4831988636)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_kto.data.reading.conversations import parsed_json, split_conversation, turns
from nemo_kto.data.reading.labels import Threshold, parse_label
from nemo_kto.data.reading.records import RecordError, json_type

SCORES = ("score", "rating", "reward")
"""Columns of ratings, tried where labels are made of them."""


@dataclass(frozen=True, slots=True)
class Columns:
    """A row seen through names of our own, whatever its columns are called.

    Attributes:
        values: The row.
        names: Our name -> the columns it may be in, the first that is there counts.
        threshold: See `Threshold`; None where labels are not ratings.
        given: Those of our names that the user has given a column.
    """

    values: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]]
    threshold: Threshold | None = None
    given: frozenset[str] = frozenset()

    def column(self, name: str) -> str:
        """The column a value is in, or would be in."""
        columns = self.names.get(name, (name,))
        filled = (column for column in columns if self.values.get(column) is not None)
        return next(filled, next((column for column in columns if column in self.values), columns[0]))

    def has(self, name: str) -> bool:
        """Whether the row has such a column, with something in it."""
        return self.values.get(self.column(name)) is not None

    def get(self, name: str) -> Any:
        """A value that may be missing: None."""
        return self.values.get(self.column(name))

    def need(self, name: str) -> Any:
        """A value that must be there; a RecordError if it is not."""
        column = self.column(name)
        if column not in self.values:
            hint = f" If another column holds it, set model.data.fields={{{name}: <column>}}."
            raise RecordError("is missing." + ("" if name in self.given else hint), column)
        return self.values[column]

    def label(self) -> bool:
        """Whether the answer is desirable; a RecordError for a label that does not say so."""
        column = self.column("label")
        score = next((name for name in SCORES if self.values.get(name) is not None), None)
        if column not in self.values and score is not None:
            raise RecordError(
                f"is missing. To make labels of '{score}', set model.data.desirable_if, for example to '>= 4'.", column
            )
        value = self.need("label")
        return parse_label(value, column) if self.threshold is None else self.threshold.holds(value, column)


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt with one rated response, not yet checked; `names` are the columns the two came from."""

    prompt: Any
    response: Any
    desirable: bool
    names: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write feedback.

    Attributes:
        read: Row -> the answers in it.
        required: Names that a row of this format has.
        names: See `Columns`.
        without: Names that a row of this format does not have; only detection asks for them.
    """

    read: Callable[[Columns], list[Answer]]
    required: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def _single(row: Columns) -> list[Answer]:
    """prompt, response, label."""
    prompt, response = _common_beginning(row.need("prompt"), row.need("response"))
    return [Answer(prompt, response, row.label(), (row.column("prompt"), row.column("response")))]


def _pair(row: Columns) -> list[Answer]:
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


def _prompted_pair(row: Columns) -> list[Answer]:
    """chosen and rejected, with the prompt apart; without one, a beginning that the two share is none."""
    if row.need("prompt") is None:
        raise RecordError("is null.", row.column("prompt"))
    return _pair(row)


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
            raise RecordError(
                f"is missing. If '{likely}' holds it, set model.data.fields={{prompt: {likely}}}.",
                row.column("prompt"),
            )
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


def _messages(row: Columns) -> list[Answer]:
    """A conversation whose last message is rated; or whose end is, in a chosen and a rejected form."""
    name, messages = row.column("messages"), turns(row.need("messages"), row.column("messages"))
    if row.get("chosen") or row.get("rejected"):
        answers = []
        for side in ("chosen", "rejected"):
            response = turns(row.need(side), row.column(side))
            answers.append(Answer(messages, response, side == "chosen", (name, row.column(side))))
        return answers
    prompt, response = split_conversation(messages, name)
    return [Answer(prompt, response, row.label(), (name, name))]


def _alpaca(row: Columns) -> list[Answer]:
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


def _halos_pair(row: Columns) -> list[Answer]:
    """output_A is the chosen one of label 1, output_B that of label 0."""
    first = parse_label(row.need("label"), row.column("label"))  # which of the two, whatever ratings mean
    return [
        Answer(
            row.need("prompt"), row.need(name), first == (name == "output_A"), (row.column("prompt"), row.column(name))
        )
        for name in ("output_A", "output_B")
    ]


_CONVERSATION = {"messages": ("messages", "conversations"), "label": ("label", "kto_tag")}
FORMATS: Mapping[str, Format] = {
    "nemo_aligner": Format(_single, ("prompt", "response", "label"), {"label": ("preference", "label")}),
    "trl": Format(_single, ("prompt", "response", "label"), {"response": ("completion",)}),
    "halos": Format(_single, ("prompt", "response", "label"), {"response": ("output",)}),
    "halos_pairs": Format(_halos_pair, ("prompt", "output_A", "output_B", "label")),
    "alpaca": Format(
        _alpaca, ("instruction", "response", "label"), {"response": ("output",), "label": ("kto_tag", "label")}
    ),
    "alpaca_pairs": Format(_alpaca, ("instruction", "chosen", "rejected")),
    "messages": Format(_messages, ("messages", "label"), _CONVERSATION),
    "sharegpt": Format(_messages, ("messages", "label"), {**_CONVERSATION, "messages": ("conversations",)}),
    # ultrafeedback_binarized has a prompt, pairs, and the chosen conversation once more as messages
    "message_pairs": Format(_messages, ("messages", "chosen", "rejected"), _CONVERSATION, without=("prompt",)),
    "nemo_aligner_pairs": Format(
        _prompted_pair,
        ("prompt", "chosen", "rejected"),
        {"chosen": ("chosen_response",), "rejected": ("rejected_response",)},
    ),
    "pairs": Format(_pair, ("chosen", "rejected")),
}
"""Name -> format, in the order in which a row is compared with them."""

_OTHERS = ("system", "tools", "chat_template_kwargs", "input", "history", "weight")
FIELDS = tuple(dict.fromkeys([*(name for found in FORMATS.values() for name in found.required), *_OTHERS]))
"""Names that `fields` may give columns to."""
