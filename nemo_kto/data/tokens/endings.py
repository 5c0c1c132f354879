"""Where an answer ends in what a chat template wrote: behind its end token.

Behind the end that they write, some templates write the EOS token of another model, and some begin another turn. A
tool call may end with a token of its own.
"""

from __future__ import annotations

import re
from typing import Any

from nemo_kto.data.tokens.lost_parts import answer_parts, lost
from nemo_kto.data.tokens.special_text import strings


def ended(
    answer: str, message: dict[str, Any], *, special: re.Pattern[str], eos: str | None, usual: str | None
) -> tuple[str, str | None, str]:
    """Returns an answer up to its end token, that token, and what the template wrote behind it.

    Args:
        answer: What the template wrote behind the prompt.
        message: The answer.
        special: Pattern of the special tokens.
        eos: The tokenizer's EOS token.
        usual: The token that the template ends answers with, if it does.
    """
    found = list(special.finditer(answer))
    own = sum(text.count(eos) for text in strings(message)) if eos else 0  # where what people spell is control
    last = next(iter([one for one in found if one[0] == eos][own:]), None)
    tail = _at_end(answer if last is None else answer[: last.end()], special)
    end = next((one for one in tail if one[0] == usual), last)
    if end is None and usual is not None:
        end = next((one for one in reversed(found) if one[0] == usual), None)
        if end is None or _more_is_lost(message, answer, end.end(), special):
            end = tail[-1] if tail else None
    if end is None:
        return answer, None, ""
    return answer[: end.end()], end[0], answer[end.end() :]


def _at_end(text: str, special: re.Pattern[str]) -> list[re.Match[str]]:
    """The special tokens at the end of a text, with nothing but whitespace between and behind them."""
    tail: list[re.Match[str]] = []
    stop = len(text)
    for found in reversed(list(special.finditer(text))):
        if text[found.end() : stop].strip():
            break
        tail.append(found)
        stop = found.start()
    return tail[::-1]


def _more_is_lost(message: dict[str, Any], answer: str, stop: int, special: re.Pattern[str]) -> bool:
    """Whether something of an answer stands behind `stop`."""
    parts = answer_parts(message)
    return len(lost(parts, answer[:stop], special)) > len(lost(parts, answer, special))
