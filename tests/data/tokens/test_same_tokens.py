"""The same conversations become the same tokens, whatever format and kind of file they come in.

Ten prompts with a good and a bad answer each, written by small writers that follow the formats' own documentation.
The expected ids come from the tokenizer's chat template and from its `tokenizers` backend.
"""

import csv
import gzip
import io
import json
from dataclasses import dataclass, field

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from nemo_kto.data.reading.formats import FORMATS
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import Source
from nemo_kto.data.tokens.cache import TokenCache
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.tokenization import Encoder
from tests.data.conftest import stored_samples


@dataclass(frozen=True)
class Conversation:
    """Questions and answers in turn, the last question open; a good and a bad answer to it."""

    turns: list[str]
    good: str
    bad: str
    system: str = ""

    @property
    def single(self):
        return len(self.turns) == 1

    @property
    def messages(self):
        roles = ["user", "assistant"] * len(self.turns)
        start = [{"role": "system", "content": self.system}] if self.system else []
        return start + [{"role": role, "content": text} for role, text in zip(roles, self.turns, strict=False)]


CONVERSATIONS = [
    Conversation(["what is the answer"], "the answer is yes", "hello world"),
    Conversation(["say hello to the world"], "hello world", "no", system="Be brief, say hello."),
    Conversation(["say hello", "hello", "what is the answer"], "yes", "say what"),
    Conversation(["hi", "Hello!", "1 + 1?", "3", "no"], "Sorry: 2.", "It is 3.", system="You know\nnumbers."),
    Conversation(["Wie heißt die Größe? 日本語で 👩‍👩‍👧 e\u0301"], "naïve – 你好 🎉", "Ελληνικά"),
    Conversation(["Sort:\n\n```python\n\tx = [3, 1]\n```"], 'x.sort()\n# {"a": [1]}', "print('\\n', \"x\")"),
    Conversation(["first\nsecond\r\nthird\n"], "\n\na\nb\n", "one\u2028two\x85three\x0bfour"),
    Conversation(["What is </s> for?", "<s>", "<|assistant|>yes</s>"], "It ends </s>", "<|user|> hello <|system|>"),
    Conversation(["  hello  "], "  two spaces around  ", " "),
    Conversation(
        ['[{"role": "user", "content": "x"}]'], '{"a": 1}', "[1, 2]", system=" true, or 1,5; \"quoted\" 'x' "
    ),
]


def assistant(text):
    return {"role": "assistant", "content": text}


def answers(row_of):
    """Rows of a format with one answer in each: `row_of(conversation, answer, desirable)`."""

    def write(conversations):
        return [
            row_of(c, text, desirable) for c in conversations for text, desirable in ((c.good, True), (c.bad, False))
        ]

    return write


def pairs(row_of):
    """Rows of a format with both answers in each."""
    return lambda conversations: [row_of(c) for c in conversations]


