"""`FeedbackRecord` -> tokens, so that training sees a prompt exactly as inference will.

The boundary between prompt and response. At inference the prompt is tokenised without the response, which is then
generated token by token. So the prompt's tokens are those of the prompt alone. The response's tokens are what follows
the prompt's tokens in the tokenisation of prompt + response, whenever that begins with the prompt's tokens (it nearly
always does). Where the tokenizer would merge the last characters of the prompt with the first of the response, the
response is tokenised on its own, because generation cannot change a token of the prompt. Where a conversation does not
go on from the prompt of inference (a chat template that opens a block of reasoning at inference only), both are
tokenised, and the prompt is the tokens with which both begin.

Beginning of sequence. For strings, whatever the tokenizer puts in front of a text (usually one BOS token) is put in
front of the prompt once, and not again when the text already begins with it. For messages the chat template alone
decides, as it does at inference; but the processor of a model that takes images treats what the template wrote as a
string. Tokens that a tokenizer appends to a text are never taken over.

Special tokens that people wrote (see rendering.py) become the tokens of their characters.

Shapes: `p` tokens of the prompt, `r` tokens of the response.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nemo_kto.data.reading.records import EMPTY, BadRecord, FeedbackRecord, Image, Messages, RecordError
from nemo_kto.data.tokens.chat_template import common_length
from nemo_kto.data.tokens.dividing import Divider
from nemo_kto.data.tokens.pictures import ImageReader, ImageTokens, SeenImage
from nemo_kto.data.tokens.rendering import Note, Renderer, Text, TokenizationSettings
from nemo_kto.data.tokens.special_text import Spans
from nemo_kto.data.tokens.stored_images import StoredImage
from nemo_kto.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# A text of several tokens in any vocabulary, to see what a tokenizer puts in front of it.
_PROBE = "a b c 0 1 2"
# A text that stays a token of its own in front of another, see _encode_after_boundary.
_ANCHOR = "\n"
_NO_PROMPT = "the prompt has no tokens and the tokenizer adds no BOS token."


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """One trainable record.

    Attributes:
        prompt: [p] int64 token ids, p >= 1.
        response: [r] int64 token ids, r >= 1.
        desirable: True for thumbs up.
        prompt_key: `prompt_key(prompt, ...)`: equal for samples of the same prompt.
        weight: What its loss is multiplied with.
        images: What the prompt shows, in order.
    """

    prompt: Tensor
    response: Tensor
    desirable: bool
    prompt_key: int
    weight: float = 1.0
    images: tuple[StoredImage, ...] = ()


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """A record's tokens.

    Attributes:
        prompt: [p] token ids, p >= 1.
        response: [r] token ids, r >= 1.
        desirable: True for thumbs up.
        merged: Whether the tokenizer would merge the last characters of the prompt with the first of the response.
        verbatim: Whether prompt and response are strings that were taken as they are.
        spelled: Whether those spell special tokens, which count as such.
        weight: What its loss is multiplied with.
        notes: What a person should know; the examples begin with the record's place.
        images: What the prompt shows, in order.
        image_start: Where in the prompt the first token is that stands for an image; 0 without images.
    """

    prompt: list[int]
    response: list[int]
    desirable: bool
    merged: bool
    verbatim: bool
    spelled: bool
    weight: float = 1.0
    notes: tuple[Note, ...] = ()
    images: tuple[SeenImage, ...] = ()
    image_start: int = 0


def prompt_key(prompt: Tensor | np.ndarray, images: Sequence[int] = ()) -> int:
    """A 63-bit number that is the same for equal prompts [p] on every machine and in every process.

    Args:
        prompt: Its tokens.
        images: The keys of the images that it shows; other images with the same tokens are another prompt.
    """
    return token_key(np.concatenate([np.asarray(prompt, dtype=np.int64), np.asarray(images, dtype=np.int64)]))


def token_key(tokens: np.ndarray | list[int]) -> int:
    """The same of any tokens [n] of any integer type."""
    digest = hashlib.blake2b(np.asarray(tokens, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Encoder:
    """Tokenises records by the rules at the top of this file.

    Attributes:
        tokenizer: Any transformers tokenizer; records made of messages need one with a chat template.
        settings: How.
        images: Reads images; None where the model takes none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: TokenizationSettings, images: ImageTokens | None = None
    ) -> None:
        """Keeps all; `images` is what to know of a model that takes some.

        Raises:
            ConfigError: `settings.append_eod` with a tokenizer that has no EOS token; or one that does not work here.
        """
        if settings.append_eod and tokenizer.eos_token_id is None:
            raise ConfigError(
                f"The tokenizer in {tokenizer.name_or_path} has no EOS token: set eos_token in its "
                "tokenizer_config.json, or model.data.append_eod=false."
            )
        self.tokenizer = tokenizer
        self.settings = settings
        self.images = None if images is None else ImageReader(images, tokenizer)
        self._renderer = Renderer(tokenizer, settings, self.images)
        self._divider = Divider(tokenizer)
        self._special_ids = frozenset(
            [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
            + tokenizer.all_special_ids
        )
        self._prefix = self._find_special_prefix()

    def encode(self, records: Sequence[FeedbackRecord | BadRecord]) -> list[EncodedRecord | BadRecord]:
        """Returns the tokens of each record, and what is wrong with those that have none."""
        results: list[EncodedRecord | BadRecord] = []
        texts: list[tuple[int, FeedbackRecord, Text]] = []
        for record in records:
            if isinstance(record, FeedbackRecord):
                try:
                    texts.append((len(results), record, self._renderer.render(record)))
                    bad = BadRecord(record.source, record.line, None, "")  # until its tokens are there
                except RecordError as error:
                    bad = error.at(record.source, record.line)
                results.append(bad)
            else:
                results.append(record)
        for place, result in self._encode_texts(texts):
            results[place] = result
        return results

    def see(self, images: Sequence[Image]) -> tuple[SeenImage, ...]:
        """Returns what is shown of some images; raises a RecordError if one is of no use, or the model takes none."""
        return self._renderer.see(images)

    def encode_prompt(self, prompt: str | Messages, images: tuple[SeenImage, ...] = ()) -> list[int]:
        """Returns the tokens of a prompt as inference sends it; raises a RecordError if it has none.

        Args:
            prompt: The prompt.
            images: What it shows, in the order of its parts that are images; see `see`.
        """
        text = self._renderer.render_prompt(prompt, images)
        (tokens,) = self._encode([(text.prompt, text.prompt_spans)])
        tokens = self._with_prefix(text, tokens)
        if not tokens:
            raise RecordError(_NO_PROMPT)
        self._image_start(tokens, images)
        return tokens

    def _image_start(self, prompt: list[int], images: Sequence[SeenImage]) -> int:
        """Where the first token is that stands for an image; a RecordError if there are more, or fewer, of them."""
        if self.images is None:
            return 0
        token = self.images.tokens.image_token_id
        found, wanted = prompt.count(token), sum(image.stand.num_tokens for image in images)
        if found != wanted:
            raise RecordError(
                f"the prompt has {found} tokens {self.tokenizer.convert_ids_to_tokens(token)!r}, and its images take "
                f"{wanted}: its text spells one, which is not taken for ordinary text. Take it out, or set "
                "model.data.special_tokens=text."
            )
        return prompt.index(token) if images else 0

    @property
    def end_of_answer(self) -> str | None:
        """The special token by which the chat template ends an answer, if there is a template and it writes one."""
        return None if self._renderer.template is None else self._renderer.template.end

    def _with_prefix(self, text: Text, prompt: list[int]) -> list[int]:
        alone = text.templated and self.images is None
        has_it = alone or prompt[: len(self._prefix)] == self._prefix
        return prompt if has_it else self._prefix + prompt

    def _encode_texts(
        self, texts: list[tuple[int, FeedbackRecord, Text]]
    ) -> list[tuple[int, EncodedRecord | BadRecord]]:
        try:
            prompts, responses, merged = self._encode_parts([text for *_, text in texts])
        except RecordError as error:  # of one record: find out of which
            if len(texts) == 1:
                place, record, _ = texts[0]
                return [(place, error.at(record.source, record.line))]
            return [result for text in texts for result in self._encode_texts([text])]
        results: list[tuple[int, EncodedRecord | BadRecord]] = []
        for (place, record, text), prompt, response, is_merged in zip(texts, prompts, responses, merged, strict=True):
            prompt = self._with_prefix(text, prompt)
            try:
                results.append((place, self._record(record, text, prompt, response, merged=is_merged)))
            except RecordError as error:
                results.append((place, error.at(record.source, record.line)))
        return results

    def _record(
        self, record: FeedbackRecord, text: Text, prompt: list[int], response: list[int], *, merged: bool
    ) -> EncodedRecord:
        if not prompt:
            raise RecordError(_NO_PROMPT)
        if not response:
            raise RecordError(EMPTY[2])
        eos = self.tokenizer.eos_token_id
        if self.settings.append_eod and not text.ended and response[-1] != eos:
            response = [*response, eos]
        verbatim = not text.templated and self.settings.prompt_template is None
        return EncodedRecord(
            prompt,
            response,
            record.desirable,
            merged=merged,
            verbatim=verbatim,
            spelled=text.spelled,
            weight=record.weight,
            notes=tuple(Note(note.kind, f"{record.place}: {note.example}") for note in text.notes),
            images=text.images,
            image_start=self._image_start(prompt, text.images),
        )

    def _encode(self, texts: Sequence[tuple[str, Spans]], *, split_special_tokens: bool = False) -> list[list[int]]:
        """Token ids of each text, with no special token that is not spelled out in it, outside of the spans."""
        if not texts:
            return []
        encoded = self.tokenizer(
            [text for text, _ in texts],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
            split_special_tokens=split_special_tokens,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return [
            self._encode_with_spans(text, spans) if spans else plain
            for (text, spans), plain in zip(texts, ids, strict=True)
        ]

    def _encode_with_spans(self, text: str, spans: Spans) -> list[int]:
        """Token ids of a text in which some special tokens are ordinary text."""
        if not self.tokenizer.is_fast:
            raise RecordError(
                "the text spells special tokens, which this kind of tokenizer cannot take for ordinary text. Use a "
                "fast tokenizer (tokenizer.json), or set model.data.special_tokens=control."
            )
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
            split_special_tokens=False,
        )
        ids: list[int] = []
        run: list[int] = []  # since the last special token that is one
        begin, before = 0, ""
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token in self._special_ids and not _overlaps(start, end, spans):
                ids += [*self._encode_run(run, text[begin:start], before, _overlaps(begin, start, spans)), token]
                run, begin, before = [], end, text[start:end]
            else:
                run.append(token)
        return ids + self._encode_run(run, text[begin:], before, _overlaps(begin, len(text), spans))

    def _encode_run(self, ids: list[int], text: str, before: str, spelled: bool) -> list[int]:
        """Token ids of a text between two special tokens, without any in it.

        Args:
            ids: Its ids if special tokens in it count.
            text: The text.
            before: The special token in front of it; empty at the beginning.
            spelled: Whether there are special tokens in it.
        """
        if not spelled:
            return ids
        # some tokenizers put a space in front of every text, some in front of the first only: see what this one does
        probe = "a"
        alone, front, both = self._encode([(probe, ()), (before, ()), (before + probe, ())])
        if both[len(front) :] == alone:
            return self._encode([(text, ())], split_special_tokens=True)[0]
        return self._encode_after_boundary([text], split_special_tokens=True)[0]

    def _find_special_prefix(self) -> list[int]:
        """The ids the tokenizer puts in front of a text: usually [BOS] or nothing."""
        plain = self._encode([(_PROBE, ())])[0]
        full: list[int] = self.tokenizer(_PROBE, verbose=False, split_special_tokens=False)["input_ids"]
        if full and not plain:  # then nothing tells what comes before a text from what comes behind it
            raise ConfigError("The tokenizer has no token for a letter or a digit; such tokenizers do not work.")
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        raise ConfigError(
            "The tokenizer changes a text's tokens when it adds special tokens; such tokenizers do not work."
        )

    def _encode_parts(self, texts: list[Text]) -> tuple[list[list[int]], list[list[int]], list[bool]]:
        """Prompt ids, response ids that follow them, and where the two would merge; see the rule at the top."""
        wholes = [_joined(text) for text in texts]
        joint = self._encode(wholes)
        prompts = self._encode_prompts(texts, wholes, joint)
        prompts = [
            prompt if text.continues else prompt[: common_length(prompt, ids)]
            for text, prompt, ids in zip(texts, prompts, joint, strict=True)
        ]
        responses = [ids[len(prompt) :] for ids, prompt in zip(joint, prompts, strict=True)]
        merged = [ids[: len(prompt)] != prompt for ids, prompt in zip(joint, prompts, strict=True)]
        places = [i for i, is_merged in enumerate(merged) if is_merged]
        separate = self._encode_after_boundary(
            [texts[i].response for i in places], spans=[texts[i].response_spans for i in places]
        )
        for i, ids in zip(places, separate, strict=True):
            responses[i] = ids
        return prompts, responses, merged

    def _encode_prompts(
        self, texts: list[Text], wholes: list[tuple[str, Spans]], joint: list[list[int]]
    ) -> list[list[int]]:
        """Prompt ids, which are taken from those of the whole texts as far as both are the same for sure."""
        divided = [
            self._divider.divide(text.prompt, whole) if text.continues and not spans else None
            for text, (whole, spans) in zip(texts, wholes, strict=True)
        ]
        rests = [*dict.fromkeys(division.rest for division in divided if division is not None)]
        ids_of = dict(zip(rests, self._encode([(rest, ()) for rest in rests]), strict=True))
        prompts = [
            None if division is None else division.prompt(ids, ids_of[division.rest])
            for division, ids in zip(divided, joint, strict=True)
        ]
        places = [i for i, prompt in enumerate(prompts) if prompt is None]
        alone = iter(self._encode([(texts[i].prompt, texts[i].prompt_spans) for i in places]))
        return [next(alone) if prompt is None else prompt for prompt in prompts]

    def _encode_after_boundary(
        self, texts: Sequence[str], *, spans: Sequence[Spans] | None = None, split_special_tokens: bool = False
    ) -> list[list[int]]:
        """Ids of each text on its own, as a continuation of another.

        Tokenizers of the Llama 2 and Mistral kind put a space in front of every text, which would land between prompt
        and response. Tokenised behind an anchor whose tokens are then taken off again, a response gets no such space.
        Where the anchor merges with the response it cannot be taken off, and the response is tokenised as it is.
        """
        spans = spans or [()] * len(texts)
        # without any texts, too: transformers keeps `split_special_tokens` of the last call in the tokenizer
        anchor = self._encode([(_ANCHOR, ())])[0]
        behind = [
            (_ANCHOR + text, tuple((first + len(_ANCHOR), last + len(_ANCHOR)) for first, last in inside))
            for text, inside in zip(texts, spans, strict=True)
        ]
        anchored = self._encode(behind, split_special_tokens=split_special_tokens)
        alone = self._encode(list(zip(texts, spans, strict=True)), split_special_tokens=split_special_tokens)
        return [
            ids[len(anchor) :] if ids[: len(anchor)] == anchor else plain
            for ids, plain in zip(anchored, alone, strict=True)
        ]


def _overlaps(start: int, end: int, spans: Spans) -> bool:
    return any(start < last and first < end for first, last in spans)


def _joined(text: Text) -> tuple[str, Spans]:
    """The whole text and its spans."""
    if not text.continues:
        return text.response, text.response_spans
    shift = len(text.prompt)
    spans = text.prompt_spans + tuple((first + shift, last + shift) for first, last in text.response_spans)
    return text.prompt + text.response, spans
