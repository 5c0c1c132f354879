"""Each format, from rows as its own documentation or data sets show them."""

import json
from typing import Any

import pytest

from nemo_kto.data.reading.containers import Row
from nemo_kto.data.reading.formats import FIELDS, FORMATS
from nemo_kto.data.reading.records import FeedbackRecord, RecordError
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.errors import ConfigError, DataError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def turn(speaker: str, text: Any) -> dict[str, Any]:
    return {"from": speaker, "value": text}


def read(row: dict[str, Any], format: str = "auto", **how: Any) -> list[tuple[Any, Any, bool]]:
    reader = RowReader(format, **how)
    reader.check()
    place = Row("f.jsonl", 7, row)
    records = reader.settle([place]).read(place)
    assert all(record.place == "f.jsonl:7" for record in records)
    return [(record.prompt, record.response, record.desirable) for record in records]


def error_of(row: dict[str, Any], format: str = "auto", **how: Any) -> str:
    with pytest.raises(RecordError) as caught:
        read(row, format, **how)
    return str(caught.value)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ADD = {"name": "add", "arguments": {"a": 1, "b": 2}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": ADD}]}

LANGCHAIN_CALL = {"type": "ai", "content": None, "tool_calls": [{"name": "add", "args": {"a": 1, "b": 2}, "id": None}]}


def lc(kind: str, text: str) -> dict[str, Any]:
    """A message as langchain_core.load.dumpd writes it."""
    kwargs = {"content": text, "type": {"HumanMessage": "human", "AIMessage": "ai", "SystemMessage": "system"}[kind]}
    return {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", kind], "kwargs": kwargs}


def said(kind: str, text: str) -> dict[str, str]:
    """A message as LangChain's model_dump writes it."""
    return {"type": kind, "content": text, "id": None, "example": False}


# (the format that is found, a row, its records)
SAMPLES = {
    "NeMo-Aligner": (
        "nemo_aligner",
        {"prompt": "p", "response": "r", "preference": "chosen"},
        [("p", "r", True)],
    ),
    "NeMo-Aligner, thumbs down": (
        "nemo_aligner",
        {"prompt": "p", "response": "r", "preference": "rejected"},
        [("p", "r", False)],
    ),
    "NeMo-Aligner DPO": (
        "nemo_aligner_pairs",
        {"prompt": "p", "chosen_response": "c", "rejected_response": "r", "chosen_reward": 1.0, "rejected_reward": 0},
        [("p", "c", True), ("p", "r", False)],
    ),
    "TRL": ("trl", {"prompt": "p", "completion": "c", "label": False}, [("p", "c", False)]),
    "TRL, conversational": (
        "trl",
        {"prompt": [system("s"), user("q")], "completion": [assistant("a")], "label": True},
        [([system("s"), user("q")], [assistant("a")], True)],
    ),
    "TRL, tool call": (
        "trl",
        {"prompt": [user("1+2?")], "completion": [{**CALL, "content": None}], "label": True, "tools": [TOOL]},
        [([user("1+2?")], [CALL], True)],
    ),
    "TRL, pair with prompt": (
        "pairs",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        [("The sky is", " blue.", True), ("The sky is", " green.", False)],
    ),
    "TRL, pair without prompt": (
        "pairs",
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        [("The sky is", " blue.", True), ("The sky is", " green.", False)],
    ),
    "hh-rlhf": (
        "pairs",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hey", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        [("\n\nHuman: Hi\n\nAssistant:", " Hey", True), ("\n\nHuman: Hi\n\nAssistant:", " No", False)],
    ),
    "TRL, conversational pair": (
        "pairs",
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        [([user("q")], [assistant("a")], True), ([user("q")], [assistant("b")], False)],
    ),
    "TRL, conversational pair without prompt": (
        "pairs",
        {"chosen": [system("s"), user("q"), assistant("a")], "rejected": [system("s"), user("q"), assistant("b")]},
        [([system("s"), user("q")], [assistant("a")], True), ([system("s"), user("q")], [assistant("b")], False)],
    ),
    "ultrafeedback_binarized": (
        "pairs",
        {
            "prompt": "q",
            "prompt_id": "17",
            "chosen": [user("q"), assistant("a")],
            "rejected": [user("q"), assistant("b")],
            "messages": [user("q"), assistant("a")],
            "score_chosen": 8.5,
            "score_rejected": 8.5,
        },
        [([user("q")], [assistant("a")], True), ([user("q")], [assistant("b")], False)],
    ),
    "HALOs": (
        "halos",
        {
            "prompt": [user("q")],
            "output": [assistant("a")],
            "label": 1,
            "reward": 0.7,
            "prompt_id": 3,
            "type": "binary_feedback",
        },
        [([user("q")], [assistant("a")], True)],
    ),
    "HALOs, thumbs down": (
        "halos",
        {"prompt": [user("q")], "output": [assistant("a")], "label": 0, "type": "binary_feedback"},
        [([user("q")], [assistant("a")], False)],
    ),
    "HALOs, pair of which A is preferred": (
        "halos_pairs",
        {
            "prompt": [user("q")],
            "output_A": [assistant("a")],
            "output_B": [assistant("b")],
            "label": 1,
            "type": "pairwise_feedback",
        },
        [([user("q")], [assistant("a")], True), ([user("q")], [assistant("b")], False)],
    ),
    "HALOs, pair of which B is preferred": (
        "halos_pairs",
        {"prompt": [user("q")], "output_A": [assistant("a")], "output_B": [assistant("b")], "label": 0},
        [([user("q")], [assistant("a")], False), ([user("q")], [assistant("b")], True)],
    ),
    "LLaMA-Factory alpaca": (
        "alpaca",
        {
            "instruction": "Sum up.",
            "input": "A text.",
            "output": "It is one.",
            "system": "s",
            "history": [["q1", "a1"], ["q2", "a2"]],
            "kto_tag": False,
        },
        [
            (
                [system("s"), user("q1"), assistant("a1"), user("q2"), assistant("a2"), user("Sum up.\nA text.")],
                [assistant("It is one.")],
                False,
            )
        ],
    ),
    "LLaMA-Factory alpaca, instruction only": (
        "alpaca",
        {"instruction": "Say hi.", "input": "", "output": "hi", "history": [], "system": "", "kto_tag": True},
        [([user("Say hi.")], [assistant("hi")], True)],
    ),
    "LLaMA-Factory alpaca, input only": (
        "alpaca",
        {"instruction": "", "input": "Say hi.", "output": "hi", "kto_tag": True},
        [([user("Say hi.")], [assistant("hi")], True)],
    ),
    "LLaMA-Factory alpaca ranking": (
        "alpaca_pairs",
        {"instruction": "i", "input": "", "chosen": "c", "rejected": "r"},
        [([user("i")], [assistant("c")], True), ([user("i")], [assistant("r")], False)],
    ),
    "LLaMA-Factory sharegpt": (
        "sharegpt",
        {
            "conversations": [turn("human", "q1"), turn("gpt", "a1"), turn("human", "q2"), turn("gpt", "a2")],
            "system": "s",
            "kto_tag": True,
        },
        [([system("s"), user("q1"), assistant("a1"), user("q2")], [assistant("a2")], True)],
    ),
    "LLaMA-Factory sharegpt, tool calls": (
        "sharegpt",
        {
            "conversations": [
                turn("system", "s"),
                turn("human", "1+2?"),
                turn("function_call", json.dumps(ADD)),
                turn("observation", "3"),
                turn("gpt", "It is 3."),
            ],
            "tools": json.dumps([TOOL]),
            "kto_tag": True,
        },
        [
            (
                [system("s"), user("1+2?"), CALL, {"role": "tool", "content": "3"}],
                [assistant("It is 3.")],
                True,
            )
        ],
    ),
    "LLaMA-Factory sharegpt, rated tool call": (
        "sharegpt",
        {"conversations": [turn("human", "1+2?"), turn("function_call", json.dumps([ADD]))], "kto_tag": False},
        [([user("1+2?")], [CALL], False)],
    ),
    "LLaMA-Factory sharegpt ranking": (
        "message_pairs",
        {"conversations": [turn("human", "q")], "chosen": turn("gpt", "a"), "rejected": turn("gpt", "b")},
        [([user("q")], [assistant("a")], True), ([user("q")], [assistant("b")], False)],
    ),
    "OpenAI messages, a function_call": (
        "messages",
        {
            "messages": [user("1+2?"), {"role": "assistant", "content": None, "function_call": ADD}],
            "label": True,
        },
        [([user("1+2?")], [CALL], True)],
    ),
    "OpenAI messages, ranking": (
        "message_pairs",
        {"messages": [user("q")], "chosen": assistant("a"), "rejected": [assistant("b")]},
        [([user("q")], [assistant("a")], True), ([user("q")], [assistant("b")], False)],
    ),
    "OpenAI DPO": (
        "openai_dpo",
        {
            "input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant("a")],
            "non_preferred_output": [assistant("b")],
        },
        [([user("q")], [assistant("a")], True), ([user("q")], [assistant("b")], False)],
    ),
    "OpenAI DPO, flattened by pandas": (
        "openai_dpo",
        {
            "input.messages": json.dumps([user("q")]),
            "preferred_output": json.dumps([assistant("a")]),
            "non_preferred_output": json.dumps([assistant("b")]),
        },
        [([user("q")], [assistant("a")], True), ([user("q")], [assistant("b")], False)],
    ),
    "OpenAI DPO, an input of messages alone": (
        "openai_dpo",
        {"input": [user("q")], "preferred_output": assistant("a"), "non_preferred_output": assistant("b")},
        [([user("q")], [assistant("a")], True), ([user("q")], [assistant("b")], False)],
    ),
    "HelpSteer3, the first answer is better": (
        "helpsteer3",
        {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": -2, "domain": "general"},
        [([user("q")], [assistant("a")], True), ([user("q")], [assistant("b")], False)],
    ),
    "HelpSteer3, the second answer is better": (
        "helpsteer3",
        {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 1},
        [([user("q")], [assistant("a")], False), ([user("q")], [assistant("b")], True)],
    ),
    "Langfuse, public API": (
        "langfuse",
        {
            "timestamp": "2025-01-01T00:00:00Z",
            "name": "chat",
            "input": {"messages": [user("q")], "model": "m"},
            "output": assistant("a"),
            "scores": [
                {"name": "user-feedback", "value": 1, "dataType": "NUMERIC"},
                {"name": "comment", "stringValue": "nice", "dataType": "TEXT"},
            ],
        },
        [([user("q")], [assistant("a")], True)],
    ),
    "Langfuse, strings and a score in words": (
        "langfuse",
        {
            "input": "q",
            "output": "a",
            "scores": [{"name": "x", "value": 7, "stringValue": "down", "dataType": "CATEGORICAL"}],
        },
        [("q", "a", False)],
    ),
    "Langfuse, JSON in cells": (
        "langfuse",
        {
            "input": json.dumps({"messages": [user("q")], "tools": [TOOL]}),
            "output": json.dumps(assistant("a")),
            "scores": json.dumps([{"name": "x", "value": 0}]),
        },
        [([user("q")], [assistant("a")], False)],
    ),
    "LangSmith": (
        "langsmith",
        {
            "run_type": "llm",
            "inputs": {"messages": [user("q")]},
            "outputs": {"generations": [{"message": assistant("a")}]},
            "feedback_stats": {"user_score": {"n": 1, "avg": 1.0}},
        },
        [([user("q")], [assistant("a")], True)],
    ),
    "LangSmith, LangChain's own messages": (
        "langsmith",
        {
            "inputs": {"messages": [[lc("SystemMessage", "s"), lc("HumanMessage", "q")]]},
            "outputs": {"generations": [[{"text": "a", "message": lc("AIMessage", "a")}]], "llm_output": None},
            "feedback_stats": {"thumb": {"n": 2, "avg": 0.0, "values": {}}},
        },
        [([system("s"), user("q")], [assistant("a")], False)],
    ),
    "LangSmith, a chain": (
        "langsmith",
        {
            "inputs": {"input": "q"},
            "outputs": {"output": "a"},
            "feedback_stats": {"thumb": {"n": 1, "avg": None, "values": {"up": 1}}},
        },
        [("q", "a", True)],
    ),
    "LangSmith, a graph that returns the whole conversation": (
        "langsmith",
        {
            "inputs": {"messages": [said("human", "q")]},
            "outputs": {"messages": [said("human", "q"), LANGCHAIN_CALL, said("tool", "3"), said("ai", "It is 3.")]},
            "feedback_stats": {"thumb": {"n": 1, "avg": 1}},
        },
        [([user("q"), CALL, {"role": "tool", "content": "3"}], [assistant("It is 3.")], True)],
    ),
    "LangSmith, OpenAI's client": (
        "langsmith",
        {
            "inputs": {"messages": [user("q")], "model": "m"},
            "outputs": {"choices": [{"index": 0, "message": assistant("a")}], "usage": {}},
            "feedback_stats": {"thumb": {"n": 1, "avg": 1}},
        },
        [([user("q")], [assistant("a")], True)],
    ),
    "chat-ui": (
        "chatui",
        {
            "title": "t",
            "messages": [
                {"from": "system", "content": "s"},
                {"from": "user", "content": "q"},
                {"from": "assistant", "content": "a", "score": -1},
                {"from": "user", "content": "r"},
                {"from": "assistant", "content": "b", "score": 1},
            ],
        },
        [
            ([system("s"), user("q")], [assistant("a")], False),
            ([system("s"), user("q"), assistant("a"), user("r")], [assistant("b")], True),
        ],
    ),
    "chat-ui, its database": (
        "chatui",
        {
            "_id": "c",
            "messages": [
                {"from": "system", "content": "s", "id": "0", "ancestors": [], "children": ["1"]},
                {"from": "user", "content": "q", "id": "1", "ancestors": ["0"], "children": ["2", "3"]},
                {"from": "assistant", "content": "a", "id": "2", "ancestors": ["0", "1"], "score": -1},
                {
                    "from": "assistant",
                    "content": "b",
                    "id": "3",
                    "ancestors": ["0", "1"],
                    "score": 1,
                    "reasoning": "r",
                },
            ],
        },
        [
            ([system("s"), user("q")], [assistant("a")], False),
            ([system("s"), user("q")], [{**assistant("b"), "reasoning_content": "r"}], True),
        ],
    ),
    "chat-ui, with a label of one's own": (
        "messages",
        {
            "messages": [{"from": "user", "content": "q"}, {"from": "assistant", "content": "a", "score": 1}],
            "label": True,
        },
        [([user("q")], [assistant("a")], True)],
    ),
    "ms-swift": (
        "messages",
        {"messages": [system("s"), user("q"), assistant("a")], "label": True},
        [([system("s"), user("q")], [assistant("a")], True)],
    ),
    "LLaMA-Factory openai": (
        "messages",
        {"messages": [user("q"), assistant("a")], "kto_tag": False},
        [([user("q")], [assistant("a")], False)],
    ),
}


@pytest.mark.parametrize(("name", "row", "expected"), SAMPLES.values(), ids=SAMPLES)
def test_each_format_named_and_detected(name, row, expected):
    row = row | {"id": 3, "unknown": {"a": [None]}}  # other fields do no harm
    assert read(row, name) == expected
    assert read(row) == expected
    if not ({"conversations", "kto_tag"} & {*row}):  # those two are read alike under either name
        assert RowReader().settle([Row("f", 1, row)]).settled.format == name


def test_samples_are_of_every_format():
    assert {name for name, _, _ in SAMPLES.values()} == {*FORMATS}


@pytest.mark.parametrize(("name", "row", "expected"), SAMPLES.values(), ids=SAMPLES)
def test_columns_of_tables_that_are_null_do_no_harm(name, row, expected):
    every = ["prompt", "completion", "output", "response", "chosen", "rejected", "messages", "conversations", "label"]
    every += ["kto_tag", "preference", "instruction", "input", "history", "system", "tools", "chat_template_kwargs"]
    if isinstance(row.get("chosen"), str) and not {"prompt", "instruction"} & {*row}:
        every.remove("prompt")  # see test_a_pair_whose_prompt_is_null
    assert read(dict.fromkeys(every) | row) == expected


def test_tools_and_template_kwargs():
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    place = Row("f", 1, row | {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}})
    records = RowReader("pairs").read(place)
    assert records == [
        FeedbackRecord([user("q")], [assistant("a")], True, "f", 1, [TOOL], {"enable_thinking": False}),
        FeedbackRecord([user("q")], [assistant("b")], False, "f", 1, [TOOL], {"enable_thinking": False}),
    ]


def test_tables_hold_conversations_tools_and_kwargs_as_json():
    row = {"conversations": json.dumps([turn("human", "q"), turn("gpt", "a")]), "kto_tag": "true"}
    (record,) = RowReader("sharegpt").read(Row("f", 1, row | {"tools": json.dumps([TOOL]), "system": ""}))
    assert record == FeedbackRecord([user("q")], [assistant("a")], True, "f", 1, [TOOL], None)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("ab", "ac", ("a", "b", "c")),
        ("a b", "a c", ("a", " b", " c")),
        ("a  b", "a  c", ("a ", " b", " c")),
        ("né😀x", "né😀y", ("né😀", "x", "y")),
    ],
)
def test_common_beginning_of_strings(chosen, rejected, expected):
    prompt, one, other = expected
    assert read({"chosen": chosen, "rejected": rejected}) == [(prompt, one, True), (prompt, other, False)]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("", ""),
        ("", "a"),
        ("ab", "abc"),
        ("same", "same"),
        ("a", "b"),
        (" a", " b"),
        ([], []),
        ([user("q")], [user("r")]),
        ([user("q")], "q"),
        (1, 1),
    ],
)
def test_pairs_without_a_common_beginning(chosen, rejected):
    message = error_of({"good": chosen, "bad": rejected}, fields={"chosen": "good", "rejected": "bad"})
    assert message.startswith("field 'good' ")


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ([user("q")], [user("q"), assistant("a")], ([user("q")], [assistant("a")])),
        ("q", [user("q"), assistant("a")], ([user("q")], [assistant("a")])),
        ("q", [system("s"), user("q"), assistant("a")], ([system("s"), user("q")], [assistant("a")])),
    ],
)
def test_answer_that_repeats_the_prompt(prompt, response, expected):
    assert read({"prompt": prompt, "completion": response, "label": True}) == [(*expected, True)]


