"""A tokenizer's chat template, applied to conversations.

Dates. A template that asks for today's date is given a fixed one: a run that is resumed tomorrow, or a rank that
starts after midnight, must see the same tokens.

Tool calls. OpenAI writes the arguments of a call as a string with JSON in it, most templates expect an object, some
insist on a string. A template gets them as the record has them; in the other form if it refuses those, or if it would
put the string, quoted once more, into JSON of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jinja2 import TemplateError

from nemo_kto.data.reading.records import Messages, RecordError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")

_DATE = datetime(2024, 7, 26)
"""What Llama 3's own template falls back to."""

_DIRECTIVES = ("-d", "-m", "-H", "-I", "-M", "-S", *"aAbBcdefGHIjmMpSuUVwWxXyYzZ")
"""Of `strftime`, behind the percent sign."""


def _date_macro() -> str:
    """Stands in for the function by which templates ask for the date; functions are not let through to them."""
    replaced = "part" + "".join(f"|replace('%{name}', '{_DATE.strftime('%' + name)}')" for name in _DIRECTIVES)
    percent = "{%- if not loop.first -%}{{ '%' }}{%- endif -%}"  # between what two of them had divided
    loop = f"{{%- for part in format.split('%%') -%}}{percent}{{{{ {replaced} }}}}{{%- endfor -%}}"
    return f"{{%- macro strftime_now(format) -%}}{loop}{{%- endmacro -%}}"


_DATE_MACRO = _date_macro()

_PROBE = "\ue0f0"
"""An answer that no template has in it."""

INSTRUCTIONS = ("system", "developer")
"""Roles of messages that say how to answer."""

SystemPrompts = Literal["keep", "merge_into_user", "drop"]

