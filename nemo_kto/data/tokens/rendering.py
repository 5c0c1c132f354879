"""`FeedbackRecord` -> the text of its prompt and of its response, as the model is to read them.

Messages go through the tokenizer's chat template. Strings are taken as they are, put into a `prompt_template`, or made
messages first.

Text that people wrote may spell a special token (`<|im_end|>`). What a template writes is control, what people wrote
is text; where it spells such a token, the characters are remembered (`Text.prompt_spans`), and tokenisation makes
ordinary tokens of them.

Dates. A chat template that names today's date is given a fixed one: a run that is resumed tomorrow, or a rank that
starts after midnight, must see the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from nemo_kto.data.reading.records import FeedbackRecord, RecordError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"
"""Value of `prompt_template` that makes messages of strings."""

# Stands in for the function by which templates ask for today's date; Llama 3's own template falls back to this day.
_FIXED_DATE_MACRO = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"

SpecialTokens = Literal["auto", "text", "control"]
Spans = tuple[tuple[int, int], ...]
"""(first character, character behind the last) of each special token that is to be ordinary text."""


@dataclass(frozen=True, slots=True)
class TokenizationSettings:
    """How records become tokens.

    Attributes:
        append_eod: End every response with the tokenizer's EOS token, unless it ends with one already.
        prompt_template: For prompts that are strings: text with `{prompt}` in the place of the prompt; or "chat",
            which makes a user's and an assistant's message of prompt and response; None to take them as they are.
        special_tokens: What special tokens spelled out in the data are. "text": ordinary text; "control": what they
            spell; "auto": text in messages and in what is put into a prompt template, control in strings that are
            taken as they are, because those may have been written in the model's own format.
    """

    append_eod: bool = True
    prompt_template: str | None = None
    special_tokens: SpecialTokens = "auto"


@dataclass(frozen=True, slots=True)
class Text:
    """Prompt and response as text.

    Attributes:
        prompt: The prompt.
        response: The response.
        templated: Whether a chat template wrote them, special tokens included.
        prompt_spans: Special tokens in the prompt that are to be ordinary text.
        response_spans: Those in the response.
        spelled: Whether strings that are taken as they are spell special tokens, which count as such.
    """

    prompt: str
    response: str
    templated: bool
    prompt_spans: Spans = ()
    response_spans: Spans = ()
    spelled: bool = False


class Renderer:
    """Renders records for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenizationSettings) -> None:
        """Keeps both; a tokenizer without a chat template renders strings only."""
        self._tokenizer = tokenizer
        self._settings = settings
        special = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
        names = sorted(special | {str(token) for token in tokenizer.all_special_tokens}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def render(self, record: FeedbackRecord) -> Text:
        """Returns a record's texts; raises a RecordError if its messages cannot be rendered."""
        prompt, response = record.prompt, record.response
        template = self._settings.prompt_template
        if isinstance(prompt, str) and template != CHAT:
            assert isinstance(response, str), record.place
            return self._plain(prompt, response, template)
        if isinstance(prompt, str):
            prompt, response = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": response}]
        assert isinstance(response, list), record.place
        return self._conversation(prompt + response, record)

    def _plain(self, prompt: str, response: str, template: str | None) -> Text:
        meaning = self._settings.special_tokens
        as_text = meaning == "text" or (meaning == "auto" and template is not None)
        spelled = not as_text and any(self._special.search(text) for text in (prompt, response))
        marker = _Marker(self._special, [prompt, response, template]) if as_text else None
        if marker is not None:
            prompt, response = marker.hide(prompt), marker.hide(response)
        if template is not None:
            prompt = template.replace("{prompt}", prompt)
        return _text(prompt, response, marker, templated=False, spelled=spelled)

    def _conversation(self, messages: list[dict[str, Any]], record: FeedbackRecord) -> Text:
        if not self._tokenizer.chat_template:
            raise RecordError(
                "the record is made of messages but the tokenizer has no chat template; use the tokenizer of a chat "
                "model, or write prompt and response as strings."
            )
        marker, given = None, (messages, record.tools, record.template_kwargs)
        if self._settings.special_tokens != "control" and any(map(self._special.search, _strings(given))):
            if any(self._special.search(message["role"]) for message in messages):
                raise RecordError("the role of a message spells a special token.")
            marker = _Marker(self._special, given)
            given = tuple(_hidden(part, marker.hide) for part in given)
        prompt, whole = self._apply_template(*given)
        if not whole.startswith(prompt):
            raise RecordError(
                "the chat template does not render the prompt as the beginning of the conversation, so the response "
                "cannot be told apart; write prompt and response as strings instead."
            )
        # The response is what the template writes after the prompt with its generation header, up to and including
        # EOS: the line break that many templates write after EOS is never generated, so it is not trained on either.
        response = whole[len(prompt) :]
        eos = self._tokenizer.eos_token
        if eos and response.rstrip().endswith(eos):
            response = response.rstrip()
        return _text(prompt, response, marker, templated=True)

    def _apply_template(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, variables: dict[str, Any] | None
    ) -> tuple[str, str]:
        """The prompt with its generation header, and the whole conversation."""
        kwargs: Mapping[str, Any] = {"tools": tools, "tokenize": False, **(variables or {})}
        apply = self._tokenizer.apply_chat_template
        try:
            template = self._tokenizer.get_chat_template(tools=tools)
            if "strftime_now" in template:
                template = _FIXED_DATE_MACRO + template
            prompt = apply(messages[:-1], chat_template=template, add_generation_prompt=True, **kwargs)
            whole = apply(messages, chat_template=template, **kwargs)
        except RecursionError as error:
            raise RecordError("the chat template refuses the messages (they are nested too deeply).") from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise RecordError(f"the chat template refuses the messages ({error}).") from error  # it is a program
        assert isinstance(prompt, str) and isinstance(whole, str)
        return prompt, whole


class _Marker:
    """Hides special tokens in texts behind characters that nothing else in them has, and finds them again."""

    def __init__(self, special: re.Pattern[str], given: Any) -> None:
        self._special = special
        self._hidden: list[str] = []
        used = {character for text in _strings(given) for character in text}
        sign = next((chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used), None)  # private use
        if sign is None:
            raise RecordError("the text spells special tokens and uses every character of Unicode's private use area.")
        self._sign = sign

    def hide(self, text: str) -> str:
        return self._special.sub(self._hide_one, text)

    def _hide_one(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._sign}{len(self._hidden) - 1}{self._sign}"

    def reveal(self, text: str) -> tuple[str, Spans]:
        """The text as it was, and where special tokens had been hidden."""
        parts: list[str] = []
        spans, length = [], 0
        for number, part in enumerate(re.split(f"{self._sign}([0-9]+){self._sign}", text)):
            if number % 2:
                part = self._hidden[int(part)]
                spans.append((length, length + len(part)))
            elif self._sign in part:
                raise RecordError("the chat template cuts through special tokens that the messages spell.")
            parts.append(part)
            length += len(part)
        return "".join(parts), tuple(spans)


def _text(prompt: str, response: str, marker: _Marker | None, *, templated: bool, spelled: bool = False) -> Text:
    if marker is None:
        return Text(prompt, response, templated, spelled=spelled)
    prompt, prompt_spans = marker.reveal(prompt)
    response, response_spans = marker.reveal(response)
    return Text(prompt, response, templated, prompt_spans, response_spans)


def _strings(value: Any) -> list[str]:
    """Every string in messages, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in _strings(part)]
    return [text for inner in value for text in _strings(inner)] if isinstance(value, list | tuple) else []


def _hidden(value: Any, hide: Callable[[str], str]) -> Any:
    """Messages with special tokens hidden in all of their strings."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {hide(key): _hidden(inner, hide) for key, inner in value.items()}
    return [_hidden(inner, hide) for inner in value] if isinstance(value, list) else value
