"""The same conversations become the same tokens, whatever format and kind of file they come in.

What is written is in `writings.py`. The expected ids come from the tokenizer's chat template and from its `tokenizers`
backend.
"""

import pytest
from tokenizers import Tokenizer

from nemo_kto.data.reading.formats import FORMATS
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import Source
from nemo_kto.data.tokens.cache import TokenCache
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.tokenization import Encoder
from tests.data.conftest import stored_samples
from tests.data.writings import CASES, CONTAINERS, CONVERSATIONS, WRITINGS, assistant, in_order_of, is_plain


class Reference:
    """Ids by the chat template of conftest.py and the `tokenizers` backend."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._control = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._text = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._text.encode_special_tokens = True

    def rendered(self, messages):
        """Prompt and response as the template writes them, and tokens of that: what it spells is what it means."""
        prompt = self._tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = self._tokenizer.apply_chat_template(messages, tokenize=False)
        assert whole.startswith(prompt) and whole.endswith("</s>\n")
        texts = prompt, whole[len(prompt) : -1]
        return [self._control.encode(text, add_special_tokens=False).ids for text in texts]

    def by_hand(self, messages):
        """The same with everything that people wrote as ordinary text."""
        prompt = [token for message in messages[:-1] for token in self._message(message)]
        prompt.append(self._special("<|assistant|>"))
        return [prompt, [*self._plain(messages[-1]["content"]), self._special("</s>")]]

    def _message(self, message):
        control = self._special(f"<|{message['role']}|>"), self._special("</s>")
        return [control[0], *self._plain(message["content"]), control[1], *self._plain("\n")]

    def _special(self, token):
        return self._control.token_to_id(token)

    def _plain(self, text):
        return self._text.encode(text, add_special_tokens=False).ids


def spells_special(c):
    return "</s>" in "".join([c.system, *c.turns, c.good, c.bad])


@pytest.fixture(scope="module")
def expected(tokenizer):
    """[(prompt ids, response ids, desirable)] of conversations, the good answer first."""
    reference = Reference(tokenizer)

    def of(conversations):
        return [
            (*reference.by_hand([*c.messages, assistant(text)]), desirable)
            for c in conversations
            for text, desirable in ((c.good, True), (c.bad, False))
        ]

    return of


def read(path, tokenizer, folder, reader, **settings):
    """What training reads of a file: [(prompt ids, response ids, desirable)]."""
    encoder = Encoder(tokenizer, TokenizationSettings(**settings))
    source = Source(str(path), reader=reader)
    store = TokenCache(folder, encoder, workers=1).tokens_of(source, skip_bad=False)
    return stored_samples(store)


def test_the_reference_agrees_with_the_chat_template(tokenizer):
    reference = Reference(tokenizer)
    for c in CONVERSATIONS:
        for text in (c.good, c.bad):
            messages = [*c.messages, assistant(text)]
            agrees = reference.rendered(messages) == reference.by_hand(messages)
            assert agrees != spells_special(c), messages


def test_every_format_is_written_here_and_most_can_express_all():
    assert {writing.format for writing in WRITINGS.values()} == {*FORMATS}
    counts = {name: sum(map(writing.fits, CONVERSATIONS)) for name, writing in WRITINGS.items()}
    assert len(CONVERSATIONS) == 10 and {*counts.values()} == {10, 7, 5}
    assert sum(count == 10 for count in counts.values()) == 18


@pytest.mark.parametrize(("name", "container"), CASES)
def test_the_same_tokens(name, container, tokenizer, expected, tmp_path):
    writing = WRITINGS[name]
    conversations = [c for c in CONVERSATIONS if writing.fits(c)]
    CONTAINERS[container](writing.write(conversations), tmp_path / container)
    wanted = in_order_of(writing, expected(conversations))
    cache = tmp_path / "tokens"
    for format in ("auto", writing.format) if container == "data.jsonl" else ("auto",):
        reader = RowReader(format, **writing.reader)
        found = read(tmp_path / container, tokenizer, cache, reader, prompt_template="chat")
        assert found == wanted


@pytest.mark.parametrize("name", [name for name, writing in WRITINGS.items() if writing.fits is not is_plain])
def test_messages_need_no_template_of_strings_and_no_bos(name, bos_tokenizer, expected, tmp_path):
    writing = WRITINGS[name]
    conversations = [c for c in CONVERSATIONS if writing.fits(c) and (writing.fields == {} or c.system)]
    CONTAINERS["data.jsonl"](writing.write(conversations), tmp_path / "data.jsonl")
    found = read(tmp_path / "data.jsonl", bos_tokenizer, tmp_path / "tokens", RowReader(**writing.reader))
    assert found == in_order_of(writing, expected(conversations))
