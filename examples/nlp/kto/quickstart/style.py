"""Judges an answer of the quickstart's model: which style it has and whether it is right. Text rules, no model."""

from __future__ import annotations

import re

POLITE_PHRASES = ("Good question!", "Of course!", "Happy to help!")
MIN_POLITE_WORDS = 6
"""The shortest polite answer is a friendly phrase of two words and a sentence of at least four."""
MAX_CURT_WORDS = 4
"""The longest curt answer is "South America, obviously." or "South America. Next."; one word is left to spare."""


def style_of(answer: str) -> str:
    """Returns "polite", "curt" or "unclear".

    Polite: contains a friendly phrase and at least `MIN_POLITE_WORDS` words. Curt: no friendly phrase and at most
    `MAX_CURT_WORDS` words, but at least one. Anything else is unclear and counts for neither style.
    """
    num_words = len(answer.split())
    friendly = any(phrase in answer for phrase in POLITE_PHRASES)
    if friendly and num_words >= MIN_POLITE_WORDS:
        return "polite"
    if not friendly and 1 <= num_words <= MAX_CURT_WORDS:
        return "curt"
    return "unclear"


def is_correct(answer: str, expected: str) -> bool:
    """Whether `expected` occurs in `answer` as whole words, whatever the case."""
    return re.search(rf"\b{re.escape(expected)}\b", answer, re.IGNORECASE) is not None
