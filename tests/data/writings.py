"""The same ten conversations, written in every format and kind of file by small writers.

They follow the formats' own documentation; each conversation has a good and a bad answer.
"""

import csv
import gzip
import io
import json
from dataclasses import dataclass, field

import datasets
import pyarrow
import pyarrow.parquet


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


def helpsteer3(conversations):
    """The preference is below 0 where the first response is better, above where the second is."""
    rows = []
    for number, c in enumerate(conversations):
        first, second = (c.good, c.bad) if number % 2 == 0 else (c.bad, c.good)
        sides = {"response1": first, "response2": second}
        rows.append({"context": c.messages, **sides, "overall_preference": (-2, 1)[number % 2], "domain": "general"})
    return rows


def lc(message):
    """A message as langchain_core.load.dumpd writes it."""
    name, kind = {"system": ("System", "system"), "user": ("Human", "human"), "assistant": ("AI", "ai")}[
        message["role"]
    ]
    kwargs = {"content": message["content"], "type": kind}
    return {
        "lc": 1,
        "type": "constructor",
        "id": ["langchain", "schema", "messages", f"{name}Message"],
        "kwargs": kwargs,
    }


def chat_ui(c, text, good):
    said = [{"from": m["role"], "content": m["content"], "score": None} for m in [*c.messages, assistant(text)]]
    return {"title": "t", "messages": [*said[:-1], {**said[-1], "score": 1 if good else -1}]}


@dataclass(frozen=True)
class Writing:
    """A format as it is written here.

    Attributes:
        format: Our name of it.
        write: Conversations -> rows.
        fits: What it can express.
        fields: See `RowReader`.
        json_strings: See `RowReader`; "text" where one of the conversations types what looks like messages.
    """

    format: str
    write: object
    fits: object = lambda c: True
    fields: dict = field(default_factory=dict)
    json_strings: str = "auto"

    @property
    def reader(self):
        """How its files are read, besides their format."""
        return {"fields": self.fields, "json_strings": self.json_strings}


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
        json_strings="text",
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
    "OpenAI DPO": Writing(
        "openai_dpo",
        pairs(
            lambda c: {
                "input": {"messages": c.messages, "tools": [], "parallel_tool_calls": True},
                "preferred_output": [assistant(c.good)],
                "non_preferred_output": [assistant(c.bad)],
            }
        ),
    ),
    "HelpSteer3": Writing("helpsteer3", helpsteer3),
    "Langfuse": Writing(
        "langfuse",
        answers(
            lambda c, text, good: {
                "id": "t",
                "input": c.messages,
                "output": assistant(text),
                "scores": [{"name": "user-feedback", "value": int(good), "dataType": "BOOLEAN"}],
            }
        ),
    ),
    "LangSmith": Writing(
        "langsmith",
        answers(
            lambda c, text, good: {
                "id": "r",
                "inputs": {"messages": [[lc(m) for m in c.messages]]},
                "outputs": {"generations": [[{"text": text, "message": lc(assistant(text))}]]},
                "feedback_stats": {"user_score": {"n": 1, "avg": float(good)}},
            }
        ),
    ),
    "chat-ui": Writing("chatui", answers(chat_ui)),
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
        "text",
    ),
    "axolotl chatml.intel": Writing(
        "trl",
        answers(
            lambda c, text, good: {"system": c.system, "question": c.turns[0], "completion": text, "label": good},
        ),
        is_single,
        {"prompt": "question"},
        "text",
    ),
    "axolotl user_defined": Writing(
        "trl",
        answers(lambda c, text, good: {"s": c.system, "q": c.turns[0], "a": text, "liked": good}),
        is_single,
        {"system": "s", "prompt": "q", "response": "a", "label": "liked"},
        "text",
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
    # one of the prompts is text that spells messages, and the answers are messages that are spelled
    if (name, container) not in [("ultrafeedback_binarized", "data.csv"), ("ultrafeedback_binarized", "data.tsv.gz")]
]


def in_order_of(writing, samples):
    """Some pairs are in the order A, B; every second of them has the bad answer first."""
    if writing.format not in ("halos_pairs", "helpsteer3"):
        return samples
    swapped = [samples[i : i + 2][:: 1 if i % 4 == 0 else -1] for i in range(0, len(samples), 2)]
    return [sample for pair in swapped for sample in pair]
