"""`FeedbackRecord` -> tokens, so that training sees a prompt exactly as inference will.

The boundary between prompt and response. At inference the prompt is tokenised without the response, which is then
generated token by token. So the prompt's tokens are those of the prompt alone. The response's tokens are what follows
the prompt's tokens in the tokenisation of prompt + response, whenever that begins with the prompt's tokens (it nearly
always does). Where the tokenizer would merge the last characters of the prompt with the first of the response, the
response is tokenised on its own, because generation cannot change a token of the prompt.

Beginning of sequence. For strings, whatever the tokenizer puts in front of a text (usually one BOS token) is put in
front of the prompt once, and not again when the text already begins with it. For messages the chat template alone
decides, as it does at inference. Tokens that a tokenizer appends to a text are never taken over.

Dates. A chat template that names today's date is given a fixed one: a run that is resumed tomorrow, or a rank that
starts after midnight, must see the same tokens.

Shapes: `p` tokens of the prompt, `r` tokens of the response.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_kto.data.records import FeedbackRecord
from nemo_kto.errors import ConfigError, DataError

# One of these is present wherever transformers can build a tokenizer from files.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
# Records tokenised per call: few enough that the tokenizer's bulky intermediate results (offsets, masks, words) of a
# large file never exist together.
_CHUNK = 2048
# Stands in for the function by which templates ask for today's date; Llama 3's own template falls back to this day.
_FIXED_DATE_MACRO = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
# A text that stays a token of its own in front of a response, see _encode_after_boundary.
_ANCHOR = "\n"


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """One trainable record.

    Attributes:
        prompt: [p] int64 token ids, p >= 1.
        response: [r] int64 token ids, r >= 1.
        desirable: True for thumbs up.
        prompt_key: `prompt_key(prompt)`: equal for samples of the same prompt.
    """

    prompt: Tensor
    response: Tensor
    desirable: bool
    prompt_key: int


@dataclass(frozen=True, slots=True)
class TokenizationResult:
    """The samples in the order of their records, and how many records were dropped for their length."""

    samples: list[TokenizedSample]
    num_overlong: int

    @property
    def num_desirable(self) -> int:
        """Samples with thumbs up."""
        return sum(sample.desirable for sample in self.samples)

    @property
    def num_undesirable(self) -> int:
        """Samples with thumbs down."""
        return len(self.samples) - self.num_desirable


@dataclass(frozen=True, slots=True)
class _Text:
    """Prompt and response as text; `templated` when a chat template wrote them, special tokens included."""

    prompt: str
    response: str
    templated: bool


def prompt_key(prompt: Tensor) -> int:
    """A 63-bit number that is the same for equal prompts [p] on every machine and in every process."""
    digest = hashlib.blake2b(prompt.to(torch.int64).numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local Hugging Face folder; never looks anywhere else.

    Raises:
        ConfigError: `path` is no folder, has no tokenizer files, or transformers cannot read them.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; the tokenizer is read from a local Hugging Face folder.")
    # Checked here because transformers may build an empty tokenizer from a config.json alone.
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise ConfigError(f"{folder}: the folder has no tokenizer; expected one of {', '.join(_VOCABULARY_FILES)}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the readers behind it raise anything from KeyError to bare Exception
        raise ConfigError(f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}).") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase), type(tokenizer)
    return tokenizer


def tokenize_records(
    records: Sequence[FeedbackRecord],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    append_eod: bool,
) -> TokenizationResult:
    """Tokenises records by the rules at the top of this file.

    Args:
        records: What `read_feedback` returned.
        tokenizer: Any transformers tokenizer; records made of messages need one with a chat template.
        max_length: Most tokens of prompt and response together, what `append_eod` adds included. A longer record is
            dropped and counted; nothing is ever cut off.
        append_eod: End every response with the tokenizer's EOS token, unless it ends with one already.

    Raises:
        DataError: A response or a prompt has no tokens, a record's messages cannot be rendered, or no record is left.
        ConfigError: `append_eod` with a tokenizer that has no EOS token.
    """
    if append_eod and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"The tokenizer in {tokenizer.name_or_path} has no EOS token: set eos_token in its tokenizer_config.json, "
            "or model.data.append_eod=false."
        )
    prefix = _special_prefix(tokenizer, _render(records[0], tokenizer).response) if records else []
    samples: list[TokenizedSample] = []
    lengths: list[int] = []
    for start in range(0, len(records), _CHUNK):
        for sample in _tokenize_chunk(records[start : start + _CHUNK], tokenizer, prefix, append_eod=append_eod):
            lengths.append(len(sample.prompt) + len(sample.response))
            if lengths[-1] <= max_length:
                samples.append(sample)
    if not samples:
        shortest = f"the shortest has {min(lengths)} tokens" if lengths else "there are none"
        raise DataError(
            f"No trainable record is left in {', '.join(dict.fromkeys(record.source for record in records))}: of "
            f"{len(records)} records none fits into {max_length} tokens ({shortest}). Raise model.data.seq_length or "
            "shorten the data."
        )
    return TokenizationResult(samples, num_overlong=len(lengths) - len(samples))


def _tokenize_chunk(
    records: Sequence[FeedbackRecord], tokenizer: PreTrainedTokenizerBase, prefix: list[int], *, append_eod: bool
) -> list[TokenizedSample]:
    texts = [_render(record, tokenizer) for record in records]
    prompts = _encode(tokenizer, [text.prompt for text in texts])
    responses = _encode_responses(tokenizer, texts, prompts)
    samples = []
    for record, text, prompt, response in zip(records, texts, prompts, responses, strict=True):
        if not text.templated and prompt[: len(prefix)] != prefix:
            prompt = prefix + prompt
        if not prompt:
            raise DataError(f"{record.place}: the prompt has no tokens and the tokenizer adds no BOS token.")
        if not response:
            raise DataError(f"{record.place}: the response has no tokens.")
        if append_eod and response[-1] != tokenizer.eos_token_id:
            response = [*response, tokenizer.eos_token_id]
        prompt_ids = torch.tensor(prompt, dtype=torch.int64)
        response_ids = torch.tensor(response, dtype=torch.int64)
        samples.append(TokenizedSample(prompt_ids, response_ids, record.desirable, prompt_key(prompt_ids)))
    return samples


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with no special token that is not spelled out in it."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _special_prefix(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids the tokenizer puts in front of a text, here shown by one text of the data: usually [BOS] or nothing."""
    plain = _encode(tokenizer, [text])[0]
    full: list[int] = tokenizer(text, verbose=False)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise ConfigError(
        "The tokenizer changes a text's tokens when it adds special tokens; such tokenizers do not work."
    )