def test_answer_to_another_question_is_refused():
    message = error_of({"prompt": "q", "completion": [user("other"), assistant("a")], "label": True})
    assert message == "field 'completion' must hold exactly one message, of role 'assistant'; got: user, assistant."


def test_named_format_decides_over_the_fields():
    row = {"prompt": "p", "response": "r", "preference": "chosen", "completion": "c", "label": False}
    assert read(row, "nemo_aligner") == [("p", "r", True)]
    assert read(row, "trl") == [("p", "c", False)]


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        (  # axolotl chatml.argilla
            {"system": "s", "instruction": "q", "completion": "a", "label": True},
            {"prompt": "instruction"},
            ([system("s"), user("q")], [assistant("a")], True),
        ),
        (  # axolotl chatml.intel
            {"system": "", "question": "q", "completion": "a", "label": False},
            {"prompt": "question"},
            ([user("q")], [assistant("a")], False),
        ),
        (  # axolotl chatml.ultra and chatml.prompt_pairs
            {"system": None, "prompt": "q", "completion": "a", "label": 0},
            {},
            ("q", "a", False),
        ),
        (  # axolotl user_defined
            {"my_q": "q", "my_s": "s", "my_a": "a", "my_l": "false"},
            {"prompt": "my_q", "system": "my_s", "response": "my_a", "label": "my_l"},
            ([system("s"), user("q")], [assistant("a")], False),
        ),
        (
            {"talk": [user("q"), assistant("a")], "vote": "up"},
            {"messages": "talk", "label": "vote"},
            ([user("q")], [assistant("a")], True),
        ),
        (  # names of ours for other things
            {"label": "q", "prompt": "a", "x": True},
            {"prompt": "label", "response": "prompt", "label": "x"},
            ("q", "a", True),
        ),
    ],
)
def test_field_maps(row, fields, expected):
    assert read(row, fields=fields) == [expected]


