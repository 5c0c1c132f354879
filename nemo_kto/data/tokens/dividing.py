"""Where special tokens divide a text for sure, so that a prompt's tokens are found in those of the whole conversation.

A fast tokenizer first cuts a text at its added tokens, the leftmost and of those the longest; what is between two of
them becomes tokens by itself. So up to the last such token of a prompt, prompt and conversation have the same tokens,
and what is behind it in the prompt is tokenised behind that token alone: usually the header of an answer, the same for
all records. Where a text has no such token, or a tokenizer works otherwise, the prompt is tokenised as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_kto.data.tokens.special_text import token_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALLS = ("__call__", "_encode_plus", "_batch_encode_plus", "_call_one", "_tokenize")
"""Methods by which transformers' own class of fast tokenizers makes tokens, in one of its versions or another."""


@dataclass(frozen=True, slots=True)
class Division:
    """A prompt, divided at its last added token.

    Attributes:
        number: Number of that token.
        occurrence: Which of its occurrences it is, from 1.
        total: How often it occurs in the whole conversation.
        rest: The token as text, and what is behind it in the prompt.
    """

    number: int
    occurrence: int
    total: int
    rest: str

    def prompt(self, whole: list[int], rest: list[int]) -> list[int] | None:
        """Returns a prompt's tokens.

        Args:
            whole: Token ids of the conversation.
            rest: Token ids of `rest`.

        Returns:
            The token ids; None if ordinary text became that token as well, or the token became something else.
        """
        if rest[:1] != [self.number] or whole.count(self.number) != self.total:
            return None
        place = -1
        for _ in range(self.occurrence):
            place = whole.index(self.number, place + 1)
        return whole[:place] + rest


class Divider:
    """Divides prompts at the added tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Finds the tokens at which it can; none in a tokenizer that is not known to divide texts at them."""
        from transformers import PreTrainedTokenizerFast

        kind = type(tokenizer)
        known = tokenizer.is_fast and all(
            getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in _CALLS
        )
        # others are looked for in the text between these, once it is normalised
        added = {
            str(token.content): (number, token.single_word)
            for number, token in (tokenizer.added_tokens_decoder.items() if known else ())
            if not token.normalized
        }
        self._found = token_pattern(set(added))
        # one that counts only as a word of its own may not count here; in the pattern it hides what is inside of it
        self._numbers = {text: number for text, (number, single_word) in added.items() if not single_word}

    def divide(self, prompt: str, whole: str) -> Division | None:
        """Returns the division of a prompt with which a text begins; None if there is no added token in it."""
        texts: list[str] = []
        last, inside = None, 0
        for found in self._found.finditer(whole):
            texts.append(found[0])
            if found.end() <= len(prompt):
                last, inside = found, len(texts)
        if last is None or last[0] not in self._numbers:
            return None
        occurrence, total = texts[:inside].count(last[0]), texts.count(last[0])
        return Division(self._numbers[last[0]], occurrence, total, prompt[last.start() :])