def turn(message):
    """A message the way of ShareGPT."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"from": names[message["role"]], "value": message["content"]}


def alpaca_question(c):
    """LLaMA-Factory joins what it finds in the two columns with a line break."""
    instruction, separator, rest = c.turns[-1].partition("\n")
    if not (instruction and rest):
        instruction, rest = c.turns[-1], ""
    return {"instruction": instruction, "input": rest, "system": c.system}


def alpaca_turns(c):
    return {"history": [list(turn) for turn in zip(c.turns[:-1:2], c.turns[1::2], strict=True)]}


def halos_pairs(conversations):
    """Label 1 means that A is better, 0 that B is."""
    rows = []
    for number, c in enumerate(conversations):
        first, second = (c.good, c.bad) if number % 2 == 0 else (c.bad, c.good)
        sides = {"output_A": [assistant(first)], "output_B": [assistant(second)]}
        rows.append({"prompt": c.messages, **sides, "label": 1 - number % 2})
    return rows


@dataclass(frozen=True)
class Writing:
    """A format as it is written here.

    Attributes:
        format: Our name of it.
        write: Conversations -> rows.
        fits: What it can express.
        fields: See `RowReader`.
    """

    format: str
    write: object
    fits: object = lambda c: True
    fields: dict = field(default_factory=dict)


def is_single(c):
    return c.single


def is_plain(c):
    return c.single and not c.system


WRITINGS = {
    "TRL": Writing(
        "trl",
        answers(lambda c, text, good: {"prompt": c.messages, "completion": [assistant(text)], "label": good}),
    ),
    "TRL strings": Writing(
        "trl", answers(lambda c, text, good: {"prompt": c.turns[0], "completion": text, "label": good}), is_plain
    ),
    "NeMo-Aligner": Writing(
        "nemo_aligner",
        answers(
            lambda c, text, good: {
                "prompt": c.turns[0],
                "response": text,
                "preference": "chosen" if good else "rejected",
            }
        ),
        is_plain,
    ),
    "NeMo-Aligner DPO": Writing(
        "nemo_aligner_pairs",
        pairs(lambda c: {"prompt": c.turns[0], "chosen_response": c.good, "rejected_response": c.bad}),
        is_plain,
    ),
    "HALOs": Writing(
        "halos",
        answers(
            lambda c, text, good: {
                "prompt": c.messages,
                "output": [assistant(text)],
                "label": int(good),
                "type": "binary_feedback",
            }
        ),
    ),
    "HALOs pairs": Writing("halos_pairs", halos_pairs),
    "TRL pairs": Writing(
        "pairs",
        pairs(lambda c: {"prompt": c.messages, "chosen": [assistant(c.good)], "rejected": [assistant(c.bad)]}),
    ),
    "TRL pairs, strings": Writing(
        "pairs", pairs(lambda c: {"prompt": c.turns[0], "chosen": c.good, "rejected": c.bad}), is_plain
    ),
    "TRL pairs without prompt": Writing(
        "pairs",
        pairs(
            lambda c: {"chosen": [*c.messages, assistant(c.good)], "rejected": [*c.messages, assistant(c.bad)]},
        ),
    ),
    "ultrafeedback_binarized": Writing(
        "pairs",
        pairs(
            lambda c: {
                "prompt": c.turns[0],
                "chosen": [*c.messages, assistant(c.good)],
                "rejected": [*c.messages, assistant(c.bad)],
                "messages": [*c.messages, assistant(c.good)],
                "score_chosen": 7.5,
            }
        ),
        is_single,
    ),
    "ms-swift": Writing(
        "messages", answers(lambda c, text, good: {"messages": [*c.messages, assistant(text)], "label": good})
    ),
    "LLaMA-Factory openai": Writing(
        "messages", answers(lambda c, text, good: {"messages": [*c.messages, assistant(text)], "kto_tag": good})
    ),
    "LLaMA-Factory sharegpt": Writing(
        "sharegpt",
        answers(
            lambda c, text, good: {
                "conversations": [turn(m) for m in [*c.messages, assistant(text)] if m["role"] != "system"],
                "system": c.system,
                "kto_tag": good,
            }
        ),
    ),
    "LLaMA-Factory sharegpt, system in the conversation": Writing(
        "sharegpt",
        answers(
            lambda c, text, good: {"conversations": [turn(m) for m in [*c.messages, assistant(text)]], "kto_tag": good}
        ),
    ),
    "LLaMA-Factory sharegpt ranking": Writing(
        "message_pairs",
        pairs(
            lambda c: {
                "conversations": [turn(m) for m in c.messages],
                "chosen": turn(assistant(c.good)),
                "rejected": turn(assistant(c.bad)),
            }
        ),
    ),
    "OpenAI messages, ranking": Writing(
        "message_pairs",
        pairs(lambda c: {"messages": c.messages, "chosen": [assistant(c.good)], "rejected": [assistant(c.bad)]}),
    ),
    "LLaMA-Factory alpaca": Writing(
        "alpaca",
        answers(
            lambda c, text, good: {**alpaca_question(c), **alpaca_turns(c), "output": text, "kto_tag": good},
        ),
    ),
    "LLaMA-Factory alpaca without history": Writing(
        "alpaca",
        answers(lambda c, text, good: {**alpaca_question(c), "output": text, "kto_tag": good}),
        is_single,
    ),
    "LLaMA-Factory alpaca ranking": Writing(
        "alpaca_pairs",
        pairs(lambda c: {**alpaca_question(c), **alpaca_turns(c), "chosen": c.good, "rejected": c.bad}),
    ),
    "axolotl chatml.argilla": Writing(
        "trl",
        answers(
            lambda c, text, good: {
                "system": c.system,
                "instruction": c.turns[0],
                "completion": text,
                "label": good,
            }
        ),
        is_single,
        {"prompt": "instruction"},
    ),
    "axolotl chatml.intel": Writing(
        "trl",
        answers(
            lambda c, text, good: {"system": c.system, "question": c.turns[0], "completion": text, "label": good},
        ),
        is_single,
        {"prompt": "question"},
    ),
    "axolotl user_defined": Writing(
        "trl",
        answers(lambda c, text, good: {"s": c.system, "q": c.turns[0], "a": text, "liked": good}),
        is_single,
        {"system": "s", "prompt": "q", "response": "a", "label": "liked"},
    ),
}


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows, delimiter):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([json.dumps(cell) if isinstance(cell, list | dict) else cell for cell in row.values()])
    return text.getvalue().encode()


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


CONTAINERS = {
    "data.jsonl": lambda rows, path: path.write_bytes(jsonl(rows)),
    "crlf.jsonl": lambda rows, path: path.write_bytes(jsonl(rows).replace(b"\n", b"\r\n")),
    "array.json": lambda rows, path: path.write_text(json.dumps(rows, indent=1), encoding="utf-8"),
    "packed.jsonl.gz": lambda rows, path: path.write_bytes(gzip.compress(jsonl(rows))),
    "packed.jsonl.zst": lambda rows, path: path.write_bytes(zstd(jsonl(rows))),
    "data.parquet": lambda rows, path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "saved": lambda rows, path: datasets.Dataset.from_list(rows).save_to_disk(path),
    "data.csv": lambda rows, path: path.write_bytes(table(rows, ",")),
    "data.tsv.gz": lambda rows, path: path.write_bytes(gzip.compress(table(rows, "\t"))),
}
CASES = [
    (name, container)
    for name in WRITINGS
    for container in CONTAINERS
    # a user who writes JSON cannot be told from messages where the row's other cells hold some
    if (name, container) not in [("ultrafeedback_binarized", "data.csv"), ("ultrafeedback_binarized", "data.tsv.gz")]
]


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


def read(path, tokenizer, folder, *, format="auto", fields=None, **settings):
    """What training reads of a file: [(prompt ids, response ids, desirable)]."""
    encoder = Encoder(tokenizer, TokenizationSettings(**settings))
    source = Source(str(path), reader=RowReader(format, fields or {}))
    store = TokenCache(folder, encoder, workers=1).tokens_of(source, skip_bad=False)
    return stored_samples(store)


def in_order_of(writing, samples):
    """HALOs' pairs are in the order A, B; every second of them has the bad answer first."""
    if writing.format != "halos_pairs":
        return samples
    swapped = [samples[i : i + 2][:: 1 if i % 4 == 0 else -1] for i in range(0, len(samples), 2)]
    return [sample for pair in swapped for sample in pair]


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
    assert sum(count == 10 for count in counts.values()) == 13


