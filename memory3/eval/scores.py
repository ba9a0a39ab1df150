"""Exact match and F1 of answers, as SQuAD scores them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    return re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(said: str, answers: Sequence[str]) -> float:
    """1.0 if the answer is one of `answers`, else 0.0."""
    return float(any(words(said) == words(a) for a in answers))


def f1(said: str, answers: Sequence[str]) -> float:
    """Best harmonic mean of precision and recall of words, 0..1."""
    return max((_f1(words(said), words(a)) for a in answers), default=0.0)


def _f1(said: list[str], answer: list[str]) -> float:
    if not said or not answer:
        return float(said == answer)
    shared = sum((Counter(said) & Counter(answer)).values())
    return 2 * shared / (len(said) + len(answer))
