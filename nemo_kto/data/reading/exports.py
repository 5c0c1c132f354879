"""Rows as services for chats and traces export them -> answers.

What a service keeps of a call is what went over the wire: messages or text, inside objects that differ with the
library that was traced. What such an object means is told by its keys; one with other keys is an error that says how
`fields` names the part that is wanted.

    langfuse      worker/src/features/database-read-stream (00385c5649), and `TraceWithFullDetails` of its public API
    langsmith     docs.langchain.com/langsmith/run-data-format and feedback-data-format; of chat models `inputs` and
                  `outputs` are what langchain_core/tracers writes
    chatui        huggingface/chat-ui src/lib/types/Message.ts (01b4c430c3), src/routes/admin/export (091529244127)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_kto.data.reading.columns import Answer, Columns
from nemo_kto.data.reading.paths import look_up, opened, setting_of
from nemo_kto.data.reading.records import RecordError, shown
from nemo_kto.data.reading.spellings import is_message


def trace(row: Columns) -> list[Answer]:
    """A call of a model: what went in, what came out, and how it was rated."""
    prompt = asked(row)
    column = row.column("response")
    response = _answered(row.need("response"), column, _as_text(row, "response"))
    if isinstance(prompt, list) and isinstance(response, list) and response[: len(prompt)] == prompt:
        # a graph returns the whole conversation, with its calls of tools
        prompt, response = prompt + response[len(prompt) : -1], response[-1:]
    return [Answer(prompt, response, _rated(row), (row.column("prompt"), column))]


def asked(row: Columns) -> Any:
    """The messages, or the text, that an exported input is or holds."""
    column, value = row.column("prompt"), _alone(row.need("prompt"))
    if not isinstance(value, Mapping) or is_message(value):
        return value
    for key in ("messages", "input", "prompt"):
        if value.get(key) is not None:
            return _alone(opened(value[key]))
    raise _unknown_keys(value, column, "prompt", _as_text(row, "prompt"))


def _answered(value: Any, place: str, hint: str) -> Any:
    """The message, or the text, that an exported output is or holds; its part that is looked at is at `place`."""
    value = _alone(value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping) and not is_message(value[0]):
        value, place = value[0], f"{place}[0]"
    if not isinstance(value, Mapping) or is_message(value):
        return value
    for key in ("generations", "choices"):
        if value.get(key):
            return _generated(opened(value[key]), f"{place}.{key}", hint)
    for key in ("message", "messages", "output", "content", "text"):
        if value.get(key) is not None:
            return _answered(opened(value[key]), f"{place}.{key}", hint)
    raise _unknown_keys(value, place, "response", hint)


def _generated(found: Any, place: str, hint: str) -> Any:
    """The answer among those that a model was asked for; a RecordError where there are several."""
    if _alone(found) is not found:
        found, place = found[0], f"{place}[0]"
    if isinstance(found, list) and len(found) == 1:
        return _answered(found[0], f"{place}[0]", hint)
    count = len(found) if isinstance(found, list) else "no"
    first = setting_of("response", f"{place}[0]")
    raise RecordError(f"holds {count} answers, of which one was rated; say which, for example with {first}.", place)


def _alone(value: Any) -> Any:
    """What is in a batch of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) else value


def _as_text(row: Columns, name: str) -> str:
    """What else can be done about an object that is written as a string."""
    is_string = isinstance(look_up(row.values, row.column(name)), str)
    return " To take for text what spells no messages, set model.data.json_strings=messages." if is_string else ""


def _unknown_keys(value: Mapping[str, Any], place: str, ours: str, hint: str) -> RecordError:
    there = ", ".join(f"'{key}'" for key in list(value)[:8]) or "nothing"
    example = setting_of(ours, f"{place}.{next(iter(value), '<key>')}")
    return RecordError(
        f"is an object of {there}; to say which holds the {ours}, set {example} or the like.{hint}", place
    )


def _rated(row: Columns) -> bool:
    """The label of a trace: a value, or a score or a statistic with one in it; several of them have to agree."""
    column = row.column("label")
    value = row.need("label")
    if value in ([], {}):
        raise RecordError("is empty: nobody rated the answer.", column)
    values = value if isinstance(value, list) else [value]
    judged = {row.judge.desirable(_score(opened(one), column), column) for one in values}
    if len(judged) != 1:
        raise RecordError(f"holds labels that do not agree: {shown(value)}.", column)
    return judged.pop()


