"""What a valid record is, whatever format it was written in."""

import json
from typing import Any

import pytest

from nemo_kto.data.reading.conversations import checked_answer, checked_kwargs, checked_tools, split_conversation
from nemo_kto.data.reading.records import BadRecord, FeedbackRecord, RecordError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be kind"}
NAMES = ("prompt", "completion")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def nested(depth: int) -> Any:
    """A number inside that many lists."""
    return json.loads("[" * depth + "1" + "]" * depth)


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(RecordError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def test_place_of_a_record():
    assert FeedbackRecord("p", "r", True, "a.jsonl", 3).place == "a.jsonl:3"


@pytest.mark.parametrize(
    ("field", "reason", "expected"),
    [
        (None, "the line is empty.", "a.jsonl:3: the line is empty."),
        ("label", "is missing.", "a.jsonl:3: field 'label' is missing."),
        ("prompt", ", message 2: 'role' is missing.", "a.jsonl:3: field 'prompt', message 2: 'role' is missing."),
    ],
)
def test_bad_record_as_text(field, reason, expected):
    assert str(BadRecord("a.jsonl", 3, field, reason)) == expected
    assert RecordError(reason, field).at("a.jsonl", 3) == BadRecord("a.jsonl", 3, field, reason)


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("p", "r", ("p", "r")),
        ("", "r", ("", "r")),
        ([USER], [ASSISTANT], ([USER], [ASSISTANT])),
        ([USER], ASSISTANT, ([USER], [ASSISTANT])),
        ([SYSTEM, USER, ASSISTANT, USER], [ASSISTANT], ([SYSTEM, USER, ASSISTANT, USER], [ASSISTANT])),
        # tables write a key that only some messages have as null in all others
        (
            [{**USER, "name": None, "tool_calls": None}],
            [{**ASSISTANT, "name": "bot"}],
            ([USER], [{**ASSISTANT, "name": "bot"}]),
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            [ASSISTANT],
            ([{"role": "user", "content": "ab"}], [ASSISTANT]),
        ),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, "b", {"text": "c"}]}],
            [{"role": "assistant", "content": [{"type": "output_text", "text": "d"}]}],
            ([{"role": "user", "content": "abc"}], [{"role": "assistant", "content": "d"}]),
        ),
        (
            [USER],
            [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
            ([USER], [{"role": "assistant", "tool_calls": [CALL]}]),
        ),
        # a string beside messages leaves one way only to take it
        ([USER], "hello", ([USER], [ASSISTANT])),
        ("hi", [ASSISTANT], ([USER], [ASSISTANT])),
        ("hi", ASSISTANT, ([USER], [ASSISTANT])),
        (USER, ASSISTANT, ([USER], [ASSISTANT])),
        ([{"from": "human", "value": "hi"}], {"from": "gpt", "value": "hello"}, ([USER], [ASSISTANT])),
        ([{"from": "user", "content": "hi"}], "hello", ([USER], [ASSISTANT])),
        (
            [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}],
            [ASSISTANT],
            ([USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}], [ASSISTANT]),
        ),
    ],
)
def test_valid_answers(prompt, response, expected):
    assert checked_answer(prompt, response, names=NAMES) == expected


