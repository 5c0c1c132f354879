"""What services export: which score is the label, what is inside, and what is said where that is not plain."""

import json
from typing import Any

import pytest

from nemo_kto.data.reading.chunks import parse_chunk, read_chunks, read_feedback
from nemo_kto.data.reading.containers import Row
from nemo_kto.data.reading.labels import parse_words
from nemo_kto.data.reading.records import RecordError
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import Source
from nemo_kto.errors import DataError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(*rows: dict[str, Any], **how: Any) -> list[tuple[Any, Any, bool]]:
    places = [Row("f.jsonl", number, row) for number, row in enumerate(rows, 1)]
    reader = RowReader(**how)
    reader.check()
    reader = reader.settle(places)
    return [(r.prompt, r.response, r.desirable) for place in places for r in reader.read(place)]


def error_of(*rows: dict[str, Any], **how: Any) -> str:
    with pytest.raises((RecordError, DataError)) as caught:
        read(*rows, **how)
    return str(caught.value)


# HelpSteer3, and other pairs with a preference that has a sign

PAIR = {"context": [user("q")], "response1": "a", "response2": "b"}


def first_is_better(value: Any, **how: Any) -> bool:
    (first, second) = read(PAIR | {"overall_preference": value}, format="helpsteer3", **how)
    assert (first[1], second[1]) == ([assistant("a")], [assistant("b")]) and first[2] is not second[2]
    return first[2]


@pytest.mark.parametrize(
    ("value", "how", "expected"),
    [
        (-3, {}, True),
        (-0.5, {}, True),
        ("-1", {}, True),
        (1, {}, False),
        ("3.0", {}, False),
        # a strong preference only: below -2 for the first, above 2 for the second
        (-2, {"desirable_if": "<= -2"}, True),
        (2, {"desirable_if": "<= -2"}, False),
        # somebody's sign is the other way round
        (2, {"desirable_if": "> 0"}, True),
        (-2, {"desirable_if": "> 0"}, False),
        ("A", {"labels": parse_words({"desirable": ["a"], "undesirable": ["b"]})}, True),
        ("B", {"labels": parse_words({"desirable": ["a"], "undesirable": ["b"]})}, False),
    ],
)
def test_preferences_with_a_sign(value, how, expected):
    assert first_is_better(value, **how) is expected


@pytest.mark.parametrize(
    ("value", "how", "expected"),
    [
        (0, {}, "is a tie: 0. Nothing says which answer is the better one."),
        (-1, {"desirable_if": "<= -2"}, "is a tie: -1. '<= -2' holds for none of the answers. Nothing says"),
        (1, {"desirable_if": "<= 2"}, "is a tie: 1. '<= 2' holds for both of the answers. Nothing says"),
        (
            "A",
            {},
            'must be a number, below 0 where the first answer is better, above where the second one is, got "A".',
        ),
        (None, {}, "must be a number, below 0 where the first answer is better"),
        (True, {}, "must be a number, below 0 where the first answer is better"),
    ],
)
def test_preferences_that_do_not_say(value, how, expected):
    message = error_of(PAIR | {"overall_preference": value}, format="helpsteer3", **how)
    assert message.startswith(f"field 'overall_preference' {expected}")


def test_pairs_of_other_names_with_a_sign():
    row = {"q": "q", "one": "a", "two": "b", "preference_strength": -1}
    fields = {"prompt": "q", "output_A": "one", "output_B": "two", "label": "preference_strength"}
    assert read(row, format="helpsteer3", fields=fields) == [("q", "a", True), ("q", "b", False)]
    # without the format they are HALOs', where 1 says that the first one is better: nothing is guessed from a number
    message = error_of(row, fields=fields)
    assert message.startswith(
        "field 'preference_strength' must be 1 where 'one' is the better one, 0 where 'two' is, got -1."
    )
    assert message.endswith("set model.data.format=helpsteer3.")
    named = {"prompt": "q", "output_A": "a", "output_B": "b", "label": -2}
    assert read(named, format="helpsteer3") == [("q", "a", True), ("q", "b", False)]


# Langfuse