OTHER_ARGUMENTS = "the chat template takes tool-call arguments in another form than the record has them in: it gets {}"


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as a chat template writes it.

    Attributes:
        prompt: All messages but the last, with the header of the answer.
        whole: All messages.
        plain_prompt: The prompt without that header.
        notes: What was done to make the template take the messages.
    """

    prompt: str
    whole: str
    plain_prompt: Callable[[], str]
    notes: tuple[str, ...] = ()

    def divided(self) -> tuple[str, str, bool]:
        """Returns prompt and answer, which together are the conversation, and whether it goes on from `prompt`.

        Where it does not, they are divided where the answer's header begins.

        Raises:
            RecordError: It does not even begin as the prompt does.
        """
        if self.whole.startswith(self.prompt):
            return self.prompt, self.whole[len(self.prompt) :], True
        plain = self.plain_prompt()
        if not plain or not (self.prompt.startswith(plain) and self.whole.startswith(plain)):
            raise RecordError(
                "the chat template does not render the prompt as the beginning of the conversation, so the response "
                "cannot be told apart; write prompt and response as strings instead."
            )
        return plain, self.whole[len(plain) :], False


class ChatTemplate:
    """Applies the chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str]) -> None:
        """Keeps the tokenizer, which has a template, and the pattern of its special tokens."""
        self._tokenizer = tokenizer
        self._special = special

    def knows(self, variable: str) -> bool:
        """Whether a variable of that name is in the template."""
        template = self._tokenizer.get_chat_template()
        return re.search(rf"\b{re.escape(variable)}\b", template) is not None

    @cached_property
    def end(self) -> str | None:
        """The special token that the template writes behind an answer; None if there is none, or it cannot be told."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        try:
            _, behind, rest = self._apply(probe, None, {}).partition(_PROBE)
        except RecordError:
            return None
        found = self._special.search(rest) if behind else None
        return found[0] if found else None

    def prompt(self, messages: Messages, tools: list[Any] | None, variables: dict[str, Any] | None) -> str:
        """Returns messages with the header of an answer; raises a RecordError if they are refused."""
        return self._first_form(messages, lambda form: self._header(form, tools, variables))[0]

    def conversation(self, messages: Messages, tools: list[Any] | None, variables: dict[str, Any] | None) -> Rendering:
        """Returns a conversation that ends with an answer; raises a RecordError if it is refused."""

        def render(form: Messages) -> Rendering:
            prompt, whole = self._header(form[:-1], tools, variables), self._apply(form, tools, variables)
            return Rendering(prompt, whole, lambda: self._apply(form[:-1], tools, variables))

        rendering, notes = self._first_form(messages, render)
        if not notes and _quoted_twice(messages, rendering.whole):
            objects = _with_arguments(messages, _as_object)
            rendering, notes = render(objects), (OTHER_ARGUMENTS.format("objects"),)
        return Rendering(rendering.prompt, rendering.whole, rendering.plain_prompt, notes)

    def _header(self, messages: Messages, tools: list[Any] | None, variables: dict[str, Any] | None) -> str:
        return self._apply(messages, tools, variables, add_generation_prompt=True)

    def _first_form(self, messages: Messages, render: Callable[[Messages], _T]) -> tuple[_T, tuple[str, ...]]:
        """What the first form of some messages that is not refused becomes, and what was done to them."""
        try:
            return render(messages), ()
        except RecordError as error:
            for form, note in _other_forms(messages):
                try:
                    return render(form), (note,)
                except RecordError:
                    continue  # the error is that of the messages as they are
            raise error

    def _apply(
        self,
        messages: Messages,
        tools: list[Any] | None,
        variables: dict[str, Any] | None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            template = self._tokenizer.get_chat_template(tools=tools)
            if "strftime_now" in template:
                template = _DATE_MACRO + template
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(variables or {}),
            )
        except RecursionError as error:
            raise RecordError("the chat template refuses the messages (they are nested too deeply).") from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise RecordError(f"the chat template refuses the messages ({error}).") from error  # it is a program
        assert isinstance(text, str)
        return text


def instructed(messages: Messages, system: SystemPrompts) -> Messages:
    """Messages of which those that say how to answer are kept, merged into what the user says next, or dropped."""
    if system == "keep" or not any(message["role"] in INSTRUCTIONS for message in messages):
        return messages
    kept: Messages = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] in INSTRUCTIONS:
            waiting.append(message.get("content", ""))
        elif message["role"] == "user" and system == "merge_into_user" and waiting:
            kept.append({**message, "content": "\n\n".join([*waiting, message.get("content", "")])})
            waiting = []
        else:
            kept.append(message)
    if waiting and system == "merge_into_user":
        raise RecordError("no user's message follows the system message that model.data.system would merge into it.")
    if all(message["role"] == "assistant" for message in kept):
        raise RecordError(f"model.data.system={system} leaves no prompt.")
    return kept


def arguments_of(message: dict[str, Any]) -> Iterator[Any]:
    """Yields the arguments of a message's tool calls, as they are written."""
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        if isinstance(function, dict) and "arguments" in function:
            yield function["arguments"]


def _other_forms(messages: Messages) -> Iterator[tuple[Messages, str]]:
    """Other ways to write what messages say: with other arguments, or with an empty text for none."""
    for name, convert in (("objects", _as_object), ("strings", _as_string)):
        form = _with_arguments(messages, convert)
        if form != messages:
            yield form, OTHER_ARGUMENTS.format(name)
    filled = [{"content": "", **message} for message in messages]
    if filled != messages:
        yield filled, "the chat template refuses messages without content: theirs is empty text"


def _with_arguments(messages: Messages, convert: Callable[[Any], Any]) -> Messages:
    def call(of: dict[str, Any]) -> dict[str, Any]:
        if isinstance(of.get("function"), dict):
            return {**of, "function": call(of["function"])}
        return {**of, "arguments": convert(of["arguments"])} if "arguments" in of else of

    return [
        {**message, "tool_calls": [call(of) for of in message["tool_calls"]]} if message.get("tool_calls") else message
        for message in messages
    ]


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments  # what the model wrote is no JSON: it stays as it was written
    return value if isinstance(value, dict) else arguments


def _as_string(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _quoted_twice(messages: Messages, text: str) -> bool:
    """Whether arguments that are JSON in a string stand in a text as a JSON string instead."""
    written = {value for message in messages for value in arguments_of(message) if isinstance(value, str)}
    objects = [value for value in written if isinstance(_as_object(value), dict)]
    return any(value not in text and json.dumps(value, ensure_ascii=False)[1:-1] in text for value in objects)