@pytest.mark.parametrize(
    ("prompt", "response", "system", "expected"),
    [
        ("hi", "hello", "be kind", ([SYSTEM, USER], [ASSISTANT])),
        ([USER], [ASSISTANT], "be kind", ([SYSTEM, USER], [ASSISTANT])),
        (
            "hi",
            "hello",
            "",
            ([USER], [ASSISTANT]),
        ),  # the records of a file go one way, with a system prompt or without
        ([USER], [ASSISTANT], "", ([USER], [ASSISTANT])),
        ("hi", "hello", None, ("hi", "hello")),
    ],
)
def test_system_prompt_makes_messages_of_strings(prompt, response, system, expected):
    assert checked_answer(prompt, response, names=NAMES, system=system) == expected


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (3, "r", "field 'prompt' must be a string or a list of messages, not a number"),
        (None, "r", "field 'prompt' must be a string or a list of messages, not a null"),
        ({"a": 1}, "r", "field 'prompt' must be a string or a list of messages, not a object"),
        ({"role": "user"}, "r", "field 'prompt', message 1: 'content' is missing"),
        ("p", True, "field 'completion' must be a string or a list of messages, not a boolean"),
        ("p", b"r", "field 'completion' must be a string or a list of messages, not a bytes"),
        ([], [ASSISTANT], "field 'prompt' is an empty list of messages"),
        ([USER], [], "field 'completion' is an empty list of messages"),
        (["hi"], [ASSISTANT], "field 'prompt', message 1: must be an object, not a string"),
        ([USER, {"role": "user"}], [ASSISTANT], "field 'prompt', message 2: 'content' is missing"),
        ([USER, {"role": None, "content": "a"}], [ASSISTANT], "field 'prompt', message 2: 'role' is null"),
        (
            [{"role": 1, "content": ""}],
            [ASSISTANT],
            "field 'prompt', message 1: 'role' must be a string, not a number",
        ),
        ([{"role": "user", "content": {}}], [ASSISTANT], "message 1: 'content' must be a string, not a object"),
        ([USER], [{"role": "assistant", "content": None}], "field 'completion', message 1: 'content' is null"),
        ([USER], [{"role": "assistant", "tool_calls": []}], "field 'completion', message 1: 'content' is missing"),
        ([USER], [{**ASSISTANT, "tool_calls": "add"}], "message 1: 'tool_calls' must be a list of objects"),
        ([USER], [{**ASSISTANT, "tool_calls": [1]}], "message 1: 'tool_calls' must be a list of objects"),
        (
            [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
            [ASSISTANT],
            "message 1: 'content' has a part of type \"video\"; only text and images are read.",
        ),
        ([{"role": "user", "content": ["a", 1]}], [ASSISTANT], "message 1: 'content' has a part that is a number"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 1}]}],
            [ASSISTANT],
            "'content' has a part of type \"text\" whose 'text' is a number.",
        ),
        (
            [{"role": "user", "content": [{"type": "output_text"}]}],
            [ASSISTANT],
            "'content' has a part of type \"output_text\" whose 'text' is missing.",
        ),
        (
            [USER],
            [{"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]}],
            "'content' has a part of type \"thinking\"; only text and images are read.",
        ),
        (
            [USER],
            [{"role": "assistant", "content": None, "refusal": "No."}],
            "message 1: 'content' is null, and what is in 'refusal' is not trained on.",
        ),
        ([USER], [{"role": "assistant", "audio": {"id": "a"}}], "'content' is missing, and what is in 'audio' is not"),
        ([USER], [{"role": "assistant", "content": None, "refusal": None}], "message 1: 'content' is null."),
        ([USER], [{"from": "gpt"}], "message 1: 'value' is missing."),
        ([USER], [{"from": "gpt", "value": None}], "message 1: 'value' is null."),
        ([USER], [{"from": "assistant", "content": None}], "message 1: 'content' is null."),
        ([USER, {"role": "tool_response"}], [ASSISTANT], "field 'prompt', message 2: 'content' is missing."),
        ([USER, ASSISTANT], [ASSISTANT], "field 'prompt' ends with an assistant message"),
        ([USER], [USER], "field 'completion' must hold exactly one message, of role 'assistant'; got: user"),
        ([USER], [ASSISTANT, USER], "exactly one message, of role 'assistant'; got: assistant, user"),
        ([USER], [{"role": "assistant", "content": ""}], "field 'completion' is empty"),
        ("p", "", "field 'completion' is empty"),
        ("a\ud800", "r", "field 'prompt' holds half of a surrogate pair at character 2"),
        ("p", "\udfff", "field 'completion' holds half of a surrogate pair at character 1"),
        ([USER, {"role": "user", "content": "\ud800"}], [ASSISTANT], "field 'prompt', message 2: holds half of a"),
        ([{**USER, "\ud800": "a"}], [ASSISTANT], "field 'prompt', message 1: holds half of a surrogate pair"),
        ([{**USER, "x": {"y": ["\ud800"]}}], [ASSISTANT], "field 'prompt', message 1: holds half of a surrogate pair"),
        ([{**USER, "x": nested(500)}], [ASSISTANT], "field 'prompt' is nested too deeply"),
    ],
)
def test_refused_answers(prompt, response, expected):
    assert expected in error_of(checked_answer, prompt, response, names=NAMES)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER, ASSISTANT, ASSISTANT], "field 'messages' ends with two assistant messages"),
        ([USER, USER], "field 'messages' must end with the rated answer, a message of role 'assistant'; got: user"),
        # counted in the field that the user wrote, not in the part of it that became the response
        ([USER, {"role": "assistant"}], "field 'messages', message 2: 'content' is missing"),
    ],
)
def test_refused_answers_of_one_field(messages, expected):
    assert expected in error_of(checked_answer, messages[:-1], messages[-1:], names=("messages", "messages"))