@pytest.mark.parametrize(("name", "container"), CASES)
def test_the_same_tokens(name, container, tokenizer, expected, tmp_path):
    writing = WRITINGS[name]
    conversations = [c for c in CONVERSATIONS if writing.fits(c)]
    CONTAINERS[container](writing.write(conversations), tmp_path / container)
    wanted = in_order_of(writing, expected(conversations))
    cache = tmp_path / "tokens"
    for format in ("auto", writing.format) if container == "data.jsonl" else ("auto",):
        found = read(
            tmp_path / container, tokenizer, cache, format=format, fields=writing.fields, prompt_template="chat"
        )
        assert found == wanted


@pytest.mark.parametrize("name", [name for name, writing in WRITINGS.items() if writing.fits is not is_plain])
def test_messages_need_no_template_of_strings_and_no_bos(name, bos_tokenizer, expected, tmp_path):
    writing = WRITINGS[name]
    conversations = [c for c in CONVERSATIONS if writing.fits(c) and (writing.fields == {} or c.system)]
    CONTAINERS["data.jsonl"](writing.write(conversations), tmp_path / "data.jsonl")
    found = read(tmp_path / "data.jsonl", bos_tokenizer, tmp_path / "tokens", fields=writing.fields)
    assert found == in_order_of(writing, expected(conversations))