def test_field_maps_of_pairs_and_of_alpaca():
    pair = {"prompt": "p", "better": "a", "worse": "b"}
    assert read(pair, fields={"chosen": "better", "rejected": "worse"}) == [("p", "a", True), ("p", "b", False)]
    row = {"task": "i", "text": "x", "output": "o", "past": [["q", "a"]], "kto_tag": True}
    fields = {"instruction": "task", "input": "text", "history": "past"}
    assert read(row, fields=fields) == [([user("q"), assistant("a"), user("i\nx")], [assistant("o")], True)]


@pytest.mark.parametrize(
    ("row", "how", "expected"),
    [
        ({"prompt": "p", "completion": "c", "score": 4}, {}, True),
        ({"prompt": "p", "completion": "c", "score": 3.9}, {}, False),
        ({"prompt": "p", "completion": "c", "rating": "5"}, {}, True),
        ({"prompt": "p", "output": "c", "reward": -1}, {}, False),
        ({"prompt": "p", "completion": "c", "score": 5, "label": False}, {}, True),
        ({"prompt": "p", "completion": "c", "label": 4}, {}, True),
        ({"prompt": "p", "completion": "c", "score": 5, "stars": 1}, {"fields": {"label": "stars"}}, False),
    ],
)
def test_ratings_with_a_threshold(row, how, expected):
    assert read(row, desirable_if=">= 4", **how) == [("p", "c", expected)]