def _encode_responses(
    tokenizer: PreTrainedTokenizerBase, texts: list[_Text], prompts: list[list[int]]
) -> list[list[int]]:
    """Response ids that follow the given prompt ids; see the rule at the top of this file."""
    joint = _encode(tokenizer, [text.prompt + text.response for text in texts])
    responses = [ids[len(prompt) :] for ids, prompt in zip(joint, prompts, strict=True)]
    merged = [i for i, prompt in enumerate(prompts) if joint[i][: len(prompt)] != prompt]
    separate = _encode_after_boundary(tokenizer, [texts[i].response for i in merged])
    for i, ids in zip(merged, separate, strict=True):
        responses[i] = ids
    return responses


def _encode_after_boundary(tokenizer: PreTrainedTokenizerBase, responses: list[str]) -> list[list[int]]:
    """Ids of each response on its own, as a continuation of a text.

    Tokenizers of the Llama 2 and Mistral kind put a space in front of every text, which would land between prompt and
    response. Tokenised behind an anchor whose tokens are then taken off again, a response gets no such space. Where
    the anchor merges with the response it cannot be taken off, and the response is tokenised as it is.
    """
    anchor = _encode(tokenizer, [_ANCHOR])[0]
    anchored = _encode(tokenizer, [_ANCHOR + response for response in responses])
    alone = _encode(tokenizer, responses)
    return [
        behind[len(anchor) :] if behind[: len(anchor)] == anchor else plain
        for behind, plain in zip(anchored, alone, strict=True)
    ]


def _undated_template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.get_chat_template()
    return _FIXED_DATE_MACRO + template if "strftime_now" in template else template


def _render(record: FeedbackRecord, tokenizer: PreTrainedTokenizerBase) -> _Text:
    """Prompt and response as text; messages go through the chat template.

    The response is what the template writes after the prompt with its generation header, up to and including EOS: the
    line break that many templates write after EOS is never generated, so it is not trained on either.
    """
    if isinstance(record.prompt, str):
        assert isinstance(record.response, str), record.place
        return _Text(record.prompt, record.response, templated=False)
    assert isinstance(record.response, list), record.place
    if not tokenizer.chat_template:
        raise DataError(
            f"{record.place}: the record is made of messages but the tokenizer has no chat template; "
            "use the tokenizer of a chat model, or write prompt and response as strings."
        )
    try:
        template = _undated_template(tokenizer)
        prompt = tokenizer.apply_chat_template(
            record.prompt, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(record.prompt + record.response, chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # a template is a program
        raise DataError(f"{record.place}: the chat template refuses the messages ({error}).") from error
    assert isinstance(prompt, str) and isinstance(whole, str)
    if not whole.startswith(prompt):
        raise DataError(
            f"{record.place}: the chat template does not render the prompt as the beginning of the conversation, "
            "so the response cannot be told apart; write prompt and response as strings instead."
        )
    response = whole[len(prompt) :]
    eos = tokenizer.eos_token
    if eos and response.rstrip().endswith(eos):
        response = response.rstrip()
    return _Text(prompt, response, templated=True)