def _score(value: Any, column: str) -> Any:
    """The label in a score of Langfuse or in a statistic of LangSmith."""
    if not isinstance(value, Mapping):
        return value
    if value.get("dataType") == "CATEGORICAL" and value.get("stringValue") is not None:
        return value["stringValue"]
    for key in ("value", "stringValue", "avg"):
        if value.get(key) is not None:
            return value[key]
    words = value.get("values")
    if isinstance(words, Mapping) and len(words) == 1:  # word -> how often it was given
        return next(iter(words))
    raise RecordError(f"holds no single label: {shown(value)}.", column)


def langfuse_labels(row: Columns) -> dict[str, str]:
    """Where the scores of a trace are, one place for each name -> where its value is."""
    scores = opened(look_up(row.values, "scores"))
    found = {}
    for score in scores if isinstance(scores, list) else ():
        kind = score.get("dataType") if isinstance(score, Mapping) else "TEXT"
        if kind in (None, "NUMERIC", "BOOLEAN", "CATEGORICAL") and score.get("name"):
            place = f"scores[name={score['name']}]"
            found[place] = place + (".stringValue" if kind == "CATEGORICAL" else ".value")
    return found


def langsmith_labels(row: Columns) -> dict[str, str]:
    """Where the statistics of a run's feedback are, one place for each key -> where its value is."""
    stats = opened(look_up(row.values, "feedback_stats"))
    if not isinstance(stats, Mapping):
        return {}
    places = {key: f"feedback_stats.{key}" for key in stats}
    return {places[key]: places[key] + (".avg" if _has_mean(stats[key]) else "") for key in stats}


def _has_mean(statistic: Any) -> bool:
    return isinstance(statistic, Mapping) and statistic.get("avg") is not None


def rated_messages(row: Columns) -> list[Answer]:
    """A conversation of which each message with a score is an answer, to what was said before it."""
    name, messages = row.column("messages"), row.need("messages")
    if not isinstance(messages, list):
        raise RecordError("must be a list of messages.", name)
    answers = []
    for number, message in enumerate(messages):
        score = _score_of(message)
        if score is None or (row.judge.threshold is None and score is not False and score == 0):  # taken back
            continue
        good = row.judge.desirable(_thumb(score, row), f"{name}[{number}].score")
        before = _before(messages, number, name)
        if not _is_assistants(message) or not before or _is_assistants(before[-1]):
            what = "is not an answer of the assistant to somebody else"
            raise RecordError(f", message {number + 1}: has a score, but {what}.", name)
        answers.append(Answer(before, [message], good, (name, name)))
    if not answers:
        raise RecordError("holds no message with a score: nobody rated an answer.", name)
    return answers


def has_scores(row: Columns) -> bool:
    """Whether a row looks like a conversation of chat-ui: its messages have `from` and `content`, or scores."""
    messages = opened(look_up(row.values, row.column("messages")))
    if not isinstance(messages, list):
        return False
    return any(
        isinstance(one, Mapping) and ({"from", "content"} <= {*one} or _score_of(one) is not None) for one in messages
    )


def _score_of(message: Any) -> Any:
    return message.get("score") if isinstance(message, Mapping) else None


def _is_assistants(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("from", message.get("role")) in ("assistant", "gpt")


def _thumb(score: Any, row: Columns) -> Any:
    """A score as a label: chat-ui's thumb down is -1, unless the user says what that means."""
    down = row.judge.threshold is None and "-1" not in row.judge.words and not isinstance(score, bool) and score == -1
    return False if down else score


def _before(messages: Sequence[Any], number: int, name: str) -> list[Any]:
    """What a message answers: its ancestors, where the conversation is a tree, or all that stand before it."""
    ancestors = messages[number].get("ancestors")
    if not isinstance(ancestors, list) or not ancestors:
        return list(messages[:number])
    known = {one["id"]: one for one in messages if isinstance(one, Mapping) and isinstance(one.get("id"), str)}
    if not all(isinstance(one, str) and one in known for one in ancestors):
        raise RecordError(f", message {number + 1}: 'ancestors' names messages that are not there.", name)
    return [known[one] for one in ancestors]