def test_rating_that_is_no_number_names_its_column():
    row = {"prompt": "p", "completion": "c", "stars": "five"}
    message = error_of(row, fields={"label": "stars"}, desirable_if=">= 4")
    assert message == "field 'stars' must be a number, to be compared with '>= 4', got \"five\"."


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"q": 1, "a": "a", "l": 1}, {}, "field 'q' must be a string"),
        ({"q": "q", "a": 1, "l": 1}, {}, "field 'a' must be a string"),
        ({"q": "q", "a": "", "l": 1}, {}, "field 'a' is empty"),
        ({"q": "q", "a": "a", "l": "yes"}, {}, "field 'l' must be true or false"),
        ({"q": "q", "a": "a"}, {}, "field 'l' is missing"),
        ({"q": "q", "l": 1}, {}, "field 'a' is missing"),
        ({"q": "q", "a": "a", "l": 1, "s": 3}, {"system": "s"}, "field 's' must be a string"),
        ({"q": "q", "a": "a", "l": 1, "t": 3}, {"tools": "t"}, "field 't' must be a list of objects"),
        ({"q": "q", "a": "a", "l": 1, "k": 3}, {"chat_template_kwargs": "k"}, "field 'k' must be an object"),
        ({"q": [user("q")], "a": [user("a")], "l": 1}, {}, "field 'a' must hold exactly one message"),
        ({"q": [assistant("q")], "a": [assistant("a")], "l": 1}, {}, "field 'q' ends with an assistant message"),
    ],
)
def test_errors_name_the_users_columns(row, fields, expected):
    message = error_of(row, fields={"prompt": "q", "response": "a", "label": "l"} | fields)
    assert message.startswith(expected)