SCORE = {"name": "user-feedback", "value": 1}
TRACE = {"input": [user("q")], "output": assistant("a"), "scores": [SCORE]}


def test_several_scores_are_an_error_that_names_a_setting_for_each(write_jsonl):
    other = {"name": "tone", "value": 0, "dataType": "NUMERIC"}
    word = {"name": "kind", "stringValue": "good", "dataType": "CATEGORICAL"}
    path = write_jsonl(TRACE, TRACE | {"scores": [SCORE, other, word]})
    with pytest.raises(DataError) as caught:
        read_feedback([path])
    assert str(caught.value) == (
        f"{path}:2: there are 3 scores, each of which may be the label. Set "
        'model.data.fields={label: "scores[name=user-feedback].value"} or '
        'model.data.fields={label: "scores[name=tone].value"} or '
        'model.data.fields={label: "scores[name=kind].stringValue"}.'
    )
    rows = [TRACE | {"scores": [SCORE, other]}, TRACE | {"scores": [SCORE]}]
    fields = {"label": "scores[name=tone].value"}
    with pytest.raises(
        RecordError, match=r"is missing: 'scores' has no \[name=tone\]; the values of 'name' there: user-"
    ):
        read(*rows, fields=fields)
    assert read(rows[0], fields=fields) == [([user("q")], [assistant("a")], False)]


def test_scores_of_two_names_in_two_rows_are_several():
    """Two annotators' scores would be mixed, each row having but one."""
    other = [{"name": "tone", "value": 0}]
    assert error_of(TRACE, TRACE | {"scores": other}).startswith("f.jsonl:2: there are 2 scores,")


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([SCORE, SCORE], True),
        ([{**SCORE, "value": None, "stringValue": "True"}], True),
        ([{**SCORE, "dataType": "TEXT", "name": "note"}, {**SCORE, "value": False}], False),
        ([{"name": "x", "value": 3, "stringValue": "down", "dataType": "CATEGORICAL"}], False),
    ],
)
def test_scores(scores, expected):
    assert read(TRACE | {"scores": scores}) == [([user("q")], [assistant("a")], expected)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scores": []}, "field 'scores' is empty: nobody rated the answer."),
        (
            {"scores": [SCORE, {**SCORE, "value": 0}]},
            "'scores' has 2 elements [name=user-feedback], which do not agree",
        ),
        ({"scores": [{**SCORE, "value": 5}]}, "field 'scores[name=user-feedback]' must be true or false"),
        ({"scores": [{"name": "user-feedback"}]}, "field 'scores[name=user-feedback]' holds no single label: {"),
        (
            {"input": {"question": "q", "k": 3}},
            "field 'input' is an object of 'question', 'k'; to say which holds the prompt",
        ),
        ({"output": {"answer": "a"}}, "set model.data.fields={response: output.answer} or the like."),
        ({"output": {"output": {"x": 1}}}, "field 'output.output' is an object of 'x'"),
        (
            {"output": {"choices": [assistant("a"), assistant("b")]}},
            "field 'output.choices' holds 2 answers, of which one",
        ),
        ({"output": None}, "field 'output' must be a string or a list of messages, not a null."),
        ({"input": None}, "field 'input' must be a string or a list of messages, not a null."),
    ],
)
def test_traces_that_do_not_say(change, expected):
    assert expected in error_of(TRACE | change, format="langfuse")


def test_parts_of_objects_that_are_named():
    row = TRACE | {"input": {"question": "q"}, "output": {"answer": "a", "sources": []}}
    assert read(row, fields={"prompt": "input.question", "response": "output.answer"}) == [("q", "a", True)]
    row = TRACE | {"output": {"choices": [{"message": assistant("a")}, {"message": assistant("b")}]}}
    assert read(row, fields={"response": "output.choices[1].message"}) == [([user("q")], [assistant("b")], True)]
    row = TRACE | {"output": {"generations": [[{"text": "a"}, {"text": "b"}]]}}
    assert "set" not in error_of(row) and '"output.generations[0][0]"' in error_of(row)


