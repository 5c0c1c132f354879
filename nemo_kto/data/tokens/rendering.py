"""`FeedbackRecord` -> the text of its prompt and of its response, as the model is to read them.

Messages go through the tokenizer's chat template. Strings are taken as they are, put into a `prompt_template`, or made
messages first.

Text that people wrote may spell a special token (`<|im_end|>`). What a template writes is control, what people wrote
is text; where it spells such a token, the characters are remembered (`Text.prompt_spans`), and tokenisation makes
ordinary tokens of them. So what a template writes for an image is told from what people wrote; what the model's
processor shows of the image takes its place.

Where the response ends. A template ends an answer with a special token of its own, usually the tokenizer's EOS token.
What it writes behind that, a line break or the EOS token of another model, is never generated, so it is not trained
on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from nemo_kto.data.reading.records import FeedbackRecord, Image, Messages, RecordError, shown
from nemo_kto.data.tokens.chat_template import (
    CLOSED_BLOCK,
    EARLIER_TURNS,
    IN_FIELD,
    INSTRUCTIONS,
    OPEN_BLOCK,
    REASONING_KEPT,
    ChatTemplate,
    Rendering,
    SystemPrompts,
    common_length,
    instructed,
)
from nemo_kto.data.tokens.contents import texts_of
from nemo_kto.data.tokens.endings import ended
from nemo_kto.data.tokens.lost_parts import REASONING, Part, answer_parts, lost, prompt_parts
from nemo_kto.data.tokens.pictures import ImageReader, SeenImage
from nemo_kto.data.tokens.reasoning import CLOSE, OPEN, reasoning_of
from nemo_kto.data.tokens.special_text import Marker, Spans, hidden, strings, token_pattern
from nemo_kto.data.tokens.tool_calls import arguments_of, as_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"
"""Value of `prompt_template` that makes messages of strings."""

SpecialTokens = Literal["auto", "text", "control"]
TemplateLosses = Literal["error", "warn"]

_REASONING_TAGS = {OPEN, CLOSE}
_KEEP_REASONING = (
    "Put it into 'content' between <think> and </think>, if the model writes it so; where the prompt of inference has "
    "closed that block, chat_template_kwargs may open it (enable_thinking, or thinking). Or "
)
SPELLED_BY_ASSISTANT = (
    "special tokens that an assistant's message spells are taken as text; model.data.special_tokens=control makes "
    "them what they spell"
)
SEVERAL_FRAMES = "an image has several frames, of which the first is taken"
TOO_DEEP = "an image has more than 256 shades of grey, of which all but the darkest are white, as in transformers"
_SHOWN = 60
"""Characters around a place that an example shows."""


@dataclass(frozen=True, slots=True)
class TokenizationSettings:
    """How records become tokens.

    Attributes:
        append_eod: End every response with the tokenizer's EOS token, unless it ends with that, or with the token by
            which the chat template ends an answer, already.
        prompt_template: For prompts that are strings: text with `{prompt}` in the place of the prompt; or "chat",
            which makes a user's and an assistant's message of prompt and response; None to take them as they are.
        special_tokens: What special tokens spelled out in the data are. "text": ordinary text; "control": what they
            spell; "auto": text in messages and in what is put into a prompt template, control in strings that are
            taken as they are, because those may have been written in the model's own format.
        system: What becomes of system and developer messages. "keep": the chat template gets them;
            "merge_into_user": the next user's message begins with them; "drop": they are left out.
        template_losses: What an answer is of which the chat template leaves out a part. "error": a bad record;
            "warn": what is left of it is trained on.
    """

    append_eod: bool = True
    prompt_template: str | None = None
    special_tokens: SpecialTokens = "auto"
    system: SystemPrompts = "keep"
    template_losses: TemplateLosses = "error"


@dataclass(frozen=True, slots=True)
class Note:
    """Something about a record that a person should know, though it can be used.

    Attributes:
        kind: What; equal for equal things, which are counted.
        example: What it looks like in this record.
    """

    kind: str
    example: str


@dataclass(frozen=True, slots=True)
class Text:
    """Prompt and response as text.

    Attributes:
        prompt: The prompt.
        response: The response; where `continues` is false, the whole conversation.
        templated: Whether a chat template wrote them, special tokens included.
        prompt_spans: Special tokens in the prompt that are to be ordinary text.
        response_spans: Those in the response.
        spelled: Whether strings that are taken as they are spell special tokens, which count as such.
        continues: Whether the response goes on from the prompt. If not, the prompt is what inference would send, but
            the conversation goes on otherwise behind some of its last tokens.
        ended: Whether the response ends with the chat template's own end token.
        notes: What a person should know.
        images: What the prompt shows, in order.
    """

    prompt: str
    response: str
    templated: bool
    prompt_spans: Spans = ()
    response_spans: Spans = ()
    spelled: bool = False
    continues: bool = True
    ended: bool = False
    notes: tuple[Note, ...] = ()
    images: tuple[SeenImage, ...] = ()


class Renderer:
    """Renders records for one tokenizer.

    Attributes:
        template: The tokenizer's chat template, if it has one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: TokenizationSettings, images: ImageReader | None = None
    ) -> None:
        """Keeps all; a tokenizer without a chat template renders strings only, and without `images` there are none."""
        self._settings = settings
        self._images = images
        self._eos = tokenizer.eos_token
        self._lacking = [name for name in ("bos_token", "eos_token") if getattr(tokenizer, name) is None]
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token.content) for token in added if token.special} | set(
            map(str, tokenizer.all_special_tokens)
        )
        special -= _REASONING_TAGS  # they end nothing, and templates divide answers at them
        self._special_tokens = special
        self._special = token_pattern(special)
        self._added = token_pattern(special | _REASONING_TAGS | {str(token.content) for token in added})
        self.template = ChatTemplate(tokenizer, self._special, self._added) if tokenizer.chat_template else None

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
        return self._conversation(prompt + response, record, self.see(record.images))

    def see(self, images: Sequence[Image]) -> tuple[SeenImage, ...]:
        """Returns what is shown of some images; raises a RecordError if one is of no use, or the model takes none."""
        if not images:
            return ()
        if self._images is None:
            raise RecordError(
                "the record has an image, and this model takes none here: models that are trained on images are those "
                "of Qwen2.5-VL, LLaVA and Gemma 3. Take such records out of the data."
            )
        return self._images.look_at(images)

    def render_prompt(self, prompt: str | Messages, images: tuple[SeenImage, ...] = ()) -> Text:
        """Returns a prompt as inference sends it, and no response; raises a RecordError if it cannot be rendered."""
        template = self._settings.prompt_template
        if isinstance(prompt, str) and template != CHAT:
            return self._plain(prompt, "", template)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        messages, _, _, marker = self._given(prompt, None, None, images)
        assert self.template is not None
        text = self._with_images(self.template.prompt(messages), images)
        return _text(text, "", marker, templated=True, images=images)

    def _plain(self, prompt: str, response: str, template: str | None) -> Text:
        meaning = self._settings.special_tokens
        as_text = meaning == "text" or (meaning == "auto" and template is not None)
        spelled = not as_text and any(self._special.search(text) for text in (prompt, response))
        marker = Marker(self._special, [prompt, response, template]) if as_text else None
        if marker is not None:
            prompt, response = marker.hide(prompt), marker.hide(response)
        if template is not None:
            prompt = template.replace("{prompt}", prompt)
        return _text(prompt, response, marker, templated=False, spelled=spelled)

    def _given(
        self,
        messages: Messages,
        tools: list[Any] | None,
        variables: dict[str, Any] | None,
        images: Sequence[SeenImage] = (),
    ) -> tuple[Messages, list[Any] | None, dict[str, Any] | None, Marker | None]:
        """What the chat template gets of a conversation, and what finds hidden special tokens again."""
        if self.template is None:
            raise RecordError(
                "the record is made of messages but the tokenizer has no chat template; use the tokenizer of a chat "
                "model, or write prompt and response as strings."
            )
        messages = instructed(messages, self._settings.system)
        given = messages, tools, variables
        spelled = [as_object(value) for message in messages for value in arguments_of(message)]
        special = self._special if not images else self._special_with_placeholder
        if self._settings.special_tokens == "control" or not any(map(special.search, strings((given, spelled)))):
            return *given, None
        if any(special.search(message["role"]) for message in messages):
            raise RecordError("the role of a message spells a special token.")
        marker = Marker(special, given)
        messages, tools, variables = (hidden(part, marker.hide) for part in given)
        return messages, tools, variables, marker

    @cached_property
    def _special_with_placeholder(self) -> re.Pattern[str]:
        """Special tokens, and what the chat template writes for an image, if that is none."""
        assert self._images is not None
        return token_pattern({*self._special_tokens, self._images.placeholder})

    def _with_images(self, text: str, images: Sequence[SeenImage]) -> str:
        """What a chat template wrote, with what the model's processor shows of each image."""
        return text if self._images is None or not images else self._images.put_into(text, images)

    def _conversation(self, conversation: Messages, record: FeedbackRecord, images: tuple[SeenImage, ...]) -> Text:
        messages, tools, variables, marker = self._given(conversation, record.tools, record.template_kwargs, images)
        assert self.template is not None
        hide = _as_it_is if marker is None else marker.hide
        try:
            rendering = self.template.conversation(messages, tools, variables, hide)
        except RecordError as error:
            raise self._with_advice(error, messages, tools, variables, hide) from error

        def clear(text: str) -> str:
            return text if marker is None else marker.reveal(text)[0]

        answer, end, behind = ended(
            rendering.answer, messages[-1], special=self._special, eos=self._eos, usual=self.template.end
        )
        losses = self._lost_of_answer(messages[-1], rendering.header, answer, clear)
        losses += lost(prompt_parts(messages[:-1], tools), rendering.prompt, self._special)
        notes = [Note(kind, self._example(kind, rendering, messages, clear)) for kind in rendering.notes]
        notes += [Note(f"the chat template leaves out {part.name}", shown(clear(part.text))) for part in losses]
        notes += [
            Note(f"the chat template has no variable '{name}'", shown(value))
            for name, value in (record.template_kwargs or {}).items()
            if not self.template.knows(name, tools)
        ]
        notes += [
            Note(f"the chat template writes {name}, and the tokenizer has none: nothing stands there", shown(name))
            for name in self._lacking
            if self.template.knows(name, tools)
        ]
        notes += self._notes_on_end(clear(answer), end, behind)
        notes += [
            Note(SEVERAL_FRAMES, shown(image.image.file or f"{image.frames} frames"))
            for image in images
            if image.frames > 1
        ]
        notes += [Note(TOO_DEEP, shown(image.image.file or "in the data")) for image in images if image.deep]
        written = [text for message in conversation if message["role"] == "assistant" for text in texts_of(message)]
        if marker is not None and (found := self._special.search("\0".join(written))):
            notes.append(Note(SPELLED_BY_ASSISTANT, shown(found[0])))
        notes = [*{note.kind: note for note in reversed(notes)}.values()][::-1]  # the first of each kind
        response = answer
        if not rendering.continues:
            response = self._with_images(rendering.whole[: -len(rendering.answer)] + answer, images)
        return _text(
            self._with_images(rendering.prompt, images),
            response,
            marker,
            templated=True,
            continues=rendering.continues,
            ended=end is not None,
            notes=notes,
            images=images,
        )

    def _example(self, kind: str, rendering: Rendering, messages: Messages, clear: Callable[[str], str]) -> str:
        """What a note on a rendering shows."""
        if kind == REASONING_KEPT:
            return shown(clear(rendering.answer))
        if kind.startswith(IN_FIELD):
            return shown(clear(next(filter(None, map(reasoning_of, messages)))))
        if kind in (OPEN_BLOCK, CLOSED_BLOCK, EARLIER_TURNS):
            prompt, whole = clear(rendering.prompt), clear(rendering.whole)
            common = common_length(prompt, whole)
            begin = max(0, common - _SHOWN // 2)
            window = slice(begin, begin + _SHOWN)
            return f"{shown(prompt[window])} at inference, {shown(whole[window])} here"
        return shown([value for message in messages for value in arguments_of(message)])

    def _lost_of_answer(
        self, message: dict[str, Any], header: str, answer: str, clear: Callable[[str], str]
    ) -> list[Part]:
        """The parts of an answer that are not in its rendering; a RecordError if it cannot be trained on without."""
        losses = lost(answer_parts(message), answer, self._special)
        if losses:  # an answer may begin with what its header has
            losses = lost(answer_parts(_behind(self._special.split(header)[-1], message)), answer, self._special)
        rest = self._added.sub("", answer)
        if not rest or (losses and not rest.strip()):
            what = "".join(f": it leaves out {part.name}, {shown(clear(part.text))}" for part in losses[:1])
            raise RecordError(f"the chat template writes nothing of the answer but its end{what}.")
        if losses and self._settings.template_losses == "error":
            raise RecordError(
                f"the chat template leaves {losses[0].name} out of the answer, {shown(clear(losses[0].text))}. "
                + (_KEEP_REASONING if losses[0].name == REASONING else "Use a template that writes it, or ")
                + "set model.data.template_losses=warn to train on the rest."
            )
        return losses

    def _notes_on_end(self, answer: str, end: str | None, behind: str) -> list[Note]:
        notes = []
        if end is None and self._settings.append_eod:
            kind = f"the chat template ends an answer with no token of its own; the EOS token {self._eos} is put there"
            notes.append(Note(kind, shown(answer[-_SHOWN:])))
        if behind.strip():
            notes.append(Note(f"what the chat template writes behind {end} is not trained on", shown(behind)))
        if end is not None and self._eos not in (None, end):
            kind = (
                f"answers end with {end}, as the chat template has it, not with the tokenizer's EOS token {self._eos}"
            )
            notes.append(Note(kind, shown(answer[-_SHOWN:])))
        return notes

    def _with_advice(
        self,
        error: RecordError,
        messages: Messages,
        tools: list[Any] | None,
        variables: dict[str, Any] | None,
        hide: Callable[[str], str],
    ) -> RecordError:
        """The error, and what to set if the template refuses only the system prompt."""
        assert self.template is not None
        roles = [message["role"] for message in messages if message["role"] in INSTRUCTIONS]
        if not roles:
            return error
        for system in ("merge_into_user", "drop"):
            try:
                self.template.conversation(instructed(messages, system), tools, variables, hide)
            except RecordError:
                continue
            return RecordError(
                f"{error.reason} It takes them without the {roles[0]} message: set model.data.system={system}"
                + (" to put it into the user's, or model.data.system=drop." if system != "drop" else ".")
            )
        return error


def _behind(header: str, message: dict[str, Any]) -> dict[str, Any]:
    """An answer without a beginning that is the end of its header, some lines of it."""
    content = message.get("content", "").lstrip()
    lines = header.splitlines()
    for number in range(len(lines)):
        end = "\n".join(lines[number:]).strip()
        if end and content.startswith(end):
            return {**message, "content": content[len(end) :]}
    return message


def _as_it_is(text: str) -> str:
    return text


def _text(
    prompt: str,
    response: str,
    marker: Marker | None,
    *,
    templated: bool,
    spelled: bool = False,
    continues: bool = True,
    ended: bool = False,
    notes: Iterable[Note] = (),
    images: tuple[SeenImage, ...] = (),
) -> Text:
    found: tuple[Spans, Spans] = ((), ())
    if marker is not None:
        (prompt, first), (response, second) = marker.reveal(prompt), marker.reveal(response)
        found = first, second
    return Text(prompt, response, templated, *found, spelled, continues, ended, tuple(notes), images)