MAPPED = {"instruction": "task", "input": "text", "history": "past", "output_A": "one", "output_B": "two"}


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("alpaca", {"task": 1, "output": "o", "kto_tag": 1}, "field 'task' must be a string, not a number"),
        ("alpaca", {"task": "i", "text": [1], "output": "o", "kto_tag": 1}, "field 'text' must be a string"),
        (
            "alpaca",
            {"task": "i", "past": "x", "output": "o", "kto_tag": 1},
            "field 'past' is a string that is no JSON",
        ),
        ("alpaca", {"task": "i", "past": [["a"]], "output": "o", "kto_tag": 1}, "field 'past' must be a list of"),
        ("alpaca", {"task": "i", "past": [["a", None]], "output": "o", "kto_tag": 1}, "field 'past' must be a list"),
        ("alpaca", {"task": "\ud800", "output": "o", "kto_tag": 1}, "field 'task', message 1: holds half of a"),
        ("alpaca", {"task": "i", "output": "", "kto_tag": 1}, "field 'output' is empty"),
        ("alpaca_pairs", {"task": "i", "chosen": "c"}, "field 'rejected' is missing"),
        ("halos_pairs", {"prompt": "p", "one": "", "two": "b", "label": 1}, "field 'one' is empty"),
        ("halos_pairs", {"prompt": "p", "one": "a", "two": 2, "label": 1}, "field 'two' must be a string"),
        ("halos_pairs", {"prompt": "p", "one": "a", "label": 1}, "field 'two' is missing"),
    ],
)
def test_errors_of_other_formats_name_the_users_columns(format, row, expected):
    assert error_of(row, format, fields=MAPPED).startswith(expected)


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ("hi", "must be a list of messages, not a string"),
        ("[1, ", "is a string that is no JSON"),
        ([turn("human", "q")], "must hold at least two messages"),
        (
            [turn("human", "q"), turn("user", "a")],
            "must end with the rated answer, a message of role 'assistant'; got: user",
        ),
        ([turn("bot", "q"), turn("gpt", "a")], ", message 1: 'from' must be one of human, user, gpt"),
        ([turn("human", "q"), turn(["gpt"], "a")], ", message 2: 'from' must be one of"),
        ([turn("human", "q"), {"from": "gpt"}], ", message 2: 'value' is missing"),
        ([turn("human", "q"), turn("gpt", 1)], ", message 2: 'content' must be a string, not a number"),
        ([turn("human", "q"), turn("function_call", "{")], ", message 2: the text of a function_call is no JSON"),
        ([turn("human", "q"), turn("function_call", "3")], ", message 2: a function_call needs 'name'"),
        ([turn("human", "q"), turn("function_call", None)], ", message 2: a function_call needs 'name'"),
        ([turn("human", "q"), turn("function_call", "[]")], ", message 2: a function_call needs 'name'"),
        ([turn("human", "q"), "a"], ", message 2: must be an object, not a string"),
    ],
)
def test_refused_conversations(conversation, expected):
    message = error_of({"conversations": conversation, "kto_tag": True}, "sharegpt")
    assert message.startswith("field 'conversations'") and expected in message