def test_columns_of_scores_as_the_page_of_langfuse_exports_them():
    """Each score is a column with a list; null where nobody gave it."""
    row = {"id": "t", "input": [user("q")], "output": assistant("a"), "user-feedback": [1]}
    assert error_of(row).endswith("If another column holds it, set model.data.fields={label: <column>}.")
    fields = {"label": "user-feedback"}
    assert read(row, fields=fields) == read(row | {"user-feedback": [1, 1]}, fields=fields)
    assert "holds labels that do not agree: [1, 0]" in error_of(row | {"user-feedback": [1, 0]}, fields=fields)
    assert "field 'user-feedback' must be true or false" in error_of(row | {"user-feedback": None}, fields=fields)


def test_an_answer_that_is_json_is_text_only_if_somebody_says_so():
    """A model that answers in JSON, and a service that writes objects as strings, cannot be told apart."""
    row = TRACE | {"input": "q", "output": '{"colour": "red"}'}
    message = error_of(row)
    assert message == (
        "field 'output' is an object of 'colour'; to say which holds the response, set "
        "model.data.fields={response: output.colour} or the like. To take for text what spells no messages, set "
        "model.data.json_strings=messages."
    )
    for choice in ("messages", "text"):
        assert read(row, json_strings=choice) == [("q", '{"colour": "red"}', True)]
    spelled = row | {"input": json.dumps({"messages": [user("q")]})}
    assert read(spelled, json_strings="messages") == [([user("q")], [assistant('{"colour": "red"}')], True)]
    lists = row | {"input": json.dumps([[{"type": "human", "content": "q"}]])}
    assert read(lists, json_strings="messages") == [([user("q")], [assistant('{"colour": "red"}')], True)]
    mixed = error_of(row, row | {"output": "red"})
    assert mixed.startswith(
        "f.jsonl:1: field 'output' is the JSON of an object, and in line 2 it is text: set model.data."
    )
    assert "json_strings" not in error_of(row | {"output": {"colour": "red"}})


def test_ratings_in_scores():
    row = TRACE | {"scores": [{"name": "stars", "value": 4.5}]}
    assert [good for *_, good in read(row, desirable_if=">= 4")] == [True]
    assert [good for *_, good in read(row, desirable_if="> 4.5")] == [False]


# LangSmith

RUN = {
    "inputs": {"messages": [user("q")]},
    "outputs": {"generations": [{"message": assistant("a")}]},
    "feedback_stats": {"user_score": {"n": 1, "avg": 1.0}},
}


def test_several_kinds_of_feedback_are_an_error_that_names_a_setting_for_each():
    stats = {"user_score": {"n": 1, "avg": 0.0}, "tone": {"n": 1, "avg": None, "values": {"good": 1}}}
    message = error_of(RUN | {"feedback_stats": stats})
    assert message == (
        "f.jsonl:1: there are 2 scores, each of which may be the label. Set "
        "model.data.fields={label: feedback_stats.user_score.avg} or model.data.fields={label: feedback_stats.tone}."
    )
    found = read(RUN | {"feedback_stats": stats}, fields={"label": "feedback_stats.user_score.avg"})
    assert found == [([user("q")], [assistant("a")], False)]
    words = parse_words({"desirable": ["good"]})
    assert read(RUN | {"feedback_stats": stats}, fields={"label": "feedback_stats.tone"}, labels=words)[0][2] is True


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"feedback_stats": {}}, "field 'feedback_stats' is empty: nobody rated the answer."),
        ({"feedback_stats": {"s": {"n": 2, "avg": 0.5}}}, "got 0.5. To make labels of ratings, set"),
        ({"feedback_stats": {"s": {"n": 2, "avg": None, "values": {"a": 1, "b": 1}}}}, "holds no single label: "),
        ({"inputs": {"question": "q"}}, "set model.data.fields={prompt: inputs.question} or the like."),
        (
            {"outputs": {"generations": [[{"text": "a"}, {"text": "b"}]]}},
            "field 'outputs.generations[0]' holds 2 answers",
        ),
        (
            {"outputs": {"messages": [user("r"), assistant("a")]}},
            "field 'outputs' must hold exactly one message, of role 'assistant'; got: user, assistant.",
        ),
        (
            {"inputs": {"messages": [{"type": "developer", "content": "q"}]}},
            ", message 1: 'type' must be one of human, ai",
        ),
    ],
)
def test_runs_that_do_not_say(change, expected):
    assert expected in error_of(RUN | change)