@pytest.mark.parametrize(
    ("prompt", "system", "expected"),
    [
        ("p", 3, "field 'sys' must be a string, not a number"),
        ("p", [], "field 'sys' must be a string, not a list"),
        ("p", "\ud800", "field 'sys' holds half of a surrogate pair"),
        ([SYSTEM, USER], "be kind", "field 'sys' is set, and the messages begin with a system message as well"),
    ],
)
def test_refused_system_prompts(prompt, system, expected):
    response = "r" if isinstance(prompt, str) else [ASSISTANT]
    assert expected in error_of(checked_answer, prompt, response, names=NAMES, system=system, system_name="sys")


def test_last_message_of_a_conversation_is_the_answer():
    assert split_conversation([SYSTEM, USER, ASSISTANT], "messages") == ([SYSTEM, USER], [ASSISTANT])


@pytest.mark.parametrize("messages", [None, "hi", {}, [], [ASSISTANT]])
def test_conversation_that_cannot_be_split(messages):
    assert "field 'talk' must " in error_of(split_conversation, messages, "talk")


TOOL = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        ([], None),
        ("[]", None),
        ("null", None),
        ([TOOL], [TOOL]),
        (json.dumps([TOOL]), [TOOL]),
    ],
)
def test_tools(value, expected):
    assert checked_tools(value, "tools") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "must be a list of objects"),
        (TOOL, "must be a list of objects"),
        ([TOOL, "add"], "must be a list of objects"),
        ('{"a": 1}', "must be a list of objects"),
        ("[{]", "is a string that is no JSON"),
        ("[" * 5000, "is a string that is no JSON"),
        ([{"name": "\ud800"}], "holds half of a surrogate pair"),
        ([{"\ud800": 1}], "holds half of a surrogate pair"),
        ([{"name": nested(500)}], "is nested too deeply"),
    ],
)
def test_refused_tools(value, expected):
    message = error_of(checked_tools, value, "functions")
    assert message.startswith("field 'functions'") and expected in message


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ({}, None), ("", None), ({"thinking": False}, {"thinking": False}), ('{"a": 1}', {"a": 1})],
)
def test_template_kwargs(value, expected):
    assert checked_kwargs(value, "kwargs") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1], "must be an object, not a list"),
        ("3", "must be an object, not a number"),
        ("{", "is a string that is no JSON"),
        ({"a": 1, "tokenize": True}, "must not set 'tokenize'"),
        ({"messages": []}, "must not set 'messages'"),
        ({"add_generation_prompt": False}, "must not set 'add_generation_prompt'"),
        ({"a": "\ud800"}, ", 'a': holds half of a surrogate pair"),
    ],
)
def test_refused_template_kwargs(value, expected):
    message = error_of(checked_kwargs, value, "kwargs")
    assert message.startswith("field 'kwargs'") and expected in message
