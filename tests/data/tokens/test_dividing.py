"""A prompt has the tokens of the prompt alone, whatever tokens were taken from those of the whole conversation.

Expected ids come from the `tokenizers` backend, called on the prompt alone and on the whole text; the tokenizers cut
texts at their added tokens in every way there is.
"""

import random
from unittest import mock

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemo_kto.data.reading.records import EMPTY, BadRecord, FeedbackRecord
from nemo_kto.data.tokens.dividing import Divider
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.tokenization import Encoder
from tests.data.conftest import CHAT_TEMPLATE, CORPUS, train_byte_level

ROLES = ("<|user|>", "<|system|>", "<|assistant|>")
WORDS = ["hello", "hel", "lo", " ", "  ", "\n", "\n\n", " world", "＜", "<", "|>", "assistant", "<think>", "'s", "é"]
SPELLED = [*WORDS, *ROLES, "</s>"]


def roles(**how):
    return [AddedToken(role, special=True, **{"normalized": False, **how}) for role in ROLES]


ADDED = {
    "plain": roles(),
    "take the space behind them": roles(rstrip=True),
    "take the space before them": roles(lstrip=True),
    "are whole words": roles(single_word=True),
    "are looked for in normalised text": roles(normalized=True),
    "go over the end of a prompt": [*roles(), AddedToken("<|assistant|>hel", special=True, normalized=False)],
    "are line breaks": [*roles(), AddedToken("\n\n", normalized=False)],
    "overlap": [AddedToken("<|user|>", special=True), AddedToken("t|>"), AddedToken("<|assistant|", normalized=False)],
}
TEXTS = {
    "bytes": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "bytes behind a space": (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    "a space first": (pre_tokenizers.Metaspace(prepend_scheme="first"), None),
    "a space always": (pre_tokenizers.Metaspace(prepend_scheme="always"), None),
    "normalised": (
        pre_tokenizers.Split(" ", "isolated"),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFKC()]),
    ),
}


def build(added, pre_tokenizer, normalizer):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "\n", "▁", " "]
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    backend.add_tokens([token for token in added if not token.special])
    backend.add_special_tokens([token for token in added if token.special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def texts(words, number):
    generator = random.Random(0)
    for _ in range(number):
        yield tuple("".join(generator.choices(words, k=generator.randint(1, 10))) for _ in range(2))


def conversation(asked, said):
    return [{"role": "user", "content": asked}], [{"role": "assistant", "content": said}]


def records(pairs):
    return [FeedbackRecord(*pair, True, "data.jsonl", line) for line, pair in enumerate(pairs, 1)]


def agrees(tokenizer, encoded, prompt, whole):
    """Whether a record has the tokens of its prompt alone, and behind them, if they can be, those of the whole."""
    alone, joint = (tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, whole))
    goes_on = joint[: len(alone)] == alone
    if isinstance(encoded, BadRecord):
        return encoded.reason == EMPTY[2] and joint == alone
    return (
        encoded.prompt == alone
        and encoded.merged == (not goes_on)
        and (not goes_on or encoded.response == joint[len(alone) :])
    )


@pytest.mark.parametrize("words", [WORDS, SPELLED], ids=["people spell none", "people spell them"])
@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("added", ADDED)
def test_a_prompt_has_its_own_tokens(added, kind, words):
    tokenizer = build(ADDED[added], *TEXTS[kind])
    pairs = [pair for pair in texts(words, 60) if tokenizer.backend_tokenizer.encode(pair[0]).ids]
    settings = TokenizationSettings(append_eod=False, special_tokens="control", template_losses="warn")
    encoder = Encoder(tokenizer, settings)
    for (prompt, said), encoded in zip(pairs, encoder.encode(records(pairs)), strict=True):
        assert agrees(tokenizer, encoded, prompt, prompt + said)

    chats = [conversation(*pair) for pair in pairs if pair[1].strip()]
    compared = 0
    for (asked, answer), encoded in zip(chats, encoder.encode(records(chats)), strict=True):
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(asked + answer, tokenize=False)
        if whole.endswith("</s>\n") and not any(token in answer[0]["content"] for token in (*ROLES, "</s>")):
            assert agrees(tokenizer, encoded, prompt, whole[:-1])  # the line break behind the end is not kept
            compared += 1
    assert compared > 10


def test_a_prompt_is_tokenised_once(tokenizer):
    calls = []
    chats = [conversation(*pair) for pair in texts(WORDS[:3], 50)]
    encoder = Encoder(tokenizer, TokenizationSettings())
    original = type(tokenizer)._encode_plus

    def observed(self, text, *args, **kwargs):
        calls.append(text)
        return original(self, text, *args, **kwargs)

    with mock.patch.object(PreTrainedTokenizerFast, "_encode_plus", observed):
        encoder.encode(records(chats))
    wholes = [tokenizer.apply_chat_template(asked + answer, tokenize=False)[:-1] for asked, answer in chats]
    assert calls == [wholes, ["<|assistant|>"], ["\n"]]  # and what `_encode_after_boundary` takes off again


def test_tokenizers_that_work_otherwise_are_left_alone():
    class Other(PreTrainedTokenizerFast):
        def _encode_plus(self, *args, **kwargs):
            return super()._encode_plus(*args, **kwargs)

    plain = train_byte_level()
    assert Divider(plain).divide("<|user|>hel", "<|user|>hello") is not None
    other = Other(tokenizer_object=plain.backend_tokenizer)
    assert Divider(other).divide("<|user|>hel", "<|user|>hello") is None