def test_runs_as_cells_of_a_table():
    """The bulk export to Parquet has JSON in its columns."""
    assert read({name: json.dumps(value) for name, value in RUN.items()}) == read(RUN)


def test_calls_of_tools_as_langchain_and_its_services_write_them():
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"name": "f", "args": {"a": 1}, "id": "c1", "type": "tool_call"}
    asked = [{"type": "human", "content": "q"}]
    answer = {"type": "ai", "content": "", "tool_calls": [call]}
    row = Row("f", 1, RUN | {"inputs": {"messages": asked, "tools": tools}, "outputs": {"messages": [answer]}})
    (record,) = RowReader().settle([row]).read(row)
    written = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert record.response == [{"role": "assistant", "content": "", "tool_calls": [written]}] and record.tools == tools
    older = {"type": "ai", "data": {"content": "", "additional_kwargs": {"tool_calls": [written]}}}
    row = Row("f", 1, RUN | {"outputs": {"messages": [older]}, "extra": {"invocation_params": {"tools": tools}}})
    (record,) = RowReader().settle([row]).read(row)
    assert record.response == [{"role": "assistant", "content": "", "tool_calls": [written]}] and record.tools == tools


# chat-ui


def said(speaker: str, text: str, **more: Any) -> dict[str, Any]:
    return {"from": speaker, "content": text, **more}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([said("user", "q"), said("assistant", "a")], "field 'messages' holds no message with a score: nobody rated"),
        ([said("user", "q"), said("assistant", "a", score=0)], "field 'messages' holds no message with a score"),
        ([said("user", "q"), said("assistant", "a", score=3)], "field 'messages[1].score' must be true or false"),
        ([said("user", "q", score=1)], "field 'messages', message 1: has a score, but is not an answer of the"),
        ([said("assistant", "a", score=1)], "field 'messages', message 1: has a score, but is not an answer of the"),
        ([said("user", "q", files=[{}]), said("assistant", "a", score=1)], "message 1: 'files' cannot be trained on"),
        ([said("bot", "q"), said("assistant", "a", score=1)], "message 1: 'from' must be one of human"),
        (
            [said("user", "q"), said("assistant", "a"), said("assistant", "b", score=1)],
            "field 'messages', message 3: has a score, but is not an answer of the assistant to somebody else.",
        ),
        (
            [said("user", "q", id="1"), said("assistant", "a", score=1, ancestors=["0"])],
            "message 2: 'ancestors' names messages that are not there.",
        ),
        ("no list", "field 'messages' must be a list of messages."),
    ],
)
def test_conversations_of_chat_ui_that_do_not_say(messages, expected):
    assert expected in error_of({"messages": messages}, format="chatui")


def test_scores_of_chat_ui_with_words_and_thresholds():
    row = {"messages": [said("user", "q"), said("assistant", "a", score=-1)]}
    assert [good for *_, good in read(row, labels=parse_words({"desirable": [-1]}))] == [True]
    assert [good for *_, good in read(row, desirable_if=">= -1")] == [True]
    zero = {"messages": [said("user", "q"), said("assistant", "a", score=0)]}
    assert [good for *_, good in read(zero, desirable_if="> 0")] == [False]


def test_unrated_conversations_among_rated_ones_are_bad_records(write_jsonl):
    rated = {"messages": [said("user", "q"), said("assistant", "a", score=1)]}
    path = write_jsonl(*[{"messages": [said("user", "q"), said("assistant", "a")]}] * 3, rated)
    found = [record for chunk in read_chunks(Source(str(path)), 10) for record in parse_chunk(chunk)]
    assert [getattr(record, "field", None) for record in found] == ["messages"] * 3 + [None] and found[3].desirable
