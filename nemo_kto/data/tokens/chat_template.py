"""A tokenizer's chat template, applied to conversations.

The prompt is what inference sends. Where the conversation does not go on from it, the answer is found in it all the
same: behind the answer's header.

Dates. A template that asks for today's date is given a fixed one: a run that is resumed tomorrow, or a rank that
starts after midnight, must see the same tokens.

Tool calls. OpenAI writes the arguments of a call as a string with JSON in it, most templates expect an object, some
insist on a string. A template gets them as the record has them; in the other form if it refuses those, or if it would
put the string, quoted once more, into JSON of its own.

Images. A message that shows some is a list of parts, and so is every message where a template, as LLaVA's, finds texts
only in such lists.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jinja2 import TemplateError

from nemo_kto.data.reading.records import Messages, RecordError
from nemo_kto.data.tokens.contents import as_parts, images_in, joined
from nemo_kto.data.tokens.lost_parts import REASONING, Part, lost
from nemo_kto.data.tokens.reasoning import OPEN, thought_of, under_known_name, written_behind
from nemo_kto.data.tokens.special_text import hidden
from nemo_kto.data.tokens.tool_calls import arguments_of, as_object, as_string, leaves, quoted_twice, with_arguments

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
_PROBE_ANSWER = {"role": "assistant", "content": _PROBE}

INSTRUCTIONS = ("system", "developer")
"""Roles of messages that say how to answer."""

SystemPrompts = Literal["keep", "merge_into_user", "drop"]

IN_FIELD = "the chat template reads reasoning in the field"
OTHER_ARGUMENTS = "the chat template takes tool-call arguments in another form than the record has them in: it gets {}"


CLOSED_BLOCK = (
    "at inference the chat template puts an empty block in front of the answer, which it does not write into the "
    "conversation; the answer is put behind it"
)
OPEN_BLOCK = (
    "the chat template writes the conversation otherwise than the prompt of inference goes on; the response begins "
    "behind the tokens with which both begin"
)
REASONING_KEPT = (
    "the chat template takes reasoning out of every answer; that of the rated one is kept, as the model writes it"
)
EARLIER_TURNS = (
    "the chat template writes earlier turns otherwise once they are answered; the prompt is that of inference"
)


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as a chat template writes it.

    Attributes:
        prompt: All messages but the last, with the header of the answer: what inference sends.
        answer: What the template writes behind the prompt; where `continues` is false, behind the prompt without
            header.
        header: The header of the answer, as far as it can be told.
        whole: All messages.
        continues: Whether the response is the answer. If not, it begins behind the tokens with which `prompt` and
            `whole` both begin.
        notes: What was done to the messages, or found, that a person should know.
    """

    prompt: str
    answer: str
    header: str
    whole: str
    continues: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Given:
    """What a template gets besides messages."""

    tools: list[Any] | None
    variables: dict[str, Any]


_NOTHING = _Given(None, {})