REQUIRED = {"prompt", "response", "preference", "completion", "label", "chosen", "rejected", "output", "output_A"}
REQUIRED |= {"output_B", "instruction", "kto_tag", "conversations", "messages", "chosen_response", "rejected_response"}
OPTIONAL = {("pairs", "prompt"), ("pairs", "messages")}
# a column that has two names in a format goes by the first of them where it is missing
FIRST_NAMES = {
    "messages": {"kto_tag": "label"},
    "message_pairs": {"conversations": "messages"},
    "sharegpt": {"kto_tag": "label"},
}


@pytest.mark.parametrize(("format", "row", "_"), SAMPLES.values(), ids=SAMPLES)
def test_each_missing_field_is_named(format, row, _):
    for column in REQUIRED & {*row}:
        if (format, column) not in OPTIONAL:
            rest = {key: value for key, value in row.items() if key != column}
            name = FIRST_NAMES.get(format, {}).get(column, column)
            assert error_of(rest, format).startswith(f"field '{name}' is missing.")


def test_pair_of_nemo_aligner_without_prompt_is_not_split_where_its_answers_differ():
    row = {"chosen_response": "The sun.", "rejected_response": "The moon."}
    assert error_of(row, "nemo_aligner_pairs").startswith("field 'prompt' is missing.")
    assert error_of({**row, "prompt": None}, "nemo_aligner_pairs") == "field 'prompt' is null."


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "response": "r"}, "field 'preference' is missing."),
        ({"prompt": "p", "completion": "r"}, "field 'label' is missing."),
        ({"completion": "r", "label": True}, "field 'prompt' is missing."),
        ({"prompt": "p", "output": "r"}, "field 'label' is missing."),
        ({"prompt": "p", "chosen": "r"}, "field 'rejected' is missing."),
        ({"prompt": "p", "chosen_response": "r"}, "field 'rejected_response' is missing."),
        ({"prompt": "p", "output_A": "r", "output_B": "s"}, "field 'label' is missing."),
        ({"instruction": "i", "output": "o"}, "field 'kto_tag' is missing."),
        ({"messages": [user("q"), assistant("a")]}, "field 'label' is missing."),
    ],
)
def test_missing_field_in_the_first_record_is_named(row, expected):
    message = error_of(row)
    assert message.startswith(expected) and "model.data.fields" in message


