"""Small tokenizers, trained here on a few words, and writers of feedback files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<s>", "</s>", "<|user|>", "<|system|>", "<|assistant|>"]
# "hello" is frequent enough to become one token, "hel" and "lo" are parts of it.
CORPUS = ["hello world", "hello hello hello", "say hello to the world", "the answer is yes", "what is the answer"] * 20

WriteJsonl = Callable[..., Path]


def train_byte_level(*, bos: bool = False, eos_at_end: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the GPT-2 kind; `bos` and `eos_at_end` add such a token to every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos or eos_at_end:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos_at_end else "")
        special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def train_metaspace() -> PreTrainedTokenizerFast:
    """BPE that puts a space in front of every text, as Llama 2's and Mistral's tokenizers do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=100, special_tokens=SPECIAL_TOKENS, initial_alphabet=["\n", "▁"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, adds no special tokens, has a chat template."""
    return train_byte_level()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, puts <s> in front of every text."""
    return train_byte_level(bos=True)


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space in front of every text."""
    return train_metaspace()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> WriteJsonl:
    """Writes rows (objects, or raw lines as strings) to a file and returns its path."""

    def write(*rows: dict[str, Any] | str, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def stored_samples(store: Any) -> list[tuple[list[int], list[int], bool]]:
    """Return what a store holds: per sample (prompt, response, desirable)."""
    found = []
    for row in store.samples:
        middle = row["start"] + row["prompt"]
        prompt, response = store.tokens[row["start"] : middle], store.tokens[middle : middle + row["response"]]
        found.append((prompt.tolist(), response.tolist(), bool(row["desirable"])))
    return found