class ChatTemplate:
    """Applies the chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str], added: re.Pattern[str]) -> None:
        """Keeps the tokenizer, which has a template, and the patterns of its special and of all added tokens."""
        self._tokenizer = tokenizer
        self._special = special
        self._added = added

    def knows(self, variable: str, tools: list[Any] | None) -> bool:
        """Whether a variable of that name is in the template that is used with such tools."""
        template = self._template(tools)
        return re.search(rf"\b{re.escape(variable)}\b", template) is not None

    @cached_property
    def end(self) -> str | None:
        """The special token that the template writes behind an answer; None if there is none, or it cannot be told."""
        try:
            _, behind, rest = self._apply([{"role": "user", "content": "a"}, _PROBE_ANSWER], _NOTHING).partition(
                _PROBE
            )
        except RecordError:
            return None
        found = self._special.search(rest) if behind else None
        return found[0] if found else None

    def prompt(self, messages: Messages) -> str:
        """Returns messages with the header of an answer; raises a RecordError if they are refused."""

        def render(form: Messages) -> str:
            return self._apply(form, _NOTHING, add_generation_prompt=True)

        messages, _ = under_known_name(messages, self._template(None))
        text, notes = self._first_form(messages, render, as_object)
        if not notes and quoted_twice(messages, text):
            text = render(with_arguments(messages, as_object))
        return text

    def conversation(
        self, messages: Messages, tools: list[Any] | None, variables: dict[str, Any] | None, hide: Callable[[str], str]
    ) -> Rendering:
        """Returns a conversation that ends with an answer.

        Args:
            messages: The conversation.
            tools: JSON schemas.
            variables: Others for the template.
            hide: Hides special tokens, see `Marker`; those that only the JSON of arguments spells come up here.

        Raises:
            RecordError: The template refuses it, or nothing tells where the answer begins.
        """
        given = _Given(tools, variables or {})

        def as_hidden_object(arguments: Any) -> Any:
            return hidden(as_object(arguments), hide)

        def render(form: Messages) -> Rendering:
            prompt = self._apply(form[:-1], given, add_generation_prompt=True)
            whole = self._apply(form, given)
            return self._with_reasoning(form, given, prompt, whole) or self._divided(form, given, prompt, whole)

        messages, field = under_known_name(messages, self._template(tools))
        rendering, notes = self._first_form(messages, render, as_hidden_object)
        objects = with_arguments(messages, as_hidden_object)
        if not notes and objects != messages and not _has_arguments(messages, rendering.whole):
            with contextlib.suppress(RecordError):  # strings are all that the template takes
                rendering, notes = render(objects), (OTHER_ARGUMENTS.format("objects"),)
        notes += () if field is None else (f"{IN_FIELD} '{field}' of a message: it gets it there",)
        return replace(rendering, notes=notes + rendering.notes)

    def _with_reasoning(self, messages: Messages, given: _Given, prompt: str, whole: str) -> Rendering | None:
        """A conversation with the reasoning in the answer's content that the template takes out; None if it is there.

        Also None where the model has no place for it behind that prompt.
        """
        content = messages[-1].get("content", "")
        thought, _ = thought_of(content)
        if not lost([Part(REASONING, thought)], whole, self._special):
            return None
        header = _header(prompt, self._apply(messages[:-1], given))
        written = written_behind(header, content)
        try:
            probe = {**messages[-1], "content": _PROBE}
            before, found, behind = self._apply([*messages[:-1], probe], given).partition(_PROBE)
        except RecordError:
            return None
        if written is None or not found or (OPEN not in header and before != prompt):
            return None
        answer = written + behind
        return Rendering(prompt, answer, header, prompt + answer, notes=(REASONING_KEPT,))

    def _divided(self, messages: Messages, given: _Given, prompt: str, whole: str) -> Rendering:
        """A conversation with its answer told apart."""
        if whole.startswith(prompt):
            answer = whole[len(prompt) :]
            return Rendering(prompt, answer, _header(prompt, self._apply(messages[:-1], given)), whole)
        plain = self._apply(messages[:-1], given)
        header, common = _header(prompt, plain), common_length(prompt, whole)
        goes_on = bool(plain) and prompt.startswith(plain) and whole.startswith(plain)
        if goes_on and common > len(plain):  # with a part of the header
            block = self._closed_block(prompt, common)
            if block is not None:
                return Rendering(prompt, whole[block:], header, whole, notes=(CLOSED_BLOCK,))
            return Rendering(prompt, whole[len(plain) :], header, whole, continues=False, notes=(OPEN_BLOCK,))
        answer_begins = self._behind_header(messages, given, header, whole)
        if answer_begins is not None:
            return Rendering(prompt, whole[answer_begins:], header, whole, notes=(EARLIER_TURNS,))
        if goes_on:
            return Rendering(prompt, whole[len(plain) :], header, whole, continues=False, notes=(OPEN_BLOCK,))
        raise RecordError(
            "the chat template does not render the prompt as the beginning of the conversation, so the response "
            "cannot be told apart; write prompt and response as strings instead."
        )

    def _closed_block(self, prompt: str, common: int) -> int | None:
        """Where an empty block begins that ends a prompt, and of which `common` characters hold at most the beginning.

        None if there is none, or it is open.
        """
        tags = [found for found in self._added.finditer(prompt) if found.end() > common]
        return tags[0].start() if tags and len(tags) % 2 == 0 and tags[0].start() <= common else None

    def _behind_header(self, messages: Messages, given: _Given, header: str, whole: str) -> int | None:
        """Where the answer begins in a conversation whose earlier turns are not those of the prompt."""
        try:
            before, found, _ = self._apply([*messages[:-1], _PROBE_ANSWER], given).partition(_PROBE)
        except RecordError:
            return None
        common = whole[: common_length(before, whole)]
        wanted = header.strip()
        place = common.rfind(wanted) if found and wanted else -1
        if place < 0:
            return None
        end = place + len(wanted)
        space = header[len(header.rstrip()) :]
        return end + len(space) if whole.startswith(space, end) else end

    def _first_form(
        self, messages: Messages, render: Callable[[Messages], _T], to_object: Callable[[Any], Any]
    ) -> tuple[_T, tuple[str, ...]]:
        """What the first form of some messages that is not refused becomes, and what was done to them."""
        try:
            return render(messages), ()
        except RecordError as error:
            for form, note in _other_forms(messages, to_object):
                try:
                    return render(form), (note,)
                except RecordError:
                    continue  # the error is that of the messages as they are
            raise error

    def _template(self, tools: list[Any] | None) -> str:
        """The template that is used with such tools, where there are several."""
        try:
            return self._tokenizer.get_chat_template(tools=tools)
        except ValueError as error:
            raise RecordError(f"no chat template can be chosen ({error}).") from error

    @cached_property
    def _reads_parts_only(self) -> bool:
        """Whether the template finds texts only in lists of parts."""

        def writes(messages: Messages) -> bool:
            try:
                return _PROBE in self._written(messages, _NOTHING)
            except RecordError:
                return False

        probe: Messages = [{"role": "user", "content": _PROBE}]
        return not writes(probe) and writes(as_parts(probe))

    def _apply(self, messages: Messages, given: _Given, *, add_generation_prompt: bool = False) -> str:
        form = as_parts(messages) if self._reads_parts_only else messages
        return self._written(form, given, add_generation_prompt=add_generation_prompt)

    def _written(self, messages: Messages, given: _Given, *, add_generation_prompt: bool = False) -> str:
        template = self._template(given.tools)
        if "strftime_now" in template:
            template = _DATE_MACRO + template
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tools=given.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **given.variables,
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
    waiting: list[Any] = []
    for message in messages:
        if message["role"] in INSTRUCTIONS:
            waiting.append(message.get("content", ""))
            if system == "drop" and images_in([message]):
                raise RecordError(
                    f"the {message['role']} message, which is left out, has an image. Set model.data.system=keep."
                )
        elif message["role"] == "user" and system == "merge_into_user" and waiting:
            kept.append({**message, "content": joined([*waiting, message.get("content", "")])})
            waiting = []
        else:
            kept.append(message)
    if waiting and system == "merge_into_user":
        raise RecordError(
            "no user's message follows the system message, to be merged with it. Set model.data.system=drop to leave "
            "it out, or model.data.system=keep."
        )
    if all(message["role"] == "assistant" for message in kept):
        raise RecordError("no prompt is left without the system message. Set model.data.system=keep.")
    return kept


def _header(prompt: str, plain: str) -> str:
    """The header of the answer in a prompt: what the same without it does not have."""
    return prompt[common_length(prompt, plain) :]


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many characters, or tokens, two texts begin with alike; `os.path.commonprefix` compares one by one."""
    low, high = 0, min(len(first), len(second))
    middle = high
    while low < high:
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    return low


def _has_arguments(messages: Messages, text: str) -> bool:
    """Whether the arguments that are strings of JSON are in a text, and not as a string inside of JSON."""
    written = [value for message in messages for value in arguments_of(message) if isinstance(value, str)]
    there = (value in text or all(leaf in text for leaf in leaves(as_object(value))) for value in written)
    return all(there) and not quoted_twice(messages, text)


def _other_forms(messages: Messages, to_object: Callable[[Any], Any]) -> Iterator[tuple[Messages, str]]:
    """Other ways to write what messages say: with other arguments, with an empty text for none, or with both."""
    filled = [{"content": "", **message} for message in messages]
    for base in (messages, filled) if filled != messages else (messages,):
        for name, convert in (("objects", to_object), ("strings", as_string)):
            form = with_arguments(base, convert)
            if form != base:
                yield form, OTHER_ARGUMENTS.format(name)
        if base is messages and filled != messages:
            yield filled, "the chat template refuses messages without content: theirs is empty text"