@pytest.mark.parametrize("score", ["score", "rating", "reward"])
def test_ratings_without_a_threshold(score):
    message = error_of({"prompt": "p", "response": "r", score: 4})
    assert message.startswith("field 'preference' is missing.") and f"labels of '{score}'" in message
    assert "model.data.desirable_if" in message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c", "label": None}, "field 'label' must be true or false"),
        # the column that is there, not the one that the format would rather have
        ({"instruction": "i", "output": "o", "label": None}, "field 'label' must be true or false"),
        ({"prompt": "p", "response": "r", "label": None}, "field 'label' must be true or false"),
        ({"prompt": None, "response": "r", "preference": "chosen"}, "field 'prompt' must be a string"),
        ({"prompt": "p", "completion": None, "label": True}, "field 'completion' must be a string"),
        # such a first row is a bad record, and no reason to refuse its file
        ({"prompt": "p", "completion": None, "label": None}, "field 'label' must be true or false"),
    ],
)
def test_null_is_no_value(row, expected):
    message = error_of(row)
    assert message.startswith(expected) and "null" in message


@pytest.mark.parametrize(
    "row", [{}, {"prompt": "p"}, {"label": True}, {"text": "t", "id": 1}, {"label": None, "id": 1}]
)
def test_fields_of_no_format(row):
    with pytest.raises(DataError, match="^f.jsonl:7: the fields .* fit no known format") as caught:
        read(row)
    assert all(repr(name) in str(caught.value) for name in row)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"format": "csv"}, "'csv'.* auto, nemo_aligner, trl"),
        ({"fields": {"question": "q"}}, "unknown name 'question'.* prompt"),
        ({"fields": {"prompt": 3}}, "prompt=3 must be the name of a column"),
        ({"desirable_if": "high"}, "'high' must be a comparison"),
    ],
)
def test_impossible_readers(how, expected):
    with pytest.raises(ConfigError, match=expected):
        RowReader(**how).check()


def test_every_field_name_may_be_mapped():
    RowReader(fields={name: "x" for name in FIELDS}).check()
    assert {"prompt", "response", "label", "system", "tools", "messages", "chosen", "rejected"} <= {*FIELDS}


def test_a_pair_whose_prompt_has_another_name():
    """What two answers happen to begin with is not the prompt: Orca's pairs have it in `question`."""
    row = {"question": "2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."}
    assert (
        error_of(row) == "field 'prompt' is missing. If 'question' holds it, set model.data.fields={prompt: question}."
    )
    assert read(row, fields={"prompt": "question"}) == [("2 + 2?", "It is 4.", True), ("2 + 2?", "It is 5.", False)]


def test_a_pair_whose_prompt_is_null():
    row = {"prompt": None, "chosen": "It is 4.", "rejected": "It is 5."}
    assert error_of(row) == "field 'prompt' is null."


@pytest.mark.parametrize("column", ["videos", "audios", "rejected_images"])
def test_videos_and_sounds_are_refused(column):
    row = {"messages": [user("<video>what?"), assistant("a cat")], "label": True, column: ["cat.mp4"]}
    assert error_of(row) == f"field '{column}' cannot be trained on; only text and images are read."
    assert len(read(row | {column: []})) == 1


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}, "{", "3"])
def test_arguments_stay_as_they_were_written(arguments):
    """OpenAI writes a call's arguments as JSON in a string, others as an object; templates want one of the two."""
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    row = {"messages": [user("q"), {"role": "assistant", "tool_calls": [call]}], "label": True}
    ((_, (answer,), _),) = read(row)
    assert answer["tool_calls"] == [call]


def test_roles_of_ms_swift():
    messages = [
        user("Weather?"),
        {"role": "tool_call", "content": '{"name": "weather", "arguments": {}}'},
        {"role": "tool_response", "content": "sun"},
        assistant("Sunny."),
    ]
    ((prompt, answer, _),) = read({"messages": messages, "label": True})
    assert prompt[1] == {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}],
    }
    assert prompt[2] == {"role": "tool", "content": "sun"} and answer == [assistant("Sunny.")]


def test_a_threshold_is_for_ratings_not_for_which_of_two():
    row = {"prompt": "p", "output_A": "good", "output_B": "bad", "label": 1}
    assert read(row, desirable_if=">= 4") == [("p", "good", True), ("p", "bad", False)]


def test_the_label_column_is_one_for_a_file():
    """A rating that is missing is a bad record; the next column is no substitute, and may be on another scale."""
    first = {"prompt": "p", "response": "r", "score": 5, "reward": 0.9, "label": 1}
    reader = RowReader(desirable_if=">= 4").settle([Row("f", 1, first)])
    assert [record.desirable for record in reader.read(Row("f", 1, first))] == [True]
    with pytest.raises(RecordError, match="field 'score' must be a number"):
        reader.read(Row("f", 2, first | {"score": None}))
    first = {"prompt": "p", "response": "r", "preference": "chosen", "label": 1}
    reader = RowReader().settle([Row("f", 1, first)])
    with pytest.raises(RecordError, match="field 'preference' must be true or false"):
        reader.read(Row("f", 2, first | {"preference": None}))


def test_empty_cells_of_other_formats_do_no_harm():
    row = {"instruction": "i", "output": "o", "label": "1", "chosen": "", "rejected": ""}
    assert read(row, "alpaca") == [([user("i")], [assistant("o")], True)]
